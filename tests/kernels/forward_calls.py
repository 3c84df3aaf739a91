"""Calls of the Hopper forward, and rings for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swba_kernels import BlockWindow, reference


def call(q: Tensor, k: Tensor, v: Tensor, pattern: BlockWindow, scale: float | None = None, **options):
    from swba_kernels.hopper.forward import forward

    return forward(
        q, k, v, scale=q.shape[-1] ** -0.5 if scale is None else scale, block_size=pattern.block_size,
        window=pattern.window, sink=pattern.sink, grid_start=pattern.grid_start, **options,
    )  # fmt: skip


def equal_rows(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], rows: slice) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.isfinite(x[:, :, rows]).all()
        assert torch.equal(x[:, :, rows], y[:, :, rows])


def ring_of(pattern: BlockWindow, positions: list[int], kv_heads: int, head_dim: int, dtype, spare: int):
    """Return rings [L, Hkv, S, D] whose lanes have seen that many tokens; what was never written is NaN."""
    slots = pattern.sink + pattern.window + spare
    rings = torch.full((2, len(positions), kv_heads, slots, head_dim), math.nan, device="cuda", dtype=dtype)
    for lane, position in enumerate(positions):
        _, filled = reference.ring_layout(position, slots, pattern.sink)
        rings[:, lane, :, filled] = torch.randn(2, kv_heads, len(filled), head_dim, device="cuda", dtype=dtype)
    return rings


def items_of(n: int, pattern: BlockWindow, head_dim: int, heads: int) -> int:
    """Return how many work items a row of such a prefill has."""
    from swba_kernels.hopper.forward import choose_config
    from swba_kernels.hopper.forward_plan import plan_forward

    block = pattern.block_size
    config, _ = choose_config(head_dim, min(block, n), pattern.window + pattern.sink, True, False)
    return heads * plan_forward(n, block, 0, 0, pattern.grid_start, config.groups * 64).tiles
