"""What the kernels of small CTAs share: without a producer, each issues its own copies, STAGES key tiles ahead.

BN keys of a tile, D head dim.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .compat import box, tma_load


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
