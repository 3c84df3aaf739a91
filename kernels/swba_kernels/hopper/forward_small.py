"""Forward for small blocks at head dim 64: 64 query rows a CTA, cut without regard to blocks, and several CTAs per SM.

B batch, H query heads, Hkv key/value heads, N tokens, D head dim, BN keys of a tile.

In forward.py blocks smaller than a tile would leave rows idle, or meet many keys that few rows see. Here a row r sees
its own range of keys, [low(r), end(r)). For blocks below BN tokens the ranges of 64 rows begin and end less than BN
keys apart, so edges need masks in three tiles at most: the first one, which ends where the last row's range ends, and
the last two, of which the last begins where the first row's range begins. The tiles between are seen by all rows. As in
decode_small.py, CTAs that share a multiprocessor hide each other's waits, so a CTA needs no producer: it issues its own
copies, STAGES key tiles ahead.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from .assembler import own_assembler
from .compat import box, tma_load, tma_store
from .forward_consumer import clear_rows
from .forward_plan import block_end
from .pipeline import counting
from .small import copy_tile, expect_tile, first_scores, last_values, next_scores, small_buffers
from .softmax import first_weights, next_weights, rescale, row_state

KEYS = 128  # of a tile; blocks, or else the whole sequence, have to be smaller


def serves(head_dim: int, block_size: int, n: int, sink: int) -> bool:
    """Tell whether this kernel is the one for a call of `n` tokens without a ring."""
    return head_dim == 64 and min(block_size, n) < KEYS and sink == 0


@gluon.jit
def start_of(tile, tiles, first, end, BN):
    """Return the first key of a tile: they follow each other backwards from `end`, but the last begins at `first`.

    So it overlaps the one before it. A tile that is the only one may reach below `first`.
    """
    return end - BN if tiles == 1 else (first if tile == tiles - 1 else end - (tile + 1) * BN)


@gluon.jit
def is_low_edge(tile, tiles):
    """Tell whether a tile reaches below the range of the last row, so that not all rows see all of it."""
    return tile >= tiles - 2


@gluon.jit
def stop_of(tile, end, BN):
    """Return the end of the keys that a tile is the first to hold."""
    return end - tile * BN


@gluon.jit
def unseen_of(first, end, BN):
    """Return how many keys of the only tile lie below `first`; if there are more tiles, a number below 1."""
    return BN - (end - first)


@gluon.jit
def _copy(desc, at, tile, tiles, full, buffers, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Start the copy, announced before, of key tile `tile` of this CTA's `tiles` into its stage."""
    i_b, i_kv, first, end = at
    coordinates = [i_b, i_kv, start_of(tile, tiles, first, end, BN), 0]
    copy_tile(desc, coordinates, tile, tiles, full, buffers, BN, D, STAGES)


@gluon.jit
def _loop(
    q, lows, ends, count_smem, k_desc, v_desc, at, tiles, k_smem, v_smem, k_full, v_full, scale2,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Run over the key tiles, whose first STAGES copies are under way; return accumulator, softmax top and total."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    _, _, first, end = at
    zero = gl.zeros([64, BN], gl.float32, SCORES)
    s = first_scores(q, k_smem, k_full, zero)
    expect_tile(STAGES, tiles, k_full, BN, D, STAGES)
    _copy(k_desc, at, STAGES, tiles, k_full, k_smem, BN, D, STAGES)
    key = end - BN + count_smem.load(COLUMNS)[None, :]
    s = gl.where((key >= lows[:, None]) & (key < ends[:, None]), s, float("-inf"))
    p, top, total = first_weights(s, scale2, q.dtype)
    if unseen_of(first, end, BN) > 0:  # 0 * NaN would be NaN
        mbarrier.wait(v_full.index(0), 0)
        clear_rows(v_smem.index(0), unseen_of(first, end, BN))
    acc = gl.zeros([64, D], gl.float32, ACC)
    for j in range(1, tiles):
        stage = j % STAGES
        last = (j - 1) % STAGES
        mbarrier.wait(k_full.index(stage), j // STAGES & 1)
        s, acc = next_scores(q, p, acc, j, stage, last, tiles, k_smem, v_smem, k_full, v_full, zero, BN, D, STAGES)
        _copy(v_desc, at, j - 1 + STAGES, tiles, v_full, v_smem, BN, D, STAGES)
        _copy(k_desc, at, j + STAGES, tiles, k_full, k_smem, BN, D, STAGES)
        if is_low_edge(j, tiles):
            key = start_of(j, tiles, first, end, BN) + count_smem.load(COLUMNS)[None, :]
            s = gl.where((key >= lows[:, None]) & (key < stop_of(j, end, BN)), s, float("-inf"))
        p, top, total, fade = next_weights(s, top, total, scale2, q.dtype)
        acc = rescale(acc, fade)
    return last_values(acc, p, v_smem, v_full, tiles, STAGES), top, total


@own_assembler
@gluon.jit(do_not_specialize=["heads", "group", "n", "block_size", "window", "grid_start"])
def forward_small(
    q_desc, k_desc, v_desc, out_desc, p_lse, scale2, heads, group, n, block_size, window, grid_start,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Own 64 query rows. Programs go through the tiles of one head after the other, from the last tile to the first."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    count_smem = counting(BN)
    q, k_smem, v_smem, q_full, k_full, v_full = small_buffers(q_desc, BN, D, STAGES)
    tiles_of_head = (n + 63) // 64
    i_bh = gl.program_id(0) // tiles_of_head
    i_b = i_bh // heads
    i_h = i_bh % heads
    row = (tiles_of_head - 1 - gl.program_id(0) % tiles_of_head) * 64
    first = max(min(block_end(row, block_size, grid_start), n) - window, 0)
    end = min(block_end(row + 63, block_size, grid_start), n)
    tiles = (end - first + BN - 1) // BN
    at = (i_b, i_h // group, first, end)
    mbarrier.expect(q_full, 64 * D * 2)
    tma_load(q_desc, [i_b, i_h, row, 0], q_full, box(q, 64, D))
    for i in gl.static_range(STAGES):
        expect_tile(i, tiles, k_full, BN, D, STAGES)
        _copy(k_desc, at, i, tiles, k_full, k_smem, BN, D, STAGES)
        expect_tile(i, tiles, v_full, BN, D, STAGES)
        _copy(v_desc, at, i, tiles, v_full, v_smem, BN, D, STAGES)
    rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    ends = gl.minimum(block_end(rows, block_size, grid_start), n)
    mbarrier.wait(q_full, 0)
    acc, top, total = _loop(
        q, gl.maximum(ends - window, 0), ends, count_smem, k_desc, v_desc, at, tiles, k_smem, v_smem, k_full, v_full,
        scale2, BN, D, STAGES,
    )  # fmt: skip
    top, total = row_state(top, total, gl.SliceLayout(1, SCORES))
    lse = (top + gl.log2(total)) * 0.6931471805599453
    gl.store(p_lse + i_bh.to(gl.int64) * n + rows, lse, mask=rows < n)
    share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, ACC), assert_trivial=True)
    q.store((acc * share[:, None]).to(q.dtype))
    fence_async_shared()
    tma_store(out_desc, [i_b, i_h, row, 0], box(q, 64, D))
    tma.store_wait(0)
