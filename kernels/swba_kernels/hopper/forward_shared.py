"""What the producer and the consumers of the Hopper forward share: buffers, barriers, and the work item they are at.

B batch, H query heads, Hkv key/value heads, N tokens, D head dim, S ring slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .forward_plan import keys_of_rows, own_keys, own_keys_apart, place_of, ring_keys, rows_of
from .notes import told


class Buffers(NamedTuple):
    """Shared memory. A producer and its consumers take the stages of q, and those of k and v, in turn."""

    q: Any  # [stages * consumers, 64, D]
    k: Any  # [stages, keys of a tile, D]
    v: Any  # [stages, keys of a tile, D]
    out: Any  # [consumers, 64, D]
    notes: Any  # [stages of q, 16]: the Item whose queries these are


class Item(NamedTuple):
    """A work item, as the producer tells the consumers, who would lose time over its divisions.

    The keys of each segment come in the order of the tiles: own window, own sinks, two parts of a ring. With Q_SINK own
    sinks come behind the ring's parts, and a ring's sinks, `kept`, last. Of a part of an item `own` is the first of the
    segments that it reads of, and so on.
    """

    row: Any  # the first query row
    end: Any  # where the rows end: with their block, or with a tile that may straddle blocks
    i_b: Any
    i_h: Any
    first: Any  # the first key of the own window
    own: Any
    sinks: Any
    ring: Any
    low: Any
    kept: Any
    unit: Any  # one more than the first unit of a part; 0 if the item is whole


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
    items: Any  # in all
    p_ticket: Any  # how many of them were handed out, but for the first of each CTA


@gluon.jit
def next_item(call):
    """Return the next work item for this CTA; none is left if it is not below `call.items`.

    They are handed out as CTAs ask for them, heaviest first, so that all end at nearly the same time.
    """
    at = call.items
    if gl.num_programs(0) < call.items:
        at = gl.num_programs(0) + gl.atomic_add(call.p_ticket, 1)
    return at


@gluon.jit
def told_item(notes, q_stage):
    """Return the Item that belongs to a stage of queries; a negative row says that none is left."""
    return Item(
        told(notes, q_stage, 0), told(notes, q_stage, 1), told(notes, q_stage, 2), told(notes, q_stage, 3),
        told(notes, q_stage, 4), told(notes, q_stage, 5), told(notes, q_stage, 6), told(notes, q_stage, 7),
        told(notes, q_stage, 8), told(notes, q_stage, 9), told(notes, q_stage, 10),
    )  # fmt: skip


@gluon.jit
def place(at, call, ROWS: gl.constexpr, STRADDLE: gl.constexpr):
    """Return (row of the batch, head, first query row, end of its block or, with STRADDLE, of its tile) of an item."""
    head, block, tile = place_of(
        at, call.heavy_items, call.group_items, call.last, call.per_block, call.lacking, call.heavy, call.light
    )
    if STRADDLE:
        first, end = rows_of(block, tile, call.n, ROWS, 0, ROWS)
    else:
        first, end = rows_of(block, tile, call.n, call.block_size, call.grid_start, ROWS)
    return head // call.heads, head % call.heads, first, end


@gluon.jit
def keys_of_tile(row, stop, call):
    """Return `keys_of_rows` of the rows [row, stop)."""
    return keys_of_rows(row, stop, call.n, call.block_size, call.window, call.sink, call.grid_start)


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
