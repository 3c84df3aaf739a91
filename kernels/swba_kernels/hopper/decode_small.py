"""Decode for blocks that do not fill the GPU: 64 query rows and one part of the keys per CTA, several CTAs per SM.

B rows of the call, L ring lanes, H query heads, Hkv key/value heads, N queries, S ring slots, D head dim.

Nothing is looked up but `valid` and `lanes`, and the CTAs that share a multiprocessor hide each other's waits, so the
CTAs need no producer: each issues its own copies, STAGES key tiles ahead. Key tiles are counted as in
decode_persistent.py, back from the end of the filled slots; where sinks are read by queries of their own (Q_SINK), a
CTA that meets both kinds of tiles replaces its queries in between.
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
from .compat import allow_dependents, await_prerequisites, box, tma_load, tma_store
from .decode_plan import key_tiles_of_part, runs_of_part
from .pipeline import counting
from .small import copy_tile, expect_tile, first_scores, last_values, next_scores, small_buffers
from .softmax import first_weights, hide_first, next_weights, rescale, row_state


@gluon.jit
def _copy(desc, at, tile, tiles, full, buffers, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Start the copy, announced before, of key tile `tile` of this CTA's `tiles` into its stage."""
    lane, i_kv, slot, sinks, slot_after = at
    coordinates = [lane, i_kv, gl.where(tile < sinks, slot, slot_after) + tile * BN, 0]
    copy_tile(desc, coordinates, tile, tiles, full, buffers, BN, D, STAGES)


@gluon.jit
def _replace_queries(queries, needed):
    """Start the copy of the window's queries over those of the sinks, which every warp has read, if `needed`."""
    q, q_full, q_desc, row = queries
    i_b, i_h, i_n = row
    mbarrier.expect(q_full, q.shape[0] * q.shape[1] * 2, pred=needed)
    tma_load(q_desc, [i_b, i_h, i_n, 0], q_full, box(q, q.shape[0], q.shape[1]), pred=needed)


