"""What the producer and the consumers of the Hopper forward share: buffers, barriers, and the work item they are at.

B batch, H query heads, Hkv key/value heads, N tokens, D head dim, S ring slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .forward_plan import item_of, own_keys, place_of, ring_keys, rounds_of, rows_of


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
    batch_heads: Any
    n: Any
    block_size: Any
    window: Any
    sink: Any
    grid_start: Any
    slots: Any
    p_position: Any
    p_lanes: Any
    blocks: Any
    per_block: Any
    last_tiles: Any
    heavy: Any
    light: Any
    full: Any  # rounds in which every CTA has a work item
    rest: Any  # work items after them


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """Step through a ring of buffers; the phase flips whenever it wraps."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def rounds(call):
    """Return the number of this CTA's work items."""
    return rounds_of(call.full, call.rest, gl.program_id(0), gl.num_programs(0))


@gluon.jit
def item(i, call, ROWS: gl.constexpr):
    """Return (row of the batch, head, first query row, end of its block) of this CTA's i-th work item."""
    at = item_of(i, gl.program_id(0), gl.num_programs(0))
    head, block, tile = place_of(
        at, call.batch_heads, call.blocks, call.per_block, call.last_tiles, call.heavy, call.light
    )
    first, end = rows_of(block, tile, call.n, call.block_size, call.grid_start, ROWS)
    return head // call.heads, head % call.heads, first, end


@gluon.jit
def keys_of(i_b, end, call, RING: gl.constexpr):
    """Return what a block sees: own keys [first, end) and [0, sinks), slots [start, start + held) and [0, low)."""
    if RING:
        position = gl.load(call.p_position + i_b)
        start, held, low = ring_keys(position, end, call.window, call.sink, call.slots)
        first, sinks = own_keys(end, call.window, max(call.sink - position, 0).to(gl.int32))
        return first, sinks, start.to(gl.int32), held.to(gl.int32), low.to(gl.int32)
    else:
        first, sinks = own_keys(end, call.window, call.sink)
        return first, sinks, 0, 0, 0
