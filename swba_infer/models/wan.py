"""Wan's text-to-video transformer, made causal: a block of frames sees itself and what the stream keeps of its past.

L lanes, F frames, P tokens of a frame, N = F P tokens, H heads, D head dim, E = H D model width, T text tokens,
C latent channels, p patch size.

The architecture is that of Wan 2.1 (Wan Team 2025) as few-step causal students of it are trained (CausVid,
Self-Forcing): parameters have the names of diffusers' `WanTransformer3DModel`. The network predicts the flow
noise - clean. Residuals are kept in the model's dtype; norms, modulation, RoPE and the time embedding are computed in
float32. Rotary angles come from absolute positions, so a stream has no length limit. Where sinks stay at a bounded
distance, queries are turned a second time, for the sinks alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..context import AttentionContext
from ..errors import StreamStateError
from ..rope import grid_positions, rope_angles, rope_columns, turn_pairs
from .wan_config import WanConfig

Turn = tuple[Tensor, Tensor]

# Parameters that stay in float32 when the model runs in half precision: they are small, and what they scale is not.
_WIDE = ("scale_shift_table", "time_embedder", "time_proj", "norm2", "norm_q", "norm_k")


def patchify(latents: Tensor, patch: int = 2) -> Tensor:
    """Cut latents [L, C, F, height, width] into tokens [L, N, C p p], frame by frame and row by row."""
    lanes, channels, frames, height, width = latents.shape
    cells = latents.reshape(lanes, channels, frames, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 3, 5, 1, 4, 6).reshape(lanes, -1, channels * patch * patch)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int = 2) -> Tensor:
    """Undo `patchify`: tokens [L, N, C p p] to latents [L, C, F, height, width]."""
    lanes, _, numbers = tokens.shape
    channels = numbers // (patch * patch)
    cells = tokens.reshape(lanes, -1, height // patch, width // patch, channels, patch, patch)
    return cells.permute(0, 4, 1, 2, 5, 3, 6).reshape(lanes, channels, -1, height, width)


class Attention(nn.Module):
    """The projections of one attention, and its norms over the full width of queries and keys."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)


class GELULayer(nn.Module):
    """A linear layer and a GELU, by its tanh approximation."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to [..., hidden]."""
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """The two layers behind the attentions; the places in `net` are diffusers' (its second is a dropout)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GELULayer(dim, hidden), nn.Identity(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., dim] to [..., dim]."""
        return self.net(x)


class TwoLayers(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, given: int, dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1, self.activation, self.linear_2 = nn.Linear(given, dim), activation, nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., given] to [..., dim]."""
        return self.linear_2(self.activation(self.linear_1(x)))


class ConditionEmbedder(nn.Module):
    """What turns timesteps and text into the model's width."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.time_embedder = TwoLayers(config.freq_dim, config.dim, nn.SiLU())
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = TwoLayers(config.text_dim, config.dim, nn.GELU(approximate="tanh"))


