"""Work items of a prefill that are cut along the keys, so that all multiprocessors end together.

A prefill has few work items: 156 tiles of queries keep 132 multiprocessors busy for one round, and 24 of them for
another. So of each batch row's items the last ones are cut into parts, which are items of their own; they come after
the whole ones, leave float32 partial results in a workspace, and `combine_cut` adds those up. A part is a fraction of
the key tiles that its block sees, on the device. How a row's items are cut depends on capacities alone, the number of
ring lanes among them, and not on the rows of a call: nor do a row's bits.

A unit is 64 query rows of one part: rows [64 u, 64 u + 64) of the workspace.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .assembler import own_assembler
from .combine import MAX_PARTS, add_up
from .forward_plan import place_of, rows_of


class Cut(NamedTuple):
    """Of each batch row's items the first `whole` are whole, and the other `cut` come in `parts` each."""

    whole: int
    cut: int
    parts: int


class Parts(NamedTuple):
    """How the items of a launch are cut, and where partial results go; all None if none is cut."""

    whole_items: Any  # of all rows
    whole: Any  # of a row, as in Cut
    cut: Any
    each: Any  # parts of an item that is cut
    p_part: Any  # float32 [units, 64, D]
    p_part_lse: Any  # float32 [units, 64], to base 2


# Fitted to 18 prefills on an H200, each by up to 16 cuts: within 12% at head dim 64, and 5% at 128.
_ITEM = 0.5  # microseconds of an item besides its tiles
_MERGE = {64: 4.0, 128: 6.0}  # of the merge besides its bytes, by head dim
_MERGE_BYTES = 2.5e6  # of partial results, written and read in a microsecond
_FEWEST_TILES = 2  # of a part
_GAIN = 0.97  # a cut must take less than this of the time without


@lru_cache(maxsize=1024)
def choose_cut(
    items: int, lanes: int, tiles: int, tile_time: float, rows: int, head_dim: int, multiprocessors: int
) -> Cut | None:
    """Return how the items of a batch row are best cut; None if they are best left whole.

    Args:
        items: of a batch row.
        lanes: batch rows that are taken to run at once.
        tiles: of keys that a block sees at most.
        tile_time: microseconds of a tile of queries against one of keys.
        rows: of a tile of queries.
    """

    def time(cut: Cut) -> float:
        whole, part = (tile_time * x + _ITEM for x in (tiles, -(-tiles // cut.parts)))
        rounds, late = divmod(lanes * cut.whole, multiprocessors)
        left, early = lanes * cut.cut * cut.parts, multiprocessors - late
        beside = early * int(whole / part) if late else 0  # parts that run beside the last whole items
        if late and left <= beside:
            end = (rounds + 1) * whole
        else:
            end = (rounds + (late > 0)) * whole + -(-(left - beside) // multiprocessors) * part
        if cut.cut:
            end += _MERGE[head_dim] + left * rows * head_dim * 4 * 2 / _MERGE_BYTES
        return end

    uncut = Cut(items, 0, 1)
    rounds = -(-items * lanes // multiprocessors)
    wholes = {min(i * multiprocessors // lanes, items - 1) for i in range(rounds)}
    parts = range(2, min(tiles // _FEWEST_TILES, MAX_PARTS) + 1)
    best = min((Cut(x, items - x, p) for x in wholes for p in parts), key=time, default=uncut)
    return best if time(best) < _GAIN * time(uncut) else None


@gluon.jit
def item_of_cut(at, whole, cut):
    """Return the item that is the `at`th of those that are cut."""
    return at // cut * (whole + cut) + whole + at % cut


@gluon.jit
def part_of(at, parts):
    """Return (item, part, count) of the `at`th piece of work; part 0 of 1 is a whole item."""
    if at < parts.whole_items:
        item = at // parts.whole * (parts.whole + parts.cut) + at % parts.whole
        part = 0
        count = 1
    else:
        item = item_of_cut((at - parts.whole_items) // parts.each, parts.whole, parts.cut)
        part = (at - parts.whole_items) % parts.each
        count = parts.each
    return item, part, count


@gluon.jit
def tiles_of(length, columns):
    """Return in how many tiles a segment of `length` keys comes."""
    return (length + columns - 1) // columns


@gluon.jit
def share_of(length, before, low, high, columns):
    """Return (offset, count): of a segment's `length` keys, those at [offset, offset + count) are in the share.

    That is tiles [low, high) of all; `before` are those of segments before. Tiles go backwards from a segment's end,
    where the ragged one is.
    """
    tiles = tiles_of(length, columns)
    first = min(max(low - before, 0), tiles)
    last = min(max(high - before, 0), tiles)
    offset = (tiles - last) * columns
    return offset, max(min(length, (tiles - first) * columns) - offset, 0)


@gluon.jit
def in_front(own, sinks, ring, low):
    """Return the lengths of four segments in the same order, but those without keys last if they were first."""
    for _ in gl.static_range(3):
        if own == 0:
            own = sinks
            sinks = ring
            ring = low
            low = 0
    return own, sinks, ring, low


@own_assembler
@gluon.jit(
    do_not_specialize=[
        "whole", "cut", "parts", "heads", "n", "block_size", "grid_start", "heavy_items", "group_items", "last",
        "per_block", "lacking", "heavy", "light", "stride_ob", "stride_oh", "stride_on",
    ]
)  # fmt: skip
def combine_cut(
    p_part, p_part_lse, p_out, p_lse, whole, cut, parts, heads, n, block_size, grid_start,
    heavy_items, group_items, last, per_block, lacking, heavy, light, stride_ob, stride_oh, stride_on,
    GROUPS: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, AT_ONCE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Own ROWS rows of a cut item: add up its parts in increasing order."""
    at = gl.program_id(0)
    item = item_of_cut(at // GROUPS, whole, cut)
    head, block, tile = place_of(item, heavy_items, group_items, last, per_block, lacking, heavy, light)
    first, end = rows_of(block, tile, n, block_size, grid_start, GROUPS * 64)
    first += at % GROUPS * 64
    if first + gl.program_id(1) * ROWS < end:
        unit = at // GROUPS * parts * GROUPS + at % GROUPS
        i_b = (head // heads).to(gl.int64)
        i_h = (head % heads).to(gl.int64)
        add_up(
            p_part, p_part_lse, p_out, p_lse, i_b, i_h, first, end, unit, GROUPS, parts, heads, n,
            stride_ob, stride_oh, stride_on, D, ROWS, AT_ONCE,
        )  # fmt: skip
