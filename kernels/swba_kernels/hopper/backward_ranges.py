"""The block window as the backward kernels walk it: which queries meet a tile of keys, which keys a tile of queries.

`pattern` is (n, block_size, window, sink, grid_start), in tokens. Where sinks are read by queries of their own, the
gradients fall into two parts that share no key: that of the sinks and that of all other keys. Each walks by itself.

Tiles lie on a fixed grid of the sequence and may straddle blocks, so that nothing is padded; only tiles at the edge of
somebody's range need an element mask. The tests run these functions on numpy arrays: keep them free of anything but
integer arithmetic, minimum, maximum and where, and of negative dividends.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def block_end(row, pattern):
    """Return the end of the block that holds `row`, clipped to the sequence."""
    n, block_size, _, _, grid_start = pattern
    return gl.minimum(row - (row - grid_start) % block_size + block_size, n)


@gluon.jit
def queries_of(key, pattern):
    """Return the half-open range of the queries that see `key`: one range, sink or not."""
    n, block_size, window, sink, grid_start = pattern
    start = gl.maximum(key - (key - grid_start) % block_size, 0)
    reach = grid_start + (key + window - grid_start) // block_size * block_size
    stop = gl.where((key < sink) | (key + window >= n), n, reach)
    return start, gl.where(key < n, stop, start)


@gluon.jit
def query_walk(first, pattern, KEYS: gl.constexpr):
    """Return (start, stop, all_start, all_stop) for the keys [first, first + KEYS), of which the first exists.

    Queries [start, stop) see some of the keys, queries [all_start, all_stop) all of them (an empty range if the tile
    hangs over the end of the sequence).
    """
    n, _, _, sink, _ = pattern
    last = gl.minimum(first + KEYS, n) - 1
    start, stop_first = queries_of(first, pattern)
    all_start, stop_last = queries_of(last, pattern)
    _, stop_window = queries_of(gl.maximum(first, sink), pattern)
    stop = gl.maximum(stop_first, stop_last)
    all_stop = gl.where(last < sink, n, stop_window)
    all_start = gl.where(first + KEYS > n, n, all_start)
    return start, stop, all_start, all_stop


@gluon.jit
def latest_row(stop, pattern, ROWS: gl.constexpr):
    """Return where the last tile of queries before `stop` may start.

    A tile that would reach past `stop` slides back instead, and a mask hides what it meets again: a query that sees
    none of the keys may hold NaN, and 0 x NaN is NaN. Past the end of the sequence a tile reads zeros, so it may hang
    over; everywhere else the range is at least as long as the tile of keys, so there is room to slide.
    """
    n, _, _, _, _ = pattern
    return gl.where(stop < n, stop - ROWS, n)


@gluon.jit
def key_walk(first, pattern, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Return (tiles, walk) for the query rows [first, first + ROWS); `walk` is what `key_tile` asks for.

    walk = (sink_stop, sink_tiles, left, all_left, all_stop, stop): the rows see sinks [0, sink_stop), in `sink_tiles`
    tiles, and some of the keys [left, stop); all rows see the keys [all_left, all_stop).
    """
    n, _, window, sink, _ = pattern
    end_first = block_end(first, pattern)
    end_last = block_end(gl.minimum(first + ROWS, n) - 1, pattern)
    left = gl.maximum(end_first - window, 0)
    sink_stop = gl.minimum(sink, left)
    sink_tiles = (sink_stop + COLUMNS - 1) // COLUMNS
    tiles = sink_tiles + (end_last - left + COLUMNS - 1) // COLUMNS
    return tiles, (sink_stop, sink_tiles, left, end_last - window, end_first, end_last)


@gluon.jit
def key_tile(j, walk, COLUMNS: gl.constexpr):
    """Return (start, stop, edge) of key tile `j` of a walk; an edge tile holds keys that not every row sees."""
    sink_stop, sink_tiles, left, all_left, all_stop, stop = walk
    in_sink = j < sink_tiles
    start = gl.where(in_sink, j * COLUMNS, left + (j - sink_tiles) * COLUMNS)
    in_window = (start >= all_left) & (start + COLUMNS <= all_stop)
    whole = gl.where(in_sink, start + COLUMNS <= sink_stop, in_window)
    return start, gl.where(in_sink, sink_stop, stop), whole == 0


@gluon.jit
def place(i_work, kv_heads, all_heads, together, pattern, BLOCK_N: gl.constexpr):
    """Return (batch row, kv head, first key) of a piece of work.

    Up to `together` of all B * Hkv heads run side by side, tile by tile: few enough that what their programs read and
    add to stays in the L2 cache.
    """
    n, _, _, _, _ = pattern
    tiles = (n + BLOCK_N - 1) // BLOCK_N
    before = i_work // (tiles * together) * together
    together = gl.minimum(all_heads - before, together)
    i_work -= before * tiles
    i_kv = before + i_work % together
    return i_kv // kv_heads, i_kv % kv_heads, i_work // together * BLOCK_N


