"""A small reference transformer against the attention context, with whatever the engine must carry: grouped-query
heads, absolute positions, scalar, per-lane and static conditioning, and lane state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from swba_infer.context import AttentionContext


class TinyModel(nn.Module):
    """Residual attention layers over [L, N, C] tokens.

    Args:
        state: whether it has lane state ("prompt" [L, width], added to every token).
        fail_in: a layer in which the forward raises, once `armed` is set.
    """

    def __init__(
        self, layers: int = 2, heads: int = 2, kv_heads: int = 1, head_dim: int = 8, channels: int = 3,
        state: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layers, self.heads, self.kv_heads, self.head_dim = layers, heads, kv_heads, head_dim
        self.config = {"layers": layers, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        width = heads * head_dim
        self.fail_in: int | None = None
        self.has_state = state
        generator = torch.Generator().manual_seed(seed)

        def linear(n_in: int, n_out: int) -> nn.Linear:
            made = nn.Linear(n_in, n_out, bias=False)
            with torch.no_grad():
                made.weight.copy_(torch.randn(made.weight.shape, generator=generator) * 1.5 / n_in**0.5)
            return made

        self.embed, self.head = linear(channels, width), linear(width, channels)
        self.qkv = nn.ModuleList(linear(width, width + 2 * kv_heads * head_dim) for _ in range(layers))
        self.out = nn.ModuleList(linear(width, width) for _ in range(layers))

    def lane_state(self, lanes: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        if not self.has_state:
            return {}
        return {"prompt": torch.empty(lanes, self.heads * self.head_dim, dtype=dtype, device=device)}

    def forward(
        self,
        tokens: Tensor,
        context: AttentionContext,
        *,
        shift: Tensor | float = 0.0,
        action: Tensor | int = 0,
        flip: bool = False,
    ) -> Tensor:
        x = self.embed(tokens) * (-1 if flip else 1)
        for given in (shift, action):
            if isinstance(given, Tensor):
                given = given.to(x.dtype).reshape(-1, 1, 1)
            x = x + given * 0.1
        if "prompt" in context.state:
            x = x + context.state["prompt"][:, None]
        for layer in range(self.layers):
            if layer == self.fail_in:
                raise RuntimeError(f"layer {layer} fails")
            x = x + self.attend(layer, x, context)
        return self.head(x)

    def attend(self, layer: int, x: Tensor, context: AttentionContext) -> Tensor:
        x = nn.functional.layer_norm(x, x.shape[-1:])
        q, k, v = self.qkv[layer](x).split([x.shape[-1], *[self.kv_heads * self.head_dim] * 2], dim=-1)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (q, k, v))
        q_sink = None if context.sink_positions is None else rotate(q, context.sink_positions)
        q, k = (rotate(y, context.positions) for y in (q, k))
        out = context.attend(layer, q, k, v, q_sink)
        return self.out[layer](out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate x [L, H, N, D] by its positions [L, N]; keeps absolute positions in play."""
    frequency = 0.3 ** torch.arange(x.shape[-1] // 2, device=x.device, dtype=torch.float64)
    angle = (positions[:, None, :, None].double() * frequency).expand(-1, x.shape[1], -1, -1)
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
