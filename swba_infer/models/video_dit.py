"""A small diffusion transformer over the frames of a video, steered by one action a frame.

L lanes, F frames, P tokens of a frame, N = F P tokens, H heads, D head dim, C channels of a token, E model width.

A token is a square patch of pixels, in [-1, 1]. Everything but `context.attend` works inside one frame, so what
a frame sees of the past is decided by the attention pattern alone. Conditioning enters as adaLN modulation, shared by
all layers up to a table per layer (adaLN-single, PixArt-alpha). The network's output is the clean frame itself: tokens
of 432 numbers are wider than the model, which could not carry their noise (Li and He 2025, "Back to basics").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import check_keys
from ..context import AttentionContext
from ..errors import ConfigError
from ..rope import grid_positions, rope_angles, rope_columns, turn_pairs

Turn = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoDiTConfig:
    """Sizes of a `VideoDiT`.

    Args:
        height, width: pixels of a frame; multiples of `patch`.
        patch: pixels of a token's side; a multiple of 4 (the convolutions work on cells of 4 x 4 pixels).
        channels: colour channels.
        dim, depth, heads, kv_heads: of the transformer; `kv_heads` 0 means `heads`.
        mlp: hidden width of the gated MLP.
        cell_dim: width of the convolutions before and behind the transformer.
        actions: number of actions; the index `actions` stands for an unknown one.
    """

    height: int = 72
    width: int = 96
    patch: int = 12
    channels: int = 3
    dim: int = 384
    depth: int = 10
    heads: int = 6
    kv_heads: int = 0
    mlp: int = 1024
    cell_dim: int = 64
    actions: int = 6

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low = 0 if field.name == "kv_heads" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"{field.name}: expected an int of at least {low}, got {value!r}")
        if self.patch % 4 or self.height % self.patch or self.width % self.patch:
            raise ConfigError(
                f"patch: expected a multiple of 4 that divides height {self.height} and width {self.width}, "
                f"got {self.patch}"
            )
        if self.dim % self.heads or (self.dim // self.heads) % 8:
            raise ConfigError(f"heads: expected dim / heads to be a multiple of 8, got {self.dim} / {self.heads}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ConfigError(f"kv_heads: expected a divisor of heads {self.heads}, got {self.kv_heads}")

    @property
    def rows(self) -> int:
        """Token rows of a frame."""
        return self.height // self.patch

    @property
    def columns(self) -> int:
        """Token columns of a frame."""
        return self.width // self.patch

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a frame."""
        return self.rows * self.columns

    @property
    def token_channels(self) -> int:
        """Numbers in a token."""
        return self.patch * self.patch * self.channels

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dict, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VideoDiTConfig:
        """Build from a dict such as `to_dict` returns; unknown keys raise ConfigError."""
        check_keys("model", cls, values)
        return cls(**values)


