"""Which rows and which keys: the schedule of the Hopper forward as integer arithmetic.

The kernel calls these functions on the device. They use nothing but +, -, *, //, %, min and max, and divide only
numbers that are not negative, so the tests call the very same ones (as `function.fn`) in plain Python.

Each of B * H heads is cut into blocks, and each block into tiles of `rows` rows, so that all rows of a tile see the
same keys: at most four contiguous segments (the own window, own sinks, two parts of a ring). Where that would leave
many rows idle, a head is cut into tiles without regard to blocks instead, and a tile may straddle them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from triton.experimental import gluon


class Plan(NamedTuple):
    """How a head is cut: blocks 0 .. `last` of `per_block` tiles, of which the last block lacks `lacking`.

    (The first block may have fewer, too.) Counted from the end of the sequence, the first `heavy` tiles of a head see a
    full window and so cost the same (with tiles that straddle blocks, some of their rows do, and they cost nearly the
    same); the `light` ones after them see less and less.
    """

    last: int
    per_block: int
    lacking: int
    heavy: int
    light: int

    @property
    def tiles(self) -> int:
        """Tiles of one head."""
        return self.heavy + self.light


@lru_cache(maxsize=1024)
def plan_forward(
    n: int, block_size: int, window: int, sink: int, grid_start: int, rows: int, straddle: bool = False
) -> Plan:
    """Cut `n` tokens; `grid_start` <= 0 is where the block grid starts, `rows` the height of a tile.

    With `straddle` every tile counts as a block of `rows` tokens, the first of which starts at token 0.
    """
    if straddle:
        tiles = -(-n // rows)
        full = grid_start + -(-max(window + sink - grid_start, 0) // block_size) * block_size - block_size
        heavy = max(0, tiles - max(0, full) // rows)
        return Plan(tiles - 1, 1, 0, heavy, tiles - heavy)
    last = -(-(n - grid_start) // block_size) - 1
    per_block = -(-min(block_size, n) // rows)
    first_tiles = -(-min(grid_start + block_size, n) // rows)
    last_tiles = -(-(n - max(grid_start + last * block_size, 0)) // rows)
    tiles = last_tiles if last == 0 else first_tiles + (last - 1) * per_block + last_tiles
    # Block i ends at grid_start + (i + 1) * block_size; from `full` on, blocks see window + sink keys.
    full = max(0, -(-(window + sink - grid_start) // block_size) - 1)
    if full > last:
        heavy = 0
    elif full == 0:
        heavy = tiles
    else:
        heavy = last_tiles + (last - full) * per_block
    return Plan(last, per_block, per_block - last_tiles, heavy, tiles - heavy)


@gluon.jit
def place_of(item, heavy_items, group_items, last, per_block, lacking, heavy, light):
    """Return (head, block, tile in block) of a work item, heaviest first.

    The `heavy_items` heavy tiles go head by head: CTAs that run side by side then share keys in L2. The light ones go
    block by block (`group_items` tiles in a block of all heads), so that the last wave is of short items.
    """
    if item < heavy_items:
        head = item // heavy
        place = item % heavy
    else:
        rest = item - heavy_items
        group = rest // group_items
        rest = rest - group * group_items
        size = min(per_block, light - group * per_block)
        head = rest // size
        place = heavy + group * per_block + rest % size
    place = place + lacking
    tile = place % per_block - (lacking if place < per_block else 0)
    return head, last - place // per_block, tile


@gluon.jit
def rows_of(block, tile, n, block_size, grid_start, rows):
    """Return (first row, end of the block) of a tile of `rows` rows; its last rows may lie past that end."""
    start = grid_start + block * block_size
    return max(start, 0) + tile * rows, min(start + block_size, n)


@gluon.jit
def own_keys(end, window, sink):
    """Return (first, sinks): a block that ends at `end` sees the keys [0, sinks) and [first, end)."""
    first = max(end - window, 0)
    first = 0 if first <= sink else first
    return first, min(sink, first)


@gluon.jit
def block_end(row, block_size, grid_start):
    """Return the end of the block that holds `row`, which may lie past the end of the sequence."""
    return row - (row - grid_start) % block_size + block_size


@gluon.jit
def keys_of_rows(row, stop, n, block_size, window, sink, grid_start):
    """Return (first, first end, last first, end, sinks): what the rows [row, stop) see, from blocks that follow.

    The block of the first row sees [first, first end), that of the last one [last first, end), and both [0, sinks). If
    `first` is 0 and `last first` is not, the last block sees the sinks besides, and `sinks` is 0.
    """
    first_end = min(block_end(row, block_size, grid_start), n)
    end = min(block_end(stop - 1, block_size, grid_start), n)
    first, sinks = own_keys(first_end, window, sink)
    last_first, _ = own_keys(end, window, sink)
    return first, first_end, last_first, end, sinks


@gluon.jit
def tiles_of(length, columns):
    """Return in how many tiles a segment of `length` keys comes."""
    return (length + columns - 1) // columns


@gluon.jit
def walk_of(first, end, low, last_end, sink, columns):
    """Return (skipped, met, rest): how many tiles of the keys [first, end) a consumer meets.

    They go backwards from `end`, and its rows see [low, last_end) and all the `sink` first keys.
    """
    tiles = tiles_of(end - first, columns)
    skipped = tiles - tiles_of(last_end - first, columns)
    rest = 0 if sink > 0 else (low - first) // columns
    return skipped, tiles - skipped - rest, rest


@gluon.jit
def own_keys_apart(end, window, sink):
    """Return (first, sinks) as `own_keys`, where sinks are read by queries of their own: the ranges do not meet.

    Of a block that ends among the sinks, [first, end) are all of them.
    """
    if end <= sink:
        first = 0
        sinks = 0
    else:
        first = max(end - window, sink)
        sinks = sink
    return first, sinks


@gluon.jit
def ring_keys(filled, turn, end, window, sink, ring_window):
    """Return (start, count, low) of a ring's visible slots: [start, start + count) and [0, low).

    The block ends `end` tokens after the newest one in the ring, which has `ring_window` slots besides the sinks. The
    ring has seen `filled` tokens (or more, if full), and the next one that is no sink goes to slot sink + `turn`. All
    sinks are visible; of the rest, what the window still reaches. If that wraps around, its newer part continues them.
    """
    held = max(min(window - end, filled - sink), 0)
    sinks = min(sink, filled)
    wraps = turn < held
    start = sink + turn - held + (ring_window if wraps else 0)
    return start, held - (turn if wraps else 0), sinks + (turn if wraps else 0)
