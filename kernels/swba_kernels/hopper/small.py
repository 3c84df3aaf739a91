"""What the kernels of small CTAs share: without a producer, each issues its own copies, STAGES key tiles ahead.

BN keys of a tile, D head dim.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .compat import box, cta_barrier, tma_load
from .weights import add_values


@gluon.jit
def small_buffers(q_desc, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Return buffers of 64 queries and of STAGES tiles of keys and values, and barriers that their copies complete."""
    TILES: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q = gl.allocate_shared_memory(q_desc.dtype, [64, D], TILES)
    k_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BN, D], TILES)
    v_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BN, D], TILES)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()
    return q, k_smem, v_smem, q_full, k_full, v_full


@gluon.jit
def expect_tile(tile, tiles, full, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Announce the copy of key tile `tile` of this CTA's `tiles`, if there is such a tile."""
    mbarrier.expect(full.index(tile % STAGES), BN * D * 2, pred=tile < tiles)


@gluon.jit
def copy_tile(desc, coordinates, tile, tiles, full, buffers, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Start the copy, announced before, of key tile `tile` of this CTA's `tiles` into its stage."""
    stage = tile % STAGES
    tma_load(desc, coordinates, full.index(stage), box(buffers.index(stage), BN, D), pred=tile < tiles)


@gluon.jit
def first_scores(q, k_smem, k_full, zero):
    """Return the scores of the first key tile, which every warp has then read."""
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, k_smem.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    cta_barrier()
    return s


@gluon.jit
def next_scores(
    q, p, acc, j, stage, last, tiles, k_smem, v_smem, k_full, v_full, zero,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Return the scores of key tile j, which has come to `stage`, and the accumulator with the tile before it.

    p are the weights of that one, in stage `last` are its values. Every warp has then read both stages, and the copies
    into them are announced.
    """
    s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(last), (j - 1) // STAGES & 1)
    acc = add_values(p, v_smem.index(last), acc)
    s, acc = warpgroup_mma_wait(0, deps=(s, acc))
    cta_barrier()
    expect_tile(j - 1 + STAGES, tiles, v_full, BN, D, STAGES)
    expect_tile(j + STAGES, tiles, k_full, BN, D, STAGES)
    return s, acc


@gluon.jit
def last_values(acc, p, v_smem, v_full, tiles, STAGES: gl.constexpr):
    """Return the accumulator with the values of the last of `tiles`, whose weights are p."""
    stage = (tiles - 1) % STAGES
    mbarrier.wait(v_full.index(stage), (tiles - 1) // STAGES & 1)
    acc = add_values(p, v_smem.index(stage), acc)
    return warpgroup_mma_wait(0, deps=(acc,))