class WanBlock(nn.Module):
    """One transformer layer; `project` and `absorb` are everything but its self-attention, and what gets compiled."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head_dim, self.eps = config.attention_head_dim, config.eps
        self.attn1, self.attn2 = Attention(config.dim, config.eps), Attention(config.dim, config.eps)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def project(
        self, x: Tensor, modulation: Tensor, turn: Turn, sink_turn: Turn | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Map x [L, F, P, E] to q, k, v and, with `sink_turn`, q_sink, each [L, H, N, D].

        `modulation` is [L, F, 1, 6, E].
        """
        shift, scale = (modulation[..., :2, :] + self.scale_shift_table[:, :2]).unbind(-2)
        h = _modulate(x, shift, scale, self.eps).flatten(1, 2)
        attn = self.attn1
        q, k = _rms_norm(attn.to_q(h), attn.norm_q), _rms_norm(attn.to_k(h), attn.norm_k)

        def turned(y: Tensor, by: Turn) -> Tensor:
            return turn_pairs(y.unflatten(-1, (-1, self.head_dim)), *by).to(x.dtype).transpose(1, 2)

        q_sink = None if sink_turn is None else turned(q, sink_turn)
        return turned(q, turn), turned(k, turn), self._heads(attn.to_v(h)), q_sink

    def absorb(self, x: Tensor, attended: Tensor, modulation: Tensor, text_k: Tensor, text_v: Tensor) -> Tensor:
        """Add self-attention's result [L, H, N, D], then attention to text_k, text_v [L, H, T, D], then the MLP."""
        gate, shift, scale, mlp_gate = (modulation[..., 2:, :] + self.scale_shift_table[:, 2:]).unbind(-2)
        x = _gated_add(x, self.attn1.to_out[0](attended.transpose(1, 2).flatten(2)).view_as(x), gate)
        q = _rms_norm(self.attn2.to_q(self._norm_cross(x).flatten(1, 2)), self.attn2.norm_q).to(x.dtype)
        read = F.scaled_dot_product_attention(self._heads(q), text_k, text_v)
        x = x + self.attn2.to_out[0](read.transpose(1, 2).flatten(2)).view_as(x)
        return _gated_add(x, self.ffn(_modulate(x, shift, scale, self.eps)), mlp_gate)

    def text_keys(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Map embedded text [L, T, E] to the keys and values [L, H, T, D] of cross-attention."""
        k = _rms_norm(self.attn2.to_k(text), self.attn2.norm_k).to(text.dtype)
        return self._heads(k), self._heads(self.attn2.to_v(text))

    def _norm_cross(self, x: Tensor) -> Tensor:
        if not isinstance(self.norm2, nn.LayerNorm):
            return x
        weight, bias = _wide(self.norm2.weight), _wide(self.norm2.bias)
        return F.layer_norm(_wide(x), weight.shape, weight, bias, self.eps).to(x.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        turn: Turn,
        sink_turn: Turn | None,
        context: AttentionContext,
        layer: int,
    ) -> Tensor:
        """Run the layer on x [L, F, P, E]."""
        attended = context.attend(layer, *self.project(x, modulation, turn, sink_turn))
        text_k, text_v = context.state["text_k"][:, layer], context.state["text_v"][:, layer]
        return self.absorb(x, attended, modulation, text_k, text_v)


class WanTransformer(nn.Module):
    """Predict the flow from noisy latents to noise, given the past and a prompt.

    Attributes that the engine reads: `layers`, `kv_heads`, `head_dim`. The prompt is lane state: write what
    `encode_prompt` returns with `engine.set_state` before the first step; a reset lane has none. `place` moves a model
    and casts what may be cast; give the engine no dtype, which would cast all of it.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        self.layers, self.kv_heads = config.num_layers, config.num_attention_heads
        self.head_dim = config.attention_head_dim
        patch = (1, config.patch, config.patch)
        self.patch_embedding = nn.Conv3d(config.channels, config.dim, patch, stride=patch)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList(WanBlock(config) for _ in range(config.num_layers))
        self.proj_out = nn.Linear(config.dim, config.token_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, tokens: Tensor, context: AttentionContext, *, timestep: Tensor) -> Tensor:
        """Return the predicted flow, noise - clean, of each token [L, N, C p p].

        Args:
            tokens: noisy latents as `patchify` cuts them, with N a multiple of the tokens of a frame.
            context: where the model attends, at which positions the tokens stand, and the keys of the prompt.
            timestep: 1000 times the noise level; 0 for clean frames. Scalar, [L] or [L, F].

        Raises:
            StreamStateError: tokens or timesteps do not fit the model.
        """
        lanes, frames = self._check_tokens(tokens)
        dtype = self.proj_out.weight.dtype
        x = F.linear(tokens.to(dtype), self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        x = x.unflatten(1, (frames, -1))
        condition = self._embed_time(_per_frame(timestep, lanes, frames))
        modulation = self.condition_embedder.time_proj(F.silu(condition)).unflatten(-1, (1, 6, -1))
        turn = self._turn(context.positions)
        sink_turn = None if context.sink_positions is None else self._turn(context.sink_positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, modulation, turn, sink_turn, context, layer)
        return self._head(x, condition).to(tokens.dtype)

    def encode_prompt(self, text: Tensor) -> dict[str, Tensor]:
        """Return the lane state of a prompt: keys and values of every layer's cross-attention, [L, layers, H, T, D].

        Args:
            text: the text encoder's output [L, T, text_dim] with T up to `text_len`; it is padded with zeros, which
                are attended like text, as Wan was trained.
        """
        size = self.config
        if text.ndim != 3 or not 1 <= text.shape[1] <= size.text_len or text.shape[2] != size.text_dim:
            raise StreamStateError(
                f"text: expected [lanes, 1 to {size.text_len}, {size.text_dim}], got {list(text.shape)}"
            )
        embedder = self.condition_embedder.text_embedder
        text = text.to(embedder.linear_1.weight)
        x = embedder(F.pad(text, (0, 0, 0, size.text_len - text.shape[1])))
        pairs = [block.text_keys(x) for block in self.blocks if isinstance(block, WanBlock)]
        assert len(pairs) == self.layers
        return {"text_k": torch.stack([k for k, _ in pairs], 1), "text_v": torch.stack([v for _, v in pairs], 1)}

    def lane_state(self, lanes: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Return room for the prompts of `lanes` streams."""
        shape = (lanes, self.layers, self.kv_heads, self.config.text_len, self.head_dim)
        return {name: torch.empty(shape, dtype=dtype, device=device) for name in ("text_k", "text_v")}

    def place(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> WanTransformer:
        """Move the model; in half precision norms, modulation and time embedding stay float32 (`to` casts all)."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(device=device, dtype=dtype and parameter_dtype(name, dtype))
        return self

    def _turn(self, positions: Tensor) -> Turn:
        """Return the columns of the rotations at positions [L, N], each [L, N, 1, D / 2, 2]."""
        coordinates = grid_positions(positions, self.config.rows, self.config.columns)
        angles = rope_angles(coordinates, self.config.rope_dims)[:, :, None]
        return rope_columns(angles, angles.dtype)

    def _check_tokens(self, tokens: Tensor) -> tuple[int, int]:
        lanes, count, numbers = tokens.shape
        size = self.config
        if count % size.tokens_per_frame or numbers != size.token_channels:
            raise StreamStateError(
                f"tokens: expected [lanes, a multiple of {size.tokens_per_frame}, {size.token_channels}] for latents "
                f"of {size.channels} x {size.latent_height} x {size.latent_width}, got {list(tokens.shape)}"
            )
        return lanes, count // size.tokens_per_frame

    def _embed_time(self, timestep: Tensor) -> Tensor:
        """Map timesteps [L, F] to [L, F, E] in float32; their sinusoids are taken in float64."""
        half = self.config.freq_dim // 2
        frequency = 10000.0 ** (-torch.arange(half, device=timestep.device, dtype=torch.float64) / half)
        angle = timestep.double()[..., None] * frequency
        embedder = self.condition_embedder.time_embedder
        return embedder(torch.cat((angle.cos(), angle.sin()), dim=-1).to(embedder.linear_1.weight.dtype))

    def _head(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map x [L, F, P, E] to tokens [L, N, C p p]: the layer puts a token's channels last, `patchify` first."""
        shift, scale = (condition[:, :, None, None] + self.scale_shift_table).unbind(-2)
        out = self.proj_out(_modulate(x, shift, scale, self.config.eps).flatten(1, 2))
        return out.unflatten(-1, (-1, self.config.channels)).transpose(2, 3).flatten(2)


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a parameter of a model that runs in `dtype`: float32 for norms, modulation and time."""
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return torch.float32 if any(part in _WIDE for part in name.split(".")) else dtype


def compile_layers(model: WanTransformer) -> None:
    """Run what lies between the attention calls through torch.compile: one graph for the same half of every layer."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.project = torch.compile(block.project, dynamic=False)  # type: ignore[assignment]
        block.absorb = torch.compile(block.absorb, dynamic=False)  # type: ignore[assignment]
    model._head = torch.compile(model._head, dynamic=False)  # type: ignore[assignment]


def _per_frame(timestep: Tensor, lanes: int, frames: int) -> Tensor:
    timestep = torch.as_tensor(timestep)
    if tuple(timestep.shape) not in ((), (lanes,), (lanes, frames)):
        raise StreamStateError(
            f"timestep: expected a scalar, [{lanes}] or [{lanes}, {frames}], got {list(timestep.shape)}"
        )
    return (timestep[:, None] if timestep.ndim == 1 else timestep).expand(lanes, frames)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    return F.rms_norm(_wide(x), x.shape[-1:], _wide(norm.weight), norm.eps)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return (F.layer_norm(_wide(x), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


def _gated_add(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return (_wide(x) + _wide(branch) * gate).to(x.dtype)
