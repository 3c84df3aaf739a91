"""Rotary positions in several axes, computed from absolute positions: no table, so a stream has no length limit.

Pairs are interleaved: channels 2i and 2i + 1 turn together by the angle of pair i. Each axis (for video: time, row,
column) owns a slice of the pairs, as in Wan's transformer.

L lanes, H heads, N tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ConfigError


def rope_angles(coordinates: Sequence[Tensor], dims: Sequence[int], theta: Sequence[float] | float = 10000.0) -> Tensor:
    """Return the angle of every channel pair, reduced to [-pi, pi].

    Pair i of an axis with d channels turns by `coordinate * theta ** (-2 i / d)`. The product and its reduction are
    done in float64: the error stays below 1e-4 up to position 10**12.

    Args:
        coordinates: one integer tensor an axis, all of the same shape [...].
        dims: channels of each axis, even numbers; their sum is the head dim D.
        theta: base of each axis, or one for all.

    Returns:
        float32 angles [..., D / 2], the axes side by side.

    Raises:
        ConfigError: the arguments do not fit together.
    """
    bases = [float(theta)] * len(dims) if isinstance(theta, (int, float)) else [float(base) for base in theta]
    if not len(coordinates) == len(dims) == len(bases):
        raise ConfigError(
            f"dims: expected one entry an axis, got {len(coordinates)} coordinates, {len(dims)} dims "
            f"and {len(bases)} bases"
        )
    if any(dim < 0 or dim % 2 for dim in dims):
        raise ConfigError(f"dims: expected even numbers, got {tuple(dims)}")
    parts = []
    for coordinate, dim, base in zip(coordinates, dims, bases, strict=True):
        last = (2 - dim) / dim if dim else 0.0
        rates = torch.logspace(0, last, dim // 2, base=base, dtype=torch.float64, device=coordinate.device)
        parts.append(coordinate[..., None] * rates)
    turns = torch.cat(parts, dim=-1) * (0.5 / torch.pi)
    return ((turns - turns.round()) * (2 * torch.pi)).float()


def rope_columns(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the two columns of each pair's rotation matrix, [..., D / 2, 2], for `turn_pairs`."""
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((cos, sin, -sin, cos), dim=-1).to(dtype).split(2, dim=-1)  # type: ignore[return-value]


def turn_pairs(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Turn the interleaved channel pairs of `x` [..., D] by the columns that `rope_columns` returns."""
    even, odd = x.unflatten(-1, (-1, 2)).split(1, dim=-1)
    return torch.addcmul(even * first, odd, second).flatten(-2)


def grid_positions(positions: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split absolute token positions [L, N] into frame, row and column, for frames of `rows` x `columns` tokens."""
    frame = torch.div(positions, rows * columns, rounding_mode="floor")
    row = torch.div(positions % (rows * columns), columns, rounding_mode="floor")
    return frame, row, positions % columns