def patchify(frames: Tensor, patch: int) -> Tensor:
    """Cut uint8 frames [L, F, height, width, channels] into float32 tokens [L, N, C] in [-1, 1], row by row."""
    lanes, count, height, width, channels = frames.shape
    cells = frames.view(lanes, count, height // patch, patch, width // patch, patch, channels).transpose(3, 4)
    return cells.reshape(lanes, -1, patch * patch * channels).float() / 127.5 - 1


def unpatchify(tokens: Tensor, height: int, width: int, patch: int, channels: int = 3) -> Tensor:
    """Undo `patchify`: tokens [L, N, C] to uint8 frames [L, F, height, width, channels], rounded and clipped."""
    lanes = tokens.shape[0]
    cells = tokens.float().reshape(lanes, -1, height // patch, width // patch, patch, patch, channels).transpose(3, 4)
    pixels = (cells.reshape(lanes, -1, height, width, channels) + 1) * 127.5
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale)


class Block(nn.Module):
    """One transformer layer; `project` and `absorb` are everything but its attention, and what a trainer compiles."""

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.dim // config.heads
        self.qkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.qk_scale = nn.Parameter(torch.ones(self.heads + self.kv_heads, self.head_dim))
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.gate_up = nn.Linear(config.dim, 2 * config.mlp, bias=False)
        self.down = nn.Linear(config.mlp, config.dim, bias=False)
        self.modulation = nn.Parameter(torch.zeros(6, config.dim))

    def project(
        self, x: Tensor, modulation: Tensor, turn: Turn, sink_turn: Turn | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Map x [L, F, P, E] to q [L, H, N, D], k, v [L, Hkv, N, D] and, with `sink_turn`, q_sink [L, H, N, D].

        `modulation` [L, F, 1, 6, E] holds shift, scale and gate of the attention, then of the MLP; `turn` is the
        rotation of `turn_pairs`, and `sink_turn` that of the queries for the sinks.
        """
        shift, scale = modulation[..., :2, :].unbind(-2)
        qkv = self.qkv(_modulate(x, shift, scale)).flatten(1, 2).unflatten(-1, (-1, self.head_dim))
        # The values are normed and dropped: cheaper than the copy that the norm makes of q and k alone.
        qk = F.rms_norm(qkv, (self.head_dim,), eps=1e-6)[:, :, : -self.kv_heads] * self.qk_scale
        q, k = turn_pairs(qk, *turn).to(qkv.dtype).split((self.heads, self.kv_heads), dim=2)
        q_sink = None
        if sink_turn is not None:
            q_sink = turn_pairs(qk[:, :, : self.heads], *sink_turn).to(qkv.dtype).transpose(1, 2)
        return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, -self.kv_heads :].transpose(1, 2), q_sink

    def absorb(self, x: Tensor, attended: Tensor, modulation: Tensor) -> Tensor:
        """Add the attention's result [L, H, N, D] and then the MLP to x [L, F, P, E]."""
        gate, shift, scale, mlp_gate = modulation[..., 2:, :].unbind(-2)
        x = torch.addcmul(x, gate, self.out(attended.transpose(1, 2).flatten(2)).view_as(x))
        a, b = self.gate_up(_modulate(x, shift, scale)).chunk(2, dim=-1)
        return torch.addcmul(x, mlp_gate, self.down(F.silu(a) * b))

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
        return self.absorb(x, context.attend(layer, *self.project(x, modulation, turn, sink_turn)), modulation)


class VideoDiT(nn.Module):
    """Predict the clean frames from noisy ones, the past and the actions.

    Attributes that the engine reads: `layers`, `kv_heads`, `head_dim`.
    """

    CELL = 4
    ROPE_THETA = (1000.0, 100.0, 100.0)

    def __init__(self, config: VideoDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.layers, self.kv_heads = config.depth, config.kv_heads or config.heads
        self.head_dim = config.dim // config.heads
        pairs = self.head_dim // 2
        space = pairs * 5 // 16
        self.rope_dims = (2 * (pairs - 2 * space), 2 * space, 2 * space)
        self.per_side = config.patch // self.CELL
        cell_in = self.CELL * self.CELL * config.channels
        width, grouped = config.cell_dim, config.cell_dim * self.per_side**2

        self.stem_in = nn.Conv2d(cell_in, width, 3, padding=1)
        self.stem_out = nn.Conv2d(width, width, 3, padding=1)
        self.embed = nn.Linear(grouped, config.dim)
        self.time_in = nn.Linear(256, config.dim)
        self.time_out = nn.Linear(config.dim, config.dim)
        self.action = nn.Embedding(config.actions + 1, config.dim)
        self.action_token = nn.Linear(config.dim, config.dim, bias=False)
        self.condition = nn.Linear(config.dim, 6 * config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_modulation = nn.Linear(config.dim, 2 * config.dim + width)
        self.unembed = nn.Linear(config.dim, grouped)
        self.head_in = nn.Conv2d(2 * width, width, 3, padding=1)
        self.head_mid = nn.Conv2d(width, width, 3, padding=1)
        self.head_out = nn.Conv2d(width, cell_in, 3, padding=1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights; every residual branch and the output start at zero.

        Branches are closed by their last matrix and not by their gates, which would take long to open.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and not name.endswith(("modulation", "qk_scale")):
                nn.init.normal_(parameter, std=0.5 if name == "action.weight" else parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.out.weight)
            nn.init.zeros_(block.down.weight)
            nn.init.ones_(block.modulation[2])
            nn.init.ones_(block.modulation[5])
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.head_modulation.weight)
        nn.init.zeros_(self.head_out.weight)

    def forward(self, tokens: Tensor, context: AttentionContext, *, timestep: Tensor, action: Tensor) -> Tensor:
        """Return the prediction of the clean tokens [L, N, C].

        Args:
            tokens: noisy frames, (1 - t) clean + t noise, [L, N, C] with N a multiple of the tokens of a frame.
            context: where the model attends, and at which positions the tokens stand.
            timestep: noise level t in [0, 1], scalar, [L] or [L, F].
            action: int64 index of the action before each frame, scalar, [L] or [L, F].
        """
        lanes, count, _ = tokens.shape
        frames = count // self.config.tokens_per_frame
        t = _per_frame(timestep, lanes, frames).float()
        detail = self._stem(tokens)
        x = self.embed(self._group(detail)).unflatten(0, (lanes, frames))
        acted = self.action(_per_frame(action, lanes, frames))
        condition = self.time_out(F.silu(self.time_in(_sinusoid(t).to(x.dtype)))) + acted
        x = x + self.action_token(acted)[:, :, None]
        condition = F.silu(condition)
        modulation = self._modulation(condition)
        turn = self._turn(context.positions, x.dtype)
        sink_turn = None if context.sink_positions is None else self._turn(context.sink_positions, x.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, modulation[layer], turn, sink_turn, context, layer)

        return self._head(x, detail, self.head_modulation(condition)).to(tokens.dtype)

    def _turn(self, positions: Tensor, dtype: torch.dtype) -> Turn:
        """Return the rotation at positions [L, N], for all heads."""
        place = grid_positions(positions, self.config.rows, self.config.columns)
        return rope_columns(rope_angles(place, self.rope_dims, self.ROPE_THETA)[:, :, None], dtype)

    def _modulation(self, condition: Tensor) -> Tensor:
        """Map the condition [L, F, E] to the modulation of every layer [depth, L, F, 1, 6, E], at once."""
        tables = torch.stack([block.modulation for block in self.blocks])  # type: ignore[arg-type]
        modulation = self.condition(condition).unflatten(-1, (1, 6, -1)) + tables[:, None, None, None]
        modulation[..., 1::3, :].add_(1)  # the scales
        return modulation

    def _stem(self, tokens: Tensor) -> Tensor:
        """Map tokens to cell features [L F, cell_dim, height / 4, width / 4]."""
        size, cells = self.config, self.per_side
        x = tokens.reshape(-1, size.rows, size.columns, cells, self.CELL, cells, self.CELL * size.channels)
        x = x.permute(0, 1, 3, 2, 5, 4, 6).flatten(5).flatten(3, 4).flatten(1, 2)
        return self.stem_out(F.silu(self.stem_in(x.permute(0, 3, 1, 2))))

    def _group(self, cells: Tensor) -> Tensor:
        """Gather the cells of each token: [L F, cell_dim, ...] to [L F, P, grouped]."""
        x = cells.permute(0, 2, 3, 1).unflatten(2, (-1, self.per_side)).unflatten(1, (-1, self.per_side))
        return x.transpose(2, 3).flatten(3).flatten(1, 2)

    def _head(self, x: Tensor, detail: Tensor, modulation: Tensor) -> Tensor:
        """Map x [L, F, P, E] to tokens [L, N, C], with the stem's detail mixed in as the noise level allows."""
        size, cells, dim = self.config, self.per_side, self.config.dim
        modulation = modulation[:, :, None]
        shift, (scale, gate) = modulation[..., :dim], (1 + modulation[..., dim:]).split((dim, size.cell_dim), dim=-1)
        x = self.unembed(_modulate(x, shift, scale)).flatten(0, 1)
        x = x.view(-1, size.rows, size.columns, cells, cells, size.cell_dim).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        detail = detail * gate.reshape(-1, size.cell_dim, 1, 1)
        y = self.head_in(torch.cat((x.permute(0, 3, 1, 2), detail), dim=1))
        y = y + self.head_mid(F.silu(y))
        y = self.head_out(F.silu(y)).permute(0, 2, 3, 1)
        y = y.view(-1, size.rows, cells, size.columns, cells, self.CELL, self.CELL * size.channels)
        return y.permute(0, 1, 3, 2, 5, 4, 6).reshape(modulation.shape[0], -1, size.token_channels)


def compile_layers(model: VideoDiT) -> None:
    """Run what lies between the attention calls through torch.compile: one graph for the same half of every layer."""
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.project = torch.compile(block.project, dynamic=False)  # type: ignore[assignment]
        block.absorb = torch.compile(block.absorb, dynamic=False)  # type: ignore[assignment]
    model._stem = torch.compile(model._stem, dynamic=False)  # type: ignore[assignment]
    model._head = torch.compile(model._head, dynamic=False)  # type: ignore[assignment]


def _per_frame(value: Tensor, lanes: int, frames: int) -> Tensor:
    value = torch.as_tensor(value)
    return (value[:, None] if value.ndim == 1 else value).expand(lanes, frames)


def _sinusoid(t: Tensor) -> Tensor:
    fastest = math.log(300.0, 1000.0)
    frequency = torch.logspace(fastest, fastest - 1, 128, base=1000.0, dtype=torch.float64, device=t.device)
    angle = t[..., None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
