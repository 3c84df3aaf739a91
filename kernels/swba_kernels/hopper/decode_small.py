"""Decode for blocks that do not fill the GPU: 64 query rows and one part of the keys per CTA, several CTAs per SM.

B rows of the call, L ring lanes, H query heads, Hkv key/value heads, N queries, S ring slots, D head dim.

Nothing is looked up but `valid` and `lanes`, and the CTAs that share a multiprocessor hide each other's waits, so the
CTAs need no producer: each issues its own copies, STAGES key tiles ahead. Key tiles are counted as in
decode_persistent.py, back from the end of the filled slots.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .compat import allow_dependents, await_prerequisites, box, cta_barrier, tma_load, tma_store
from .decode_plan import key_tiles_of_part
from .softmax import first_weights, next_weights, rescale


@gluon.jit
def _expect(tile, tiles, full, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Announce the copy of key tile `tile` of this CTA's `tiles`, if there is such a tile."""
    mbarrier.expect(full.index(tile % STAGES), BN * D * 2, pred=tile < tiles)


@gluon.jit
def _copy(desc, at, tile, tiles, full, buffers, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Start the copy, announced before, of key tile `tile` of this CTA's `tiles` into its stage."""
    lane, i_kv, slot = at
    stage = tile % STAGES
    coordinates = [lane, i_kv, slot + tile * BN, 0]
    tma_load(desc, coordinates, full.index(stage), box(buffers.index(stage), BN, D), pred=tile < tiles)


@gluon.jit
def _loop(
    q, k_desc, v_desc, at, tiles, k_smem, v_smem, k_full, v_full, scale2,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Run over the key tiles, whose first STAGES copies are under way; return accumulator, softmax top and total.

    The matmul O += P V of a tile is issued behind the scores of the next one and runs while their softmax is computed.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    slot = at[2]
    zero = gl.zeros([64, BN], gl.float32, SCORES)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, k_smem.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    cta_barrier()
    _expect(STAGES, tiles, k_full, BN, D, STAGES)
    _copy(k_desc, at, STAGES, tiles, k_full, k_smem, BN, D, STAGES)
    exists = gl.arange(0, BN, layout=gl.SliceLayout(0, SCORES)) + slot >= 0
    weights, top, total = first_weights(gl.where(exists[None, :], s, float("-inf")), scale2)
    p = gl.convert_layout(weights.to(q.dtype), WEIGHTS, assert_trivial=True)
    acc = gl.zeros([64, D], gl.float32, ACC)
    for j in range(1, tiles):
        stage = j % STAGES
        last = (j - 1) % STAGES
        if j == 1:
            mbarrier.wait(k_full.index(stage), j // STAGES & 1)
        s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(last), (j - 1) // STAGES & 1)
        acc = warpgroup_mma(p, v_smem.index(last), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        weights, top, total, fade = next_weights(s, top, total, scale2)
        # This wait ends a basic block: without it ptxas moves the next one, for the values, before the exponentials.
        mbarrier.wait(k_full.index((j + 1) % STAGES), (j + 1) // STAGES & 1, pred=j + 1 < tiles)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        cta_barrier()
        _expect(j - 1 + STAGES, tiles, v_full, BN, D, STAGES)
        _expect(j + STAGES, tiles, k_full, BN, D, STAGES)
        _copy(v_desc, at, j - 1 + STAGES, tiles, v_full, v_smem, BN, D, STAGES)
        _copy(k_desc, at, j + STAGES, tiles, k_full, k_smem, BN, D, STAGES)
        acc = rescale(acc, fade)
        p = gl.convert_layout(weights.to(q.dtype), WEIGHTS, assert_trivial=True)
    # Not earlier: CTAs of the merge would crowd the first multiprocessors that this kernel leaves.
    allow_dependents()
    mbarrier.wait(v_full.index((tiles - 1) % STAGES), (tiles - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_smem.index((tiles - 1) % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc, top, total


@gluon.jit(
    do_not_specialize=[
        "heads", "group", "n", "slots", "splits", "stride_valid", "stride_lanes",
    ],
    do_not_specialize_on_alignment=["p_valid", "p_lanes"],
)  # fmt: skip
def decode_small(
    q_desc, k_desc, v_desc, out_desc, p_lse, p_part, p_part_lse, p_valid, p_lanes,
    heads, group, n, slots, splits, stride_valid, stride_lanes, scale2,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HAS_LANES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Own one of `splits` parts of the keys of one query tile; write the output, or if cut the workspace.

    Programs: parts of the tiles of a head, heads, rows of the call.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
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
    # What can be is done before the wait. A barrier whose copy is not made after all is never waited for.
    mbarrier.expect(q_full, 64 * D * 2)
    for i in gl.static_range(STAGES):
        mbarrier.expect(k_full.index(i), BN * D * 2)
        mbarrier.expect(v_full.index(i), BN * D * 2)
    i_split = gl.program_id(0) % splits
    i_n = gl.program_id(0) // splits * 64
    i_h = gl.program_id(1)
    i_b = gl.program_id(2)
    unit = (i_b * heads + i_h) * gl.num_programs(0) + gl.program_id(0)
    await_prerequisites()
    valid = gl.minimum(gl.load(p_valid + i_b.to(gl.int64) * stride_valid), slots).to(gl.int32)
    if HAS_LANES:
        lane = gl.load(p_lanes + i_b.to(gl.int64) * stride_lanes).to(gl.int32)
    else:
        lane = i_b
    tma_load(q_desc, [i_b, i_h, i_n, 0], q_full, box(q, 64, D))
    first, last = key_tiles_of_part(i_split, i_split + 1, valid, splits, BN)
    tiles = last - first
    at = (lane, i_h // group, valid - last * BN)
    for i in gl.static_range(STAGES):
        _copy(k_desc, at, i, tiles, k_full, k_smem, BN, D, STAGES)
        _copy(v_desc, at, i, tiles, v_full, v_smem, BN, D, STAGES)
    mbarrier.wait(q_full, 0)
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    unit_rows = unit.to(gl.int64) * 64
    if tiles == 0:
        allow_dependents()
        if splits > 1:
            gl.store(p_part_lse + unit_rows + rows, gl.full([64], float("-inf"), gl.float32, rows.type.layout))
    else:
        acc, top, total = _loop(q, k_desc, v_desc, at, tiles, k_smem, v_smem, k_full, v_full, scale2, BN, D, STAGES)
        lse = top + gl.log2(total)
        acc = acc * (1.0 / gl.convert_layout(total, gl.SliceLayout(1, ACC), assert_trivial=True))[:, None]
        if splits == 1:
            p_row = p_lse + (i_b * heads + i_h).to(gl.int64) * n + i_n
            gl.store(p_row + rows, lse * 0.6931471805599453, mask=rows + i_n < n)
            q.store(acc.to(q.dtype))
            fence_async_shared()
            tma_store(out_desc, [i_b, i_h, i_n, 0], box(q, 64, D))
            tma.store_wait(0)
        else:
            gl.store(p_part_lse + unit_rows + rows, lse)
            part_rows = gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
            columns = gl.arange(0, D, layout=gl.SliceLayout(0, ACC))
            gl.store(p_part + unit_rows * D + (part_rows[:, None] * D + columns[None, :]), acc)
