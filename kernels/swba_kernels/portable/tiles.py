"""Tile sizes of the portable kernels: fixed tables instead of autotuning, so that no call ever times a kernel.

M query rows and N key rows of a tile. Shared memory a block may use decides the family: 227 KB (sm_90, sm_100),
163 KB (sm_80, sm_87), 99 KB (sm_86, sm_89, sm_120 and anything unknown).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """A launch configuration: rows of the query tile, rows of the key tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class TilePlan(NamedTuple):
    """How a kernel cuts the sequence: groups of `group` tokens, `per_group` tiles in each, `tiles` in all."""

    group: int
    per_group: int
    tiles: int


def padded_head_dim(head_dim: int) -> int:
    """Return the power of two, at least 16, to which kernels pad the head dim."""
    return max(16, 1 << (head_dim - 1).bit_length())


def family(capability: tuple[int, int]) -> str:
    """Name the table for a compute capability."""
    if capability in ((9, 0), (10, 0), (10, 3)):
        return "large"
    return "medium" if capability in ((8, 0), (8, 7)) else "small"


# D 64 and 128 of "large" were the fastest of six or seven candidates each on an H200 (torch 2.11, triton 3.6.0); the
# others were chosen by registers, spills and shared memory of ahead-of-time compiles.
_HALF = {
    "forward": {
        "large": {64: Tile(128, 64, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(128, 32, 8, 2)},
        "medium": {64: Tile(128, 32, 4, 3), 128: Tile(64, 64, 4, 3), 256: Tile(64, 64, 8, 2)},
        "small": {64: Tile(128, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
    },
    "dkv": {
        "large": {64: Tile(64, 64, 4, 3), 128: Tile(64, 128, 8, 3), 256: Tile(32, 32, 4, 2)},
        "medium": {64: Tile(32, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 2)},
        "small": {64: Tile(32, 64, 4, 2), 128: Tile(32, 64, 4, 2), 256: Tile(16, 32, 4, 1)},
    },
    "dq": {
        "large": {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(32, 32, 4, 2)},
        "medium": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 4, 2)},
        "small": {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 16, 4, 1)},
    },
}

_SINGLE = {
    "forward": {64: Tile(32, 32, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
    "dkv": {64: Tile(32, 32, 8, 2), 128: Tile(16, 32, 8, 2), 256: Tile(16, 16, 8, 1)},
    "dq": {64: Tile(32, 32, 8, 2), 128: Tile(32, 16, 8, 2), 256: Tile(16, 16, 8, 1)},
}


def choose_tile(kernel: str, head_dim: int, itemsize: int, capability: tuple[int, int]) -> Tile:
    """Return the tile of `kernel` ("forward", "dkv", "dq") for a head dim, bytes per element and compute capability."""
    column = max(64, padded_head_dim(head_dim))
    return _SINGLE[kernel][column] if itemsize == 4 else _HALF[kernel][family(capability)][column]


@cache
def device_capability(index: int) -> tuple[int, int]:
    """Return the compute capability of CUDA device `index`."""
    return torch.cuda.get_device_capability(index)


def tile_for(kernel: str, x: torch.Tensor) -> Tile:
    """Return the tile of `kernel` for a tensor [B, H, N, D] (under the interpreter, on the CPU, a small one)."""
    if not x.is_cuda:
        return Tile(16, 16, 4, 1)
    return choose_tile(kernel, x.shape[-1], x.element_size(), device_capability(x.device.index))


@cache
def plan_tiles(n: int, block_size: int, window: int, grid_start: int, rows: int) -> TilePlan:
    """Cut `n` tokens into tiles of at most `rows` rows so that little is padded and few tiles straddle blocks.

    A tile never straddles a group of whole blocks. A group of one block means no element masks but up to `rows - 1`
    padded rows per block; a larger group pads less, and each tile inside it reads the union of what its blocks see.
    The plan with the fewest key columns per token wins; the shorter group wins a tie.
    """
    best, best_cost = 1, float("inf")
    for blocks in range(1, max(8, 2 * rows // block_size) + 1):
        tiles = -(-blocks * block_size // rows)
        columns = 0
        for t in range(tiles):
            last = min(blocks * block_size, (t + 1) * rows) - 1
            straddled = last // block_size - t * rows // block_size
            columns += window + straddled * block_size * 2
        if columns / blocks < 0.99 * best_cost:
            best, best_cost = blocks, columns / blocks
    group = best * block_size
    per_group = -(-group // rows)
    return TilePlan(group, per_group, -(-(n - grid_start) // group) * per_group)
