"""Work items of a prefill that are cut along the keys, so that all multiprocessors end together.

A prefill has few work items: 156 tiles of queries keep 132 multiprocessors busy for one round, and 24 of them for
another. So of each batch row's items the last ones are cut into parts, which are items of their own; they come after
the whole ones, leave float32 partial results in a workspace, and a second launch (`combine_cut`) adds those up. A part
is a fraction of the key tiles that its block sees, counted on the device.

How a row's items are cut depends on the call's sizes without its rows, on the ring's, its lanes among them, and on the
GPU: on nothing that another row brings along, so neither do a row's bits.

Units of the workspace are those of combine.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .forward_plan import place_of, rows_of, tiles_of


class Cut(NamedTuple):
    """Of each batch row's items the first `whole` are whole, and the other `cut` come in `parts` each."""

    whole: int
    cut: int
    parts: int


class Cuts(NamedTuple):
    """What the kernels are told of a Cut, and where partial results go; all None if no item is cut."""

    whole_items: Any  # of all rows
    whole: Any  # of a row
    cut: Any
    parts: Any  # of an item that is cut
    p_part: Any  # float32 [units, 64, D]
    p_part_lse: Any  # float32 [units, 64], to base 2


# Fitted to 18 prefills on full rings of an H200, each by up to 16 cuts: RMS 15% off at head dim 64, 5% at 128.
_ITEM = 0.5  # microseconds of an item besides its tiles
_MERGE = {64: 4.0, 128: 6.0}  # of the merge besides its bytes, by head dim
_MERGE_BYTES = 2.5e6  # of partial results, written and read in a microsecond
_FEWEST_TILES = 2  # of a part
_MOST_PARTS = 32
_MOST_BYTES = 64 << 20  # of partial results
_GAIN = 0.97  # a cut must take less than this of the time without, on average
_LOSS = 1.15  # and for no number of rows more than about this


class Load(NamedTuple):
    """Sizes that decide about cuts.

    Attributes:
        items: of a batch row.
        tiles: of keys that a block sees at most.
        tile_time: microseconds of a tile of queries against one of keys.
        rows: of a tile of queries.
        head_dim: 64 or 128.
        multiprocessors: of the GPU.
    """

    items: int
    tiles: int
    tile_time: float
    rows: int
    head_dim: int
    multiprocessors: int


def time_of(cut: Cut, load: Load, batch: int) -> float:
    """Return about how many microseconds `batch` rows take by a cut, on a full ring.

    Whoever is free takes the next item; parts begin while the last whole items run, where these leave room.
    """
    whole, part = (load.tile_time * x + _ITEM for x in (load.tiles, -(-load.tiles // cut.parts)))
    rounds, busy = divmod(batch * cut.whole, load.multiprocessors)
    parts = batch * cut.cut * cut.parts
    beside = (load.multiprocessors - busy) * int(whole / part) if busy else 0
    time = (rounds + (busy > 0)) * whole + -(-max(parts - beside, 0) // load.multiprocessors) * part
    if parts:
        time += _MERGE[load.head_dim] + parts * load.rows * load.head_dim * 4 * 2 / _MERGE_BYTES
    return time


@lru_cache(maxsize=1024)
def choose_cut(load: Load, lanes: int) -> Cut | None:
    """Return how the items of a batch row are best cut; None if they are best left whole.

    A call may have any number of rows up to the ring's `lanes`. The cut is the best for one and for all of them
    together (by the product of the times), loses for neither, and _LOSS at most for the numbers between that are tried.
    """
    rounds = -(-load.items * lanes // load.multiprocessors)
    if (1 - _GAIN) * rounds > 1:  # a cut saves a round at most
        return None
    uncut = Cut(load.items, 0, 1)
    base = {batch: time_of(uncut, load, batch) for batch in (*range(1, lanes, -(-lanes // 8)), lanes)}

    def time(cut: Cut) -> float:
        return time_of(cut, load, 1) / base[1] * time_of(cut, load, lanes) / base[lanes]

    most = _MOST_BYTES // (lanes * load.rows * load.head_dim * 4)  # parts of a row
    wholes = {min(i * load.multiprocessors // batch, load.items - 1) for batch in (1, lanes) for i in range(rounds)}
    parts = range(2, min(load.tiles // _FEWEST_TILES, _MOST_PARTS) + 1)
    cuts = [Cut(x, load.items - x, p) for x in wholes for p in parts if (load.items - x) * p <= most]
    for _, cut in sorted((taken, cut) for cut in cuts if (taken := time(cut)) < _GAIN**2):
        times = [time_of(cut, load, batch) / before for batch, before in base.items()]
        if max(times[0], times[-1]) <= 1 and max(times) <= _LOSS:
            return cut
    return None


@gluon.jit
def item_of_cut(at, whole, cut):
    """Return the item that is the `at`th of those that are cut."""
    return at // cut * (whole + cut) + whole + at % cut


@gluon.jit
def part_of(at, cuts):
    """Return (item, part, count) of the `at`th piece of work; part 0 of 1 is a whole item."""
    if at < cuts.whole_items:
        item = at // cuts.whole * (cuts.whole + cuts.cut) + at % cuts.whole
        part = 0
        count = 1
    else:
        item = item_of_cut((at - cuts.whole_items) // cuts.parts, cuts.whole, cuts.cut)
        part = (at - cuts.whole_items) % cuts.parts
        count = cuts.parts
    return item, part, count


@gluon.jit
def merge_of(
    at, whole, cut, parts, groups, n, block_size, grid_start,
    heavy_items, group_items, last, per_block, lacking, heavy, light,
):  # fmt: skip
    """Return (head, first row, end of the block, first unit) of the `at`th merge, of 64 rows of an item that is cut.

    Units of the same rows are `groups` apart. The first row may lie past the end of the block: then there is nothing.
    """
    i_cut = at // groups
    group = at % groups
    item = item_of_cut(i_cut, whole, cut)
    head, block, tile = place_of(item, heavy_items, group_items, last, per_block, lacking, heavy, light)
    first, end = rows_of(block, tile, n, block_size, grid_start, groups * 64)
    return head, first + group * 64, end, i_cut * parts * groups + group


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
    """Return the lengths of four segments, in order, from the first one on that has keys; zeros follow."""
    for _ in gl.static_range(3):
        if own == 0:
            own = sinks
            sinks = ring
            ring = low
            low = 0
    return own, sinks, ring, low
