"""The block window as index arithmetic inside kernels: which rows a tile owns, and which keys or queries it meets.

All numbers are tokens relative to the sequence (or the call) that the kernel walks.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_rows(i_tile, n, group, per_group, grid_start, ROWS: tl.constexpr):
    """Return the half-open row range of tile `i_tile`, empty when the tile lies past its group or the sequence."""
    group_start = grid_start + (i_tile // per_group) * group
    first = tl.maximum(group_start, 0) + (i_tile % per_group) * ROWS
    last = tl.minimum(tl.minimum(group_start + group, n), first + ROWS)
    return first, last


@triton.jit
def block_end(row, n, block_size, grid_start):
    """Return the end of the block that holds `row`, clipped to the sequence."""
    return tl.minimum(row - (row - grid_start) % block_size + block_size, n)


@triton.jit
def key_phases(end_first, end_last, window, sink, COLUMNS: tl.constexpr, low=0):
    """Cut the keys of a query tile whose first and last block ends are given into full and masked tiles.

    Keys of the window below `low` are left out: sinks that a query of their own has met.

    Returns (sink_stop, sink_full, sink_tail, left_start, left_tiles, mid_start, mid_tiles, right_start, right_tiles):
    sinks [0, sink_stop) are `sink_full` full tiles and `sink_tail` masked ones; `left_tiles` masked tiles follow from
    left_start, `mid_tiles` full ones from mid_start, `right_tiles` masked ones from right_start up to end_last.
    """
    left_start = tl.maximum(end_first - window, low)
    left_tiles = tl.cdiv(tl.maximum(end_last - window, low) - left_start, COLUMNS)
    sink_stop = tl.minimum(sink, left_start)
    sink_full = sink_stop // COLUMNS
    sink_tail = tl.cdiv(sink_stop, COLUMNS) - sink_full
    mid_start = left_start + left_tiles * COLUMNS
    mid_tiles = tl.maximum(end_first - mid_start, 0) // COLUMNS
    right_start = mid_start + mid_tiles * COLUMNS
    right_tiles = tl.cdiv(tl.maximum(end_last - right_start, 0), COLUMNS)
    return sink_stop, sink_full, sink_tail, left_start, left_tiles, mid_start, mid_tiles, right_start, right_tiles


@triton.jit
def masked_key_tile(
    j, end_last, sink_stop, sink_full, sink_tail, left_start, left_tiles, right_start, COLUMNS: tl.constexpr
):
    """Return (start, stop) of masked key tile `j`, counted through sink tail, left edge and right edge."""
    edge = j - sink_tail
    start = tl.where(edge < left_tiles, left_start + edge * COLUMNS, right_start + (edge - left_tiles) * COLUMNS)
    in_sink = j < sink_tail
    return tl.where(in_sink, sink_full * COLUMNS, start), tl.where(in_sink, sink_stop, end_last)


@triton.jit
def cut_at_sink(i_tile, tiles, n, sink, group, per_group, grid_start, ROWS: tl.constexpr):
    """Return the rows of tile `i_tile` where none may hold rows on both sides of `sink`.

    The tile that holds the boundary keeps what lies before it; the rest is tile number `tiles`, one more than there
    are of them.
    """
    first, last = tile_rows(i_tile, n, group, per_group, grid_start, ROWS)
    if i_tile < tiles:
        last = tl.where(first < sink, tl.minimum(last, sink), last)
    else:
        i_group = (sink - grid_start) // group
        start = tl.maximum(grid_start + i_group * group, 0)
        i_cut = i_group * per_group + (sink - start) // ROWS
        cut, last = tile_rows(i_cut, n, group, per_group, grid_start, ROWS)
        first = tl.where(cut < sink, sink, last)
    return first, last


@triton.jit
def last_query(key, n, block_size, window, grid_start):
    """Return the end of the queries whose window reaches `key` (sinks apart)."""
    reach = grid_start + (key + window - grid_start) // block_size * block_size
    return tl.where(key + window >= n, n, tl.minimum(reach, n))
