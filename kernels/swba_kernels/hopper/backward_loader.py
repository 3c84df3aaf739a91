"""The warp of a fused backward kernel that loads: a tile of keys and values, then the queries that see it.

A piece of work is a tile of keys of one head, and a note tells the other warps which one it is. At head dim 128 a CTA
has one; at 64, where there is room for the keys of two, the next one's come while this one is computed.
"""

# ruff: noqa: RUF059 (tuples travel whole between the partitions; each names all that it gets)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .backward_ranges import all_start_without_others, next_row, walk_grid, work_of
from .backward_shared import load_queries
from .compat import box, tma_load
from .notes import tell, told
from .pipeline import next_stage


@gluon.jit
def _load_keys(k_desc, v_desc, at, k_smem, v_smem, v_buffer, ready):
    """Start the copies of 128 keys, and of their values into two buffers from v_buffer on."""
    i_b, i_h, first = at
    BLOCK_N: gl.constexpr = k_smem.shape[0]
    D: gl.constexpr = k_smem.shape[1]
    mbarrier.expect(ready, 2 * BLOCK_N * D * 2)
    tma_load(k_desc, [i_b, i_h, first, 0], ready, box(k_smem, BLOCK_N, D))
    for w in gl.static_range(2):
        tma_load(v_desc, [i_b, i_h, first + w * 64, 0], ready, box(v_smem.index(v_buffer + w), 64, D))


