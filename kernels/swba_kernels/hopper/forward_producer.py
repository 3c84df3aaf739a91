"""The producer of the Hopper forward: one warp that copies tiles by TMA."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .compat import box, tma_load
from .forward_cut import in_front, part_of, share_of
from .forward_plan import tiles_of
from .forward_shared import Item, keys_of, keys_of_tile, next_item, place
from .notes import tell
from .pipeline import next_stage


class Inputs(NamedTuple):
    """TMA descriptors over [B, H, N, D], and over [L, Hkv, S, D] for a ring of L lanes and S slots."""

    q: Any
    q_sink: Any
    k: Any
    v: Any
    ring_k: Any
    ring_v: Any


@gluon.jit
def _copy(k_desc, v_desc, i_b, i_h, start, length, buffers, bars, stage, phase):
    """Copy the keys and values [start, start + length), last tile first.

    That first one is the ragged one. It ends where the keys end and overlaps the second (or reaches below `start`).
    """
    STAGES: gl.constexpr = buffers.k.shape[0]
    COLUMNS: gl.constexpr = buffers.k.shape[1]
    D: gl.constexpr = buffers.k.shape[2]
    tiles = (length + COLUMNS - 1) // COLUMNS
    row = start + length - COLUMNS
    for j in range(tiles):
        k_full = bars.k_full.index(stage)
        mbarrier.wait(bars.k_empty.index(stage), phase)
        mbarrier.expect(k_full, COLUMNS * D * 2)
        tma_load(k_desc, [i_b, i_h, row, 0], k_full, box(buffers.k.index(stage), COLUMNS, D))
        v_full = bars.v_full.index(stage)
        mbarrier.wait(bars.v_empty.index(stage), phase)
        mbarrier.expect(v_full, COLUMNS * D * 2)
        tma_load(v_desc, [i_b, i_h, row, 0], v_full, box(buffers.v.index(stage), COLUMNS, D))
        row = start + (tiles - 2 - j) * COLUMNS
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _copy_queries(desc, item, buffers, bars, q_stage, q_phase):
    """Copy the queries of all consumers for an Item, and tell them of it."""
    GROUPS: gl.constexpr = buffers.out.shape[0]
    D: gl.constexpr = buffers.out.shape[2]
    q_full = bars.q_full.index(q_stage)
    mbarrier.wait(bars.q_empty.index(q_stage), q_phase)
    tell(item, buffers.notes, q_stage)
    mbarrier.expect(q_full, GROUPS * 64 * D * 2)
    for g in gl.static_range(GROUPS):
        buffer = box(buffers.q.index(q_stage * GROUPS + g), 64, D)
        tma_load(desc, [item.i_b, item.i_h, item.row + g * 64, 0], q_full, buffer)
    return next_stage(q_stage, q_phase, buffers.q.shape[0] // GROUPS)


@gluon.jit
def _lane_of(i_b, call, LANES: gl.constexpr):
    """Return the lane of a ring that a row of the batch reads."""
    lane = i_b
    if LANES:
        lane = gl.load(call.p_lanes + i_b).to(gl.int32)
    return lane


@gluon.jit
def _copy_item(
    at, inputs, buffers, bars, call, stage, phase, q_stage, q_phase,
    SINKS: gl.constexpr, RING: gl.constexpr, LANES: gl.constexpr, Q_SINK: gl.constexpr, STRADDLE: gl.constexpr,
):  # fmt: skip
    """Copy an item's query tile and then its key and value tiles in the order consumers take them.

    With Q_SINK sinks come last, behind the queries that read them.
    """
    GROUPS: gl.constexpr = buffers.out.shape[0]
    i_b, i_h, row, end = place(at, call, GROUPS * 64, STRADDLE)
    if STRADDLE:
        first, _, _, stop, sinks = keys_of_tile(row, end, call)
        item = Item(row, end, i_b, i_h, first, stop - first, sinks, 0, 0, 0, 0)
    else:
        first, sinks, start, held, low, kept, begins = keys_of(i_b, end, call, RING, Q_SINK)
        item = Item(row, end, i_b, i_h, first, end - first, sinks, held, low, kept, 0)
    if Q_SINK:
        if begins:
            q_stage, q_phase = _copy_queries(inputs.q_sink, item, buffers, bars, q_stage, q_phase)
        else:
            q_stage, q_phase = _copy_queries(inputs.q, item, buffers, bars, q_stage, q_phase)
    else:
        q_stage, q_phase = _copy_queries(inputs.q, item, buffers, bars, q_stage, q_phase)
    i_kv = i_h // call.group
    stage, phase = _copy(inputs.k, inputs.v, i_b, i_kv, first, item.own, buffers, bars, stage, phase)
    if SINKS and not Q_SINK:
        stage, phase = _copy(inputs.k, inputs.v, i_b, i_kv, 0, sinks, buffers, bars, stage, phase)
    if RING:
        lane = _lane_of(i_b, call, LANES)
        behind = call.sink if Q_SINK else 0
        for part in range(2):
            slot = start if part == 0 else behind
            length = held if part == 0 else low
            stage, phase = _copy(inputs.ring_k, inputs.ring_v, lane, i_kv, slot, length, buffers, bars, stage, phase)
    if Q_SINK:
        q_stage, q_phase = _copy_queries(inputs.q_sink, item, buffers, bars, q_stage, q_phase)
        stage, phase = _copy(inputs.k, inputs.v, i_b, i_kv, 0, sinks, buffers, bars, stage, phase)
        if RING:
            stage, phase = _copy(inputs.ring_k, inputs.ring_v, lane, i_kv, 0, kept, buffers, bars, stage, phase)
    return stage, phase, q_stage, q_phase


@gluon.jit
def _copy_share(
    at, inputs, buffers, bars, call, cuts, stage, phase, q_stage, q_phase, SINKS: gl.constexpr, LANES: gl.constexpr
):
    """Copy as `_copy_item`, on a ring and without Q_SINK, the share of an item's key tiles that a part of it reads."""
    GROUPS: gl.constexpr = buffers.out.shape[0]
    COLUMNS: gl.constexpr = buffers.k.shape[1]
    i_item, part, count = part_of(at, cuts)
    i_b, i_h, row, end = place(i_item, call, GROUPS * 64, False)
    first, sinks, start, held, low, _, _ = keys_of(i_b, end, call, True, False)
    own = end - first
    before_ring = tiles_of(own, COLUMNS) + tiles_of(sinks, COLUMNS)
    before_low = before_ring + tiles_of(held, COLUMNS)
    tiles = before_low + tiles_of(low, COLUMNS)
    begin = part * tiles // count
    stop = (part + 1) * tiles // count
    own_at, own = share_of(own, 0, begin, stop, COLUMNS)
    held_at, held = share_of(held, before_ring, begin, stop, COLUMNS)
    low_at, low = share_of(low, before_low, begin, stop, COLUMNS)
    if SINKS:
        sinks_at, sinks = share_of(sinks, before_ring - tiles_of(sinks, COLUMNS), begin, stop, COLUMNS)
    unit = (at - cuts.whole_items) * GROUPS
    if begin < stop:
        unit = unit + 1 if count > 1 else 0
        item = Item(row, end, i_b, i_h, first, *in_front(own, sinks, held, low), 0, unit)
        q_stage, q_phase = _copy_queries(inputs.q, item, buffers, bars, q_stage, q_phase)
        lane = _lane_of(i_b, call, LANES)
        i_kv = i_h // call.group
        stage, phase = _copy(inputs.k, inputs.v, i_b, i_kv, first + own_at, own, buffers, bars, stage, phase)
        if SINKS:
            stage, phase = _copy(inputs.k, inputs.v, i_b, i_kv, sinks_at, sinks, buffers, bars, stage, phase)
        for i in range(2):
            slot = start + held_at if i == 0 else low_at
            length = held if i == 0 else low
            stage, phase = _copy(inputs.ring_k, inputs.ring_v, lane, i_kv, slot, length, buffers, bars, stage, phase)
    else:
        at_row = gl.arange(0, 64, layout=gl.BlockedLayout([2], [32], [gl.num_warps()], [0]))
        nothing = gl.full([64], float("-inf"), gl.float32, at_row.type.layout)
        for g in gl.static_range(GROUPS):
            gl.store(cuts.p_part_lse + (unit + g).to(gl.int64) * 64 + at_row, nothing)
    return stage, phase, q_stage, q_phase


@gluon.jit
def produce(
    inputs, buffers, bars, call, cuts,
    SINKS: gl.constexpr, RING: gl.constexpr, LANES: gl.constexpr, Q_SINK: gl.constexpr, STRADDLE: gl.constexpr,
    CUT: gl.constexpr,
):  # fmt: skip
    """Copy one work item after the other, then tell the consumers that none is left."""
    stage = 0
    phase = 1
    q_stage = 0
    q_phase = 1
    at = gl.program_id(0)
    while at < call.items:
        if CUT:
            stage, phase, q_stage, q_phase = _copy_share(
                at, inputs, buffers, bars, call, cuts, stage, phase, q_stage, q_phase, SINKS, LANES
            )
        else:
            stage, phase, q_stage, q_phase = _copy_item(
                at, inputs, buffers, bars, call, stage, phase, q_stage, q_phase, SINKS, RING, LANES, Q_SINK, STRADDLE
            )
        at = next_item(call)
    mbarrier.wait(bars.q_empty.index(q_stage), q_phase)
    tell(Item(-1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), buffers.notes, q_stage)
    mbarrier.arrive(bars.q_full.index(q_stage), count=1)
