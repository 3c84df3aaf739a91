"""Which rows and which keys: the schedule of the Hopper forward as integer arithmetic.

The kernel calls these functions on the device. They use nothing but +, -, *, //, %, min and max, and divide only
numbers that are not negative, so the tests call the very same ones (as `function.fn`) in plain Python.

Each of B * H heads is cut into blocks, and each block into tiles of `rows` rows. A tile never straddles blocks, so all
its rows see the same keys: at most four contiguous segments (the own window, own sinks, two parts of a ring).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from triton.experimental import gluon


class Plan(NamedTuple):
    """How a head is cut: `blocks` blocks of `per_block` tiles (fewer in the first, `last_tiles` in the last).

    Counted from the end of the sequence, the first `heavy` tiles of a head see a full window and so cost the same; the
    `light` ones after them see less and less.
    """

    blocks: int
    per_block: int
    last_tiles: int
    heavy: int
    light: int

    @property
    def tiles(self) -> int:
        """Tiles of one head."""
        return self.heavy + self.light


@lru_cache(maxsize=1024)
def plan_forward(n: int, block_size: int, window: int, sink: int, grid_start: int, rows: int) -> Plan:
    """Cut `n` tokens; `grid_start` <= 0 is where the block grid starts, `rows` the height of a tile."""
    blocks = -(-(n - grid_start) // block_size)
    starts = [max(grid_start, 0), max(grid_start + (blocks - 1) * block_size, 0)]
    first_tiles = -(-(min(grid_start + block_size, n) - starts[0]) // rows)
    last_tiles = -(-(n - starts[1]) // rows)
    per_block = -(-min(block_size, n) // rows)
    tiles = last_tiles if blocks == 1 else first_tiles + (blocks - 2) * per_block + last_tiles
    # Block i ends at grid_start + (i + 1) * block_size; from `full` on, blocks see window + sink keys.
    full = max(0, -(-(window + sink - grid_start) // block_size) - 1)
    if full >= blocks:
        heavy = 0
    elif full == 0:
        heavy = tiles
    else:
        heavy = last_tiles + (blocks - 1 - full) * per_block
    return Plan(blocks, per_block, last_tiles, heavy, tiles - heavy)


@gluon.jit
def place_of(item, heads, blocks, per_block, last_tiles, heavy, light):
    """Return (head, block, tile in block) of work item `item` of `heads * (heavy + light)`, heaviest first.

    Heavy tiles go head by head: CTAs that run side by side then share keys in L2. The light ones go block by block over
    all heads, latest block first, so that the last wave is of short items.
    """
    if item < heads * heavy:
        head = item // heavy
        place = item % heavy
    else:
        rest = item - heads * heavy
        group = rest // (heads * per_block)
        rest = rest - group * heads * per_block
        size = min(per_block, light - group * per_block)
        head = rest // size
        place = heavy + group * per_block + rest % size
    if place < last_tiles:
        block = blocks - 1
        tile = place
    else:
        block = blocks - 2 - (place - last_tiles) // per_block
        tile = (place - last_tiles) % per_block
    return head, block, tile


@gluon.jit
def rows_of(block, tile, n, block_size, grid_start, rows):
    """Return (first row, end of the block) of a tile of `rows` rows; its last rows may lie past that end."""
    start = grid_start + block * block_size
    return max(start, 0) + tile * rows, min(start + block_size, n)


@gluon.jit
def rounds_of(full, rest, cta, ctas):
    """Return how many work items a CTA has: one in each of `full` rounds, and perhaps one of the `rest`."""
    turn = ctas - 1 - cta if full % 2 == 1 else cta
    return full + (1 if turn < rest else 0)


@gluon.jit
def item_of(i, cta, ctas):
    """Return the i-th work item of a CTA. Even rounds go up and odd ones down, which evens out falling weights."""
    turn = ctas - 1 - cta if i % 2 == 1 else cta
    return i * ctas + turn


@gluon.jit
def own_keys(end, window, sink):
    """Return (first, sinks): a block that ends at `end` sees the keys [0, sinks) and [first, end)."""
    first = max(end - window, 0)
    first = 0 if first <= sink else first
    return first, min(sink, first)


@gluon.jit
def ring_keys(position, end, window, sink, slots):
    """Return (start, count, low) of a ring's visible slots: [start, start + count) and [0, low).

    The block ends `end` tokens after `position`, the number of tokens the ring has seen. All sinks in the ring are
    visible; of the rest, what the window still reaches. Where that wraps around, its second part continues the sinks.
    """
    oldest = max(position + end - window, sink)
    count = max(position - oldest, 0)
    start = sink + (oldest - sink) % (slots - sink)
    wrapped = max(start + count - slots, 0)
    return start, count - wrapped, min(sink, position) + wrapped