@gluon.jit
def walk_grid(first, pattern, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, DOWN: gl.constexpr):
    """Return how a tile of keys walks over the queries that see it: (tiles, first row, last row, range all keys share).

    Rows are those of tiles on the grid; DOWN walks from the end of the sequence to its start. So programs that add in
    turn, by key, seldom wait: a tile of keys further on in the sequence starts as many queries further on, and meets
    those of the tile before it when that one has long passed.
    """
    start, stop, all_start, all_stop = query_walk(first, pattern, BLOCK_N)
    low = start // BLOCK_M * BLOCK_M
    tiles = (stop - low + BLOCK_M - 1) // BLOCK_M
    high = low + (tiles - 1) * BLOCK_M
    if DOWN:
        return tiles, high, low, all_start, all_stop
    else:
        return tiles, low, high, all_start, all_stop


@gluon.jit
def next_row(row, from_row, to_row, BLOCK_M: gl.constexpr, DOWN: gl.constexpr):
    """Step to the next tile of queries of a walk; behind the last one follows the first one of the next head."""
    if DOWN:
        following = row - BLOCK_M
    else:
        following = row + BLOCK_M
    return gl.where(row == to_row, from_row, following)


@gluon.jit
def number_of(first, in_sinks, pattern, KEYS: gl.constexpr, Q_SINK: gl.constexpr):
    """Return (number of the tile of keys that starts at `first`, where its part starts), counted in its part."""
    _, _, _, sink, _ = pattern
    if Q_SINK:
        origin = gl.where(in_sinks, 0, sink)
        return (first - origin) // KEYS, origin
    else:
        return first // KEYS, 0


@gluon.jit
def first_tile(row, origin, pattern, KEYS: gl.constexpr):
    """Return which tile of keys is the first to meet the tile of queries that starts at `row`.

    Tiles of KEYS keys lie on a grid from `origin` on, and those that meet the queries follow each other.
    """
    _, _, window, _, _ = pattern
    return (gl.maximum(block_end(row, pattern) - window, origin) - origin) // KEYS


@gluon.jit
def pattern_of(in_sinks, pattern):
    """Return the pattern as one of the two parts has it: who sees a sink sees all, and other keys are no sinks."""
    n, block_size, window, _, grid_start = pattern
    return n, block_size, gl.where(in_sinks, n, window), 0, grid_start


@gluon.jit
def place_apart(i_work, kv_heads, all_heads, together, pattern, BLOCK_N: gl.constexpr):
    """Return (in_sinks, batch row, kv head, first key) of a piece of work; sinks, which most queries see, go first."""
    n, block_size, window, sink, grid_start = pattern
    sink_work = (sink + BLOCK_N - 1) // BLOCK_N * all_heads
    in_sinks = i_work < sink_work
    keys = gl.where(in_sinks, sink, n - sink)
    i_work -= gl.where(in_sinks, 0, sink_work)
    of_part = (keys, block_size, window, sink, grid_start)
    i_b, i_h, first = place(i_work, kv_heads, all_heads, together, of_part, BLOCK_N)
    return in_sinks, i_b, i_h, first + gl.where(in_sinks, 0, sink)


@gluon.jit
def work_of(i_work, pattern, shape, BLOCK_N: gl.constexpr, Q_SINK: gl.constexpr):
    """Return (in_sinks, pattern, batch row, kv head, first key, batch row of the sums) of a piece of work.

    The sums of queries that read sinks follow those of all others.
    """
    heads, group, kv_in_all, together = shape
    kv_heads = heads // group
    if Q_SINK:
        in_sinks, i_b, i_h, first = place_apart(i_work, kv_heads, kv_in_all, together, pattern, BLOCK_N)
        i_sum = i_b + gl.where(in_sinks, kv_in_all // kv_heads, 0)
        return in_sinks, pattern_of(in_sinks, pattern), i_b, i_h, first, i_sum
    else:
        i_b, i_h, first = place(i_work, kv_heads, kv_in_all, together, pattern, BLOCK_N)
        return False, pattern, i_b, i_h, first, i_b


@gluon.jit
def hide_others(keys, seen_from, seen_to, in_sinks, pattern):
    """Return seen_to such that no query sees the keys that a tile of sinks holds behind them."""
    n, _, _, sink, _ = pattern
    return gl.where(keys < gl.where(in_sinks, sink, n), seen_to, seen_from)


@gluon.jit
def all_start_without_others(all_start, first, in_sinks, pattern, KEYS: gl.constexpr):
    """Return all_start such that no query sees all keys of a tile that holds others behind its sinks."""
    n, _, _, sink, _ = pattern
    return gl.where(first + KEYS > gl.where(in_sinks, sink, n), n, all_start)


@gluon.jit
def key_walk_apart(first, in_sinks, pattern, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Return (tiles, walk) as `key_walk`, over the sinks or over the other keys; some row sees some of them."""
    n, _, window, sink, _ = pattern
    end_first = block_end(first, pattern)
    end_last = block_end(gl.minimum(first + ROWS, n) - 1, pattern)
    left = gl.where(in_sinks, 0, gl.maximum(end_first - window, sink))
    past = gl.where(in_sinks, sink, n)
    stop = gl.minimum(end_last, past)
    all_left = gl.where(in_sinks, 0, end_last - window)
    return (stop - left + COLUMNS - 1) // COLUMNS, (0, 0, left, all_left, gl.minimum(end_first, past), stop)