@gluon.jit
def _loop(
    queries, k_desc, v_desc, at, tiles, behind, k_smem, v_smem, k_full, v_full, count_smem, scale2,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_SINK: gl.constexpr,
):  # fmt: skip
    """Run over the key tiles, whose first STAGES copies are under way; return accumulator, softmax top and total.

    The matmul O += P V of a tile is issued behind the scores of the next one, and both end before their softmax begins:
    other CTAs fill that wait, and the copies into what was read start earlier.
    `behind` says how far the first tile, and the first one after the sinks, lie behind the lowest slot that counts.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    q, q_full, _, _ = queries
    sinks = at[3]
    zero = gl.zeros([64, BN], gl.float32, SCORES)
    s = first_scores(q, k_smem, k_full, zero)
    expect_tile(STAGES, tiles, k_full, BN, D, STAGES)
    _copy(k_desc, at, STAGES, tiles, k_full, k_smem, BN, D, STAGES)
    if Q_SINK:
        _replace_queries(queries, (sinks == 1) & (tiles > 1))
    p, top, total = first_weights(hide_first(s, behind[0]), scale2, q.dtype)
    acc = gl.zeros([64, D], gl.float32, ACC)
    for j in range(1, tiles):
        stage = j % STAGES
        last = (j - 1) % STAGES
        mbarrier.wait(k_full.index(stage), j // STAGES & 1)
        if Q_SINK:
            mbarrier.wait(q_full, 1, pred=j == sinks)
        s, acc = next_scores(q, p, acc, j, stage, last, tiles, k_smem, v_smem, k_full, v_full, zero, BN, D, STAGES)
        _copy(v_desc, at, j - 1 + STAGES, tiles, v_full, v_smem, BN, D, STAGES)
        _copy(k_desc, at, j + STAGES, tiles, k_full, k_smem, BN, D, STAGES)
        if Q_SINK:
            _replace_queries(queries, (j + 1 == sinks) & (sinks < tiles))
            if j == sinks:
                counts = count_smem.load(gl.SliceLayout(0, SCORES)) + behind[1] >= 0
                s = gl.where(counts[None, :], s, float("-inf"))
        p, top, total, fade = next_weights(s, top, total, scale2, q.dtype)
        acc = rescale(acc, fade)
    # Not earlier: CTAs of the merge would crowd the first multiprocessors that this kernel leaves.
    allow_dependents()
    return last_values(acc, p, v_smem, v_full, tiles, STAGES), top, total


@own_assembler
@gluon.jit(
    do_not_specialize=[
        "heads", "group", "n", "slots", "sink", "splits", "stride_valid", "stride_lanes",
    ],
    do_not_specialize_on_alignment=["p_valid", "p_lanes"],
)  # fmt: skip
def decode_small(
    q_desc, q_sink_desc, k_desc, v_desc, out_desc, p_lse, p_part, p_part_lse, p_valid, p_lanes,
    heads, group, n, slots, sink, splits, stride_valid, stride_lanes, scale2,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, HAS_LANES: gl.constexpr, Q_SINK: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Own one of `splits` parts of the keys of one query tile; write the output, or if cut the workspace.

    Programs: parts of the tiles of a head, heads, rows of the call.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    if Q_SINK:
        count_smem = counting(BN)
    else:
        count_smem = None
    q, k_smem, v_smem, q_full, k_full, v_full = small_buffers(q_desc, BN, D, STAGES)
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
    if Q_SINK:
        of_sinks, others = runs_of_part(i_split, i_split + 1, valid, sink, splits, BN)
        sinks = of_sinks[0]
        tiles = sinks + others[0]
        at = (lane, i_h // group, of_sinks[1], sinks, others[1] - sinks * BN)
        behind = (gl.where(sinks > 0, of_sinks[2], others[2]), others[2])
        tma_load(q_sink_desc, [i_b, i_h, i_n, 0], q_full, box(q, 64, D), pred=sinks > 0)
        tma_load(q_desc, [i_b, i_h, i_n, 0], q_full, box(q, 64, D), pred=sinks == 0)
    else:
        tma_load(q_desc, [i_b, i_h, i_n, 0], q_full, box(q, 64, D))
        first, last = key_tiles_of_part(i_split, i_split + 1, valid, splits, BN)
        tiles = last - first
        slot = valid - last * BN
        at = (lane, i_h // group, slot, 0, slot)
        behind = (slot, slot)
    for i in gl.static_range(STAGES):
        _copy(k_desc, at, i, tiles, k_full, k_smem, BN, D, STAGES)
        _copy(v_desc, at, i, tiles, v_full, v_smem, BN, D, STAGES)
    mbarrier.wait(q_full, 0)
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
    unit_rows = unit.to(gl.int64) * 64
    if tiles == 0:
        allow_dependents()
        if splits > 1:
            gl.store(p_part_lse + unit_rows + rows, gl.full([64], float("-inf"), gl.float32, rows.type.layout))
    else:
        queries = (q, q_full, q_desc, (i_b, i_h, i_n))
        acc, top, total = _loop(
            queries, k_desc, v_desc, at, tiles, behind, k_smem, v_smem, k_full, v_full, count_smem, scale2,
            BN, D, STAGES, Q_SINK,
        )  # fmt: skip
        top, total = row_state(top, total, gl.SliceLayout(1, ACC))
        lse = top + gl.log2(total)
        acc = acc * (1.0 / total)[:, None]
        if splits == 1:
            p_row = p_lse + (i_b * heads + i_h).to(gl.int64) * n + i_n
            gl.store(p_row + rows, lse * 0.6931471805599453, mask=rows + i_n < n)
            q.store(acc.to(q.dtype))
            fence_async_shared()
            tma_store(out_desc, [i_b, i_h, i_n, 0], box(q, 64, D))
            tma.store_wait(0)
        else:
            gl.store(p_part_lse + unit_rows + rows, lse)
            columns = gl.arange(0, D, layout=gl.SliceLayout(0, ACC))
            gl.store(p_part + unit_rows * D + (rows[:, None] * D + columns[None, :]), acc)