@gluon.jit
def _load_walk(
    descriptors, buffers, barriers, marks, place, walk, heads, group, stage, phase,
    DOWN: gl.constexpr, Q_SINK: gl.constexpr,
):  # fmt: skip
    """Load every tile of queries of a walk with its terms, head by head; return the next stage and its phase.

    With `marks`, mark each stage with the first row of its tile if a query there does not see all keys, else with -1.
    """
    q_desc, q_sink_desc, grad_desc, lse_desc, delta_desc = descriptors
    q_smem, grad_smem, lse_smem, delta_smem = buffers
    full, empty = barriers
    in_sinks, i_b, i_h = place
    tiles, from_row, to_row, all_start, all_stop = walk
    STAGES: gl.constexpr = q_smem.shape[0]
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    D: gl.constexpr = q_smem.shape[2]
    i_head = i_h * group
    row = from_row
    for _ in range(group * tiles):
        ready = full.index(stage)
        mbarrier.wait(empty.index(stage), phase)
        if marks is not None:
            edge = (row < all_start) | (row + BLOCK_M > all_stop)
            tell((gl.where(edge, row, -1),), marks, stage)
        mbarrier.expect(ready, 2 * BLOCK_M * (D * 2 + 4))
        load_queries(q_desc, q_sink_desc, in_sinks, [i_b, i_head, row, 0], ready, q_smem.index(stage), Q_SINK)
        tma_load(lse_desc, [i_b * heads + i_head, row], ready, lse_smem.index(stage))
        tma_load(grad_desc, [i_b, i_head, row, 0], ready, box(grad_smem.index(stage), BLOCK_M, D))
        tma_load(delta_desc, [i_b * heads + i_head, row], ready, delta_smem.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
        i_head += (row == to_row).to(gl.int32)
        row = next_row(row, from_row, to_row, BLOCK_M, DOWN)
    return stage, phase


@gluon.jit
def load(inputs, buffers, barriers, notes, marks, i_work, pattern, shape, DOWN: gl.constexpr, Q_SINK: gl.constexpr):
    """Load one piece of work, and tell which one it is.

    inputs: the descriptors of q, q_sink, dout, k, v and both row terms. buffers: of k, v, q, dout and both row terms.
    barriers: that of the keys, and those that tell when a stage of queries is full and when it is empty. notes: where
    that on this piece goes, for `told_place` and, in field 0, its tiles of queries. marks: of the stages of queries, as
    `_load_walk` sets them.
    """
    q_desc, q_sink_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc = inputs
    k_smem, v_smem, q_smem, grad_smem, lse_smem, delta_smem = buffers
    keys_full, full, empty = barriers
    heads, group, kv_in_all, together = shape
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    BLOCK_N: gl.constexpr = k_smem.shape[0]
    in_sinks, part, i_b, i_h, first, i_sums = work_of(i_work, pattern, shape, BLOCK_N, Q_SINK)
    tiles, from_row, to_row, all_start, all_stop = walk_grid(first, part, BLOCK_M, BLOCK_N, DOWN)
    if Q_SINK:
        all_start = all_start_without_others(all_start, first, in_sinks, pattern, BLOCK_N)
    tell((tiles, in_sinks, i_b, i_h, first), notes, 0)
    _load_keys(k_desc, v_desc, (i_b, i_h, first), k_smem, v_smem, 0, keys_full)
    stage = 0
    phase = 1
    _load_walk(
        (q_desc, q_sink_desc, grad_desc, lse_desc, delta_desc), (q_smem, grad_smem, lse_smem, delta_smem),
        (full, empty), marks, (in_sinks, i_b, i_h), (tiles, from_row, to_row, all_start, all_stop),
        heads, group, stage, phase, DOWN, Q_SINK,
    )  # fmt: skip


@gluon.jit
def load_pieces(
    inputs, buffers, barriers, notes, p_ticket, all_work, pattern, shape, DOWN: gl.constexpr, Q_SINK: gl.constexpr
):
    """Load as `load`, one piece of work after the other, as the counter hands them out; keys have stages, too.

    With as many programs as there are pieces, each program has one.
    """
    q_desc, q_sink_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc = inputs
    k_smem, v_smem, q_smem, grad_smem, lse_smem, delta_smem = buffers
    keys_full, keys_empty, full, empty = barriers
    heads, group, kv_in_all, together = shape
    KEY_STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    stage = 0
    phase = 1
    key_stage = 0
    key_phase = 1
    i_work = gl.atomic_add(p_ticket, 1)
    while i_work < all_work:
        in_sinks, part, i_b, i_h, first, i_sums = work_of(i_work, pattern, shape, BLOCK_N, Q_SINK)
        tiles, from_row, to_row, all_start, all_stop = walk_grid(first, part, BLOCK_M, BLOCK_N, DOWN)
        mbarrier.wait(keys_empty.index(key_stage), key_phase)
        tell((tiles, in_sinks, i_b, i_h, first, from_row, to_row, all_start, all_stop, i_work), notes, key_stage)
        k = k_smem.index(key_stage)
        _load_keys(k_desc, v_desc, (i_b, i_h, first), k, v_smem, key_stage * 2, keys_full.index(key_stage))
        key_stage, key_phase = next_stage(key_stage, key_phase, KEY_STAGES)
        stage, phase = _load_walk(
            (q_desc, q_sink_desc, grad_desc, lse_desc, delta_desc), (q_smem, grad_smem, lse_smem, delta_smem),
            (full, empty), None, (in_sinks, i_b, i_h), (tiles, from_row, to_row, all_start, all_stop),
            heads, group, stage, phase, DOWN, Q_SINK,
        )  # fmt: skip
        i_work = all_work
        if gl.num_programs(0) < all_work:
            i_work = gl.atomic_add(p_ticket, 1)
    mbarrier.wait(keys_empty.index(key_stage), key_phase)
    tell((0, 0), notes, key_stage)
    mbarrier.arrive(keys_full.index(key_stage), count=1)


@gluon.jit
def told_place(notes, key_stage):
    """Return (in_sinks, batch row, kv head, first key) of the piece of work whose keys are in a stage."""
    in_sinks = told(notes, key_stage, 1) != 0
    return in_sinks, told(notes, key_stage, 2), told(notes, key_stage, 3), told(notes, key_stage, 4)


@gluon.jit
def told_walk(notes, key_stage):
    """Return (tiles, from_row, to_row, all_start, all_stop) as `walk_grid` does; no tiles mean that no work is left."""
    return (
        told(notes, key_stage, 0), told(notes, key_stage, 5), told(notes, key_stage, 6),
        told(notes, key_stage, 7), told(notes, key_stage, 8),
    )  # fmt: skip


@gluon.jit
def told_work(notes, key_stage):
    """Return the number of the piece of work whose keys are in a stage."""
    return told(notes, key_stage, 9)
