"""What the producer and the consumers of the Hopper forward share: buffers, barriers, and the work item they are at.

B batch, H query heads, Hkv key/value heads, N tokens, D head dim, S ring slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .forward_plan import item_of, own_keys, own_keys_apart, place_of, ring_keys, rounds_of, rows_of


class Buffers(NamedTuple):
    """Shared memory. A producer and its consumers take the stages of q, and those of k and v, in turn."""

    q: Any  # [stages * consumers, 64, D]
    k: Any  # [stages, keys of a tile, D]
    v: Any  # [stages, keys of a tile, D]
    out: Any  # [consumers, 64, D]


class Bars(NamedTuple):
    """Barriers, one a stage: full when a copy has landed, empty when every consumer has read it."""

    q_full: Any
    q_empty: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any


class Call(NamedTuple):
    """The sizes and the pattern of a call, the ring's state, and the plan (see forward_plan.Plan)."""

    heads: Any
    group: Any  # query heads that read one key/value head
    n: Any
    block_size: Any
    window: Any
    sink: Any
    grid_start: Any
    ring_window: Any  # slots of a ring that are no sinks
    p_position: Any
    p_lanes: Any
    heavy_items: Any
    group_items: Any
    last: Any
    per_block: Any
    lacking: Any
    heavy: Any
    light: Any
    full: Any  # rounds in which every CTA has a work item
    rest: Any  # work items after them


@gluon.jit
def rounds(call):
    """Return the number of this CTA's work items."""
    return rounds_of(call.full, call.rest, gl.program_id(0))


@gluon.jit
def item(i, call, ROWS: gl.constexpr):
    """Return (row of the batch, head, first query row, end of its block) of this CTA's i-th work item."""
    at = item_of(i, call.full, gl.program_id(0), gl.num_programs(0))
    head, block, tile = place_of(
        at, call.heavy_items, call.group_items, call.last, call.per_block, call.lacking, call.heavy, call.light
    )
    first, end = rows_of(block, tile, call.n, call.block_size, call.grid_start, ROWS)
    return head // call.heads, head % call.heads, first, end


@gluon.jit
def keys_of(i_b, end, call, RING: gl.constexpr, Q_SINK: gl.constexpr):
    """Return what a block sees: own keys [first, end) and [0, sinks), slots [start, start + held) and [0, low).

    With Q_SINK the last slots are [sink, sink + low), and [0, kept) are apart from them. If `begins`, the block ends
    among the sinks, which [first, end) then are.
    """
    if RING:
        position = gl.load(call.p_position + i_b)
        filled = min(position, 1 << 30).to(gl.int32)
        # Unsigned, because the sign words of 64-bit operands would take registers. Before the ring holds more than
        # sinks the difference wraps around, and `turn` is of no account.
        turn = (position.to(gl.uint64) - call.sink.to(gl.uint32)) % call.ring_window.to(gl.uint32)
        start, held, low = ring_keys(filled, turn.to(gl.int32), end, call.window, call.sink, call.ring_window)
        own_sink = max(call.sink - filled, 0)
    else:
        own_sink = call.sink
        start, held, low = 0, 0, 0
    if Q_SINK:
        first, sinks = own_keys_apart(end, call.window, own_sink)
        if RING:
            kept = min(call.sink, filled)
            low -= kept
        else:
            kept = 0
    else:
        first, sinks = own_keys(end, call.window, own_sink)
        kept = 0
    return first, sinks, start, held, low, kept, end <= own_sink
