"""The schedule of the Hopper forward in plain Python: every row once, exactly the visible keys, evenly spread."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swba_kernels import BlockWindow
from swba_kernels.reference import ring_layout

pytest.importorskip("triton.experimental.gluon")

from swba_kernels.hopper import forward_plan, forward_small
from swba_kernels.hopper.forward import SMALLEST_STRADDLED, choose_config
from swba_kernels.hopper.forward_plan import Plan, plan_forward

place_of, rows_of = forward_plan.place_of.fn, forward_plan.rows_of.fn
own_keys, ring_keys = forward_plan.own_keys.fn, forward_plan.ring_keys.fn
keys_of_rows, walk_of, block_end = (getattr(forward_plan, name).fn for name in ("keys_of_rows", "walk_of", "block_end"))
start_of, stop_of = forward_small.start_of.fn, forward_small.stop_of.fn
is_low_edge, unseen_of = forward_small.is_low_edge.fn, forward_small.unseen_of.fn


@pytest.fixture(scope="module", autouse=True)
def plain_functions():
    """Let `keys_of_rows` call plain Python functions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_plan, "block_end", block_end)
        patch.setattr(forward_plan, "own_keys", own_keys)
        patch.setattr(forward_plan, "tiles_of", forward_plan.tiles_of.fn)
        yield


@st.composite
def patterns(draw, largest: int = 40) -> BlockWindow:
    block = draw(st.integers(1, largest))
    window = block + draw(st.integers(0, 3 * largest))
    return BlockWindow(block, window, draw(st.integers(0, 2 * largest)), draw(st.integers(0, block)))


def places(plan: Plan, heads: int) -> list[tuple[int, int, int]]:
    """Return (head, block, tile) of every work item, in order."""
    shared = (heads * plan.heavy, heads * plan.per_block, *plan)
    return [place_of(i, *shared) for i in range(heads * plan.tiles)]


def sizes(pattern: BlockWindow) -> tuple[int, int, int, int]:
    return pattern.block_size, pattern.window, pattern.sink, pattern.grid_start


def sizes_within(pattern: BlockWindow, n: int) -> tuple[int, int, int, int]:
    """Return the sizes as the launcher hands them on for a call of `n` tokens."""
    block_size, window, sink, grid_start = sizes(pattern)
    window, sink = (n, 0) if window + sink >= n else (min(window, n), min(sink, n))
    return block_size, window, sink, grid_start


@settings(max_examples=400, deadline=None)
@given(patterns(), st.integers(1, 200), st.integers(1, 5), st.sampled_from([1, 3, 8, 64]), st.booleans())
def test_items_hold_every_row_of_every_head_once_and_never_straddle_blocks(pattern, n, heads, rows, on_ring) -> None:
    weighed = (0, 0) if on_ring else (pattern.window, pattern.sink)
    plan = plan_forward(n, pattern.block_size, *weighed, pattern.grid_start, rows)
    seen = []
    for head, block, tile in places(plan, heads):
        first, end = rows_of(block, tile, n, pattern.block_size, pattern.grid_start, rows)
        assert first < end
        assert any(start <= first and end == stop for start, stop in pattern.blocks(n))
        seen += [(head, row) for row in range(first, min(first + rows, end))]
    assert sorted(seen) == [(head, row) for head in range(heads) for row in range(n)]


@settings(max_examples=200, deadline=None)
@given(patterns(), st.integers(1, 200), st.integers(1, 5), st.sampled_from([3, 8, 64]))
def test_heavy_items_come_first_and_late_blocks_before_early_ones(pattern, n, heads, rows) -> None:
    plan = plan_forward(n, *sizes(pattern), rows)
    items = places(plan, heads)
    full = [
        (block + 1) * pattern.block_size + pattern.grid_start >= pattern.window + pattern.sink for _, block, _ in items
    ]
    heavy = heads * plan.heavy
    assert full == [True] * heavy + [False] * (len(items) - heavy)
    assert [x[0] for x in items[:heavy]] == sorted(x[0] for x in items[:heavy])
    if plan.lacking == 0:
        light = [block for _, block, _ in items[heavy:]]
        assert light == sorted(light, reverse=True)


@settings(max_examples=300, deadline=None)
@given(patterns(), st.integers(1, 200), st.integers(1, 5), st.sampled_from([1, 3, 8, 64]))
def test_straddling_items_hold_every_row_of_every_head_once_heavy_ones_first(pattern, n, heads, rows) -> None:
    """A tile is heavy if its last row, be it past the end of the sequence, sees a full window."""
    block_size, window, sink, grid_start = sizes_within(pattern, n)
    plan = plan_forward(n, block_size, window, sink, grid_start, rows, straddle=True)
    items = places(plan, heads)
    firsts = []
    for _, block, tile in items:
        first, end = rows_of(block, tile, n, rows, 0, rows)
        assert (first % rows, end) == (0, min(first + rows, n))
        firsts.append(first)
    every_tile = [(head, first) for head in range(heads) for first in range(0, n, rows)]
    assert sorted((head, first) for (head, _, _), first in zip(items, firsts, strict=True)) == every_tile
    heavy = heads * plan.heavy
    full = [block_end(first + rows - 1, block_size, grid_start) >= window + sink for first in firsts]
    assert full == [True] * heavy + [False] * (len(items) - heavy)
    assert [x[0] for x in items[:heavy]] == sorted(x[0] for x in items[:heavy])
    assert firsts[heavy:] == sorted(firsts[heavy:], reverse=True)


def ends_of_ctas(work: list[float], ctas: int) -> list[float]:
    """Return when each CTA ends if whoever is free takes the next item, as the kernel's tickets have it."""
    free = [0.0] * ctas
    for time in work:
        heapq.heapreplace(free, free[0] + time)
    return free


@pytest.mark.parametrize("straddle", [False, True])
@pytest.mark.parametrize(
    ("pattern", "n"),
    [
        (BlockWindow(1560, 1560 * 6), 1560 * 21),
        (BlockWindow(4680, 4680 * 7), 4680 * 7),
        (BlockWindow(333, 333 * 9), 333 * 120 + 100),
        (BlockWindow(144, 144 * 16, 144), 144 * 256),
    ],
    ids=str,
)
def test_ctas_that_take_items_as_they_get_free_end_together(pattern, n, straddle) -> None:
    """12 heads over 132 CTAs; a tile costs its keys, less if one of its two consumers has no rows."""
    block_size, window, sink, grid_start = sizes_within(pattern, n)
    plan = plan_forward(n, block_size, window, sink, grid_start, 128, straddle)
    work = []
    for _, block, tile in places(plan, 12):
        first, end = rows_of(block, tile, n, *((128, 0) if straddle else (block_size, grid_start)), 128)
        end = min(end, first + 128)
        low, _, _, stop, sinks = keys_of_rows(first, end, n, block_size, window, sink, grid_start)
        work.append((sinks + stop - low) * (1.0 if end - first > 64 else 0.6))
    ends = ends_of_ctas(work, 132)
    mean = sum(ends) / 132
    assert 0.99 * mean < min(ends) <= max(ends) < 1.01 * mean


@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_straddle_where_a_consumers_rows_lie_in_two_blocks_at_most(head_dim) -> None:
    chosen = set()
    for block in range(1, 1000):
        for window in (block, 2 * block, 5 * block, 40 * block):
            config, straddle = choose_config(head_dim, block, window, False, True)
            assert not straddle or (block >= SMALLEST_STRADDLED >= 64 and config.groups != 3)
            assert not choose_config(head_dim, block, window, True, False)[1]
            assert block % (config.groups * 64) or not straddle, "no tile of whole blocks has an idle row"
            chosen.add(straddle)
    assert chosen == {False, True}


def tiles_of(start: int, length: int, columns: int) -> list[int]:
    """Return where the producer's tiles of the keys [start, start + length) begin (forward_producer._copy)."""
    tiles = -(-length // columns)
    return [start + length - columns, *(start + i * columns for i in range(tiles - 2, -1, -1))][:tiles]


def not_hidden(key: int, columns: int, queries: np.ndarray, limits: list[int], sink: int) -> np.ndarray:
    """Return what of a tile that starts at `key` is left to the rows `queries` (forward_consumer._hide_unseen)."""
    low, first_end, last_low, last_end = limits
    if key >= last_low and key + columns <= first_end:
        return np.ones((len(queries), columns), bool)
    keys, early = key + np.arange(columns), queries < first_end
    seen = (keys >= np.where(early, low, last_low)) | (keys < sink)
    return seen & (keys < np.where(early, first_end, last_end))


def walk_straddling(pattern: BlockWindow, n: int, rows: int, groups: int, columns: int) -> np.ndarray:
    """Walk as `groups` consumers of `rows` rows do (forward_consumer._attend_straddling).

    Return how often each (query, key) pair entered a sum.
    """
    _, _, sink, _ = numbers = sizes_within(pattern, n)
    visible, met = pattern.mask(n).numpy(), np.zeros((n, n), int)
    for tile in range(0, n, groups * rows):
        tile_end = min(tile + groups * rows, n)
        first, _, _, end, sinks = keys_of_rows(tile, tile_end, n, *numbers)
        own, of_sinks = tiles_of(first, end - first, columns), tiles_of(0, sinks, columns)
        for row in range(tile, tile_end, rows):
            queries = row + np.arange(rows)[:, None]
            *limits, _ = keys_of_rows(row, min(row + rows, n), n, *numbers)
            skipped, taken, rest = walk_of(first, end, limits[0], limits[3], sink, columns)
            assert min(skipped, taken - 1, rest) >= 0
            assert skipped + taken + rest == len(own), "consumers have to agree on the number of tiles"
            assert rest == 0 or sinks == 0, "sinks are met before what is left of the window"
            walk = []
            for i in range(taken):
                ragged = skipped + i == 0
                key = end - columns if ragged else first + ((end - first - 1) // columns - skipped - i) * columns
                assert key == own[skipped + i], "the consumer takes a tile for another one"
                length = end - first if ragged else columns
                walk.append((key, length, not_hidden(key, columns, queries, limits, sink)))
            walk += [(key, columns if i else sinks, queries < n) for i, key in enumerate(of_sinks)]
            for key, length, seen in walk:
                hidden = -length % columns
                seen = seen & (queries < n) & (np.arange(columns) >= hidden)
                i_row, i_column = np.nonzero(seen)
                np.add.at(met, (row + i_row, key + i_column), 1)
                kept = np.arange(key + (hidden if length < columns else 0), key + columns)
                assert visible[tile:tile_end, kept].any(0).all(), "a key that no row of the tile sees was not cleared"
    return met


@st.composite
def straddled(draw) -> tuple[BlockWindow, int, int]:
    """Draw a pattern, a number of tokens, and rows of a consumer that lie in two blocks at most."""
    rows = draw(st.sampled_from([4, 8, 16]))
    block = rows + draw(st.integers(0, 50))
    sink = draw(st.one_of(st.just(0), st.integers(1, 100)))
    pattern = BlockWindow(block, block + draw(st.integers(0, 150)), sink, draw(st.integers(0, block)))
    return pattern, draw(st.integers(1, 300)), rows


@settings(max_examples=400, deadline=None)
@given(straddled(), st.integers(2, 4), st.sampled_from([4, 8, 16, 32]))
def test_consumers_of_straddling_tiles_meet_every_visible_pair_once(problem, groups, columns) -> None:
    pattern, n, rows = problem
    np.testing.assert_array_equal(walk_straddling(pattern, n, rows, groups, columns), pattern.mask(n).numpy())


@pytest.mark.parametrize("block", [64, 96, 130, 144, 333])
@pytest.mark.parametrize("sink", [0, 1, 300])
def test_straddling_tiles_of_real_sizes_meet_every_visible_pair_once(block, sink) -> None:
    for pattern, n in ((BlockWindow(block, 3 * block, sink), 1000), (BlockWindow(block, 400, sink, 9), 777)):
        for groups, columns in ((2, 128), (4, 64)):
            np.testing.assert_array_equal(walk_straddling(pattern, n, 64, groups, columns), pattern.mask(n).numpy())


@settings(max_examples=300, deadline=None)
@given(patterns(), st.integers(1, 200))
def test_own_keys_are_those_the_pattern_shows(pattern, n) -> None:
    for start, end in pattern.blocks(n):
        first, sinks = own_keys(end, pattern.window, pattern.sink)
        assert sinks == 0 or sinks < first
        seen = [*range(sinks), *range(first, end)]
        assert seen == [k for k in range(n) if pattern.visible(start, k, n)]


def ring_slots(position: int, end: int, pattern: BlockWindow, ring_window: int) -> list[int]:
    """Return the slots that a block ending `end` tokens after `position` reads, the way the kernel finds them."""
    filled = min(position, 1 << 30)
    turn = (position - pattern.sink) % (1 << 64) % ring_window
    start, count, low = ring_keys(filled, turn, end, pattern.window, pattern.sink, ring_window)
    assert start >= 0 or count == 0
    assert start + count <= pattern.sink + ring_window or count == 0
    return [*range(low), *range(start, start + count)]


@settings(max_examples=600, deadline=None)
@given(patterns(), st.integers(0, 500), st.integers(1, 60), st.sampled_from([0, 0, 1, 7, 50]))
def test_ring_segments_hold_exactly_the_visible_history(pattern, position, n, spare) -> None:
    ring_window = pattern.window + spare
    tokens, slots = ring_layout(position, pattern.sink + ring_window, pattern.sink)
    slot_of = dict(zip(tokens, slots, strict=True))
    for end in (e for e in pattern.block_ends(n)):
        oldest = position + end - pattern.window
        visible = [p for p in range(position) if p >= oldest or p < pattern.sink]
        assert sorted(ring_slots(position, end, pattern, ring_window)) == sorted(slot_of[p] for p in visible)


@pytest.mark.parametrize("position", [(1 << 30) - 1, 1 << 30, (1 << 31) + 5, 10**12 + 7])
def test_a_ring_has_no_last_position(position) -> None:
    for sink in (0, 3):
        pattern = BlockWindow(5, 17, sink)
        expected = {p if p < sink else sink + (p - sink) % 17 for p in range(position - 12, position)} | set(
            range(sink)
        )
        assert sorted(ring_slots(position, 5, pattern, 17)) == sorted(expected)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 100), st.integers(1, 400), st.sampled_from([64, 128]))
def test_tiles_of_a_segment_show_every_key_once(start, length, columns) -> None:
    """The tile walk of forward_producer._copy, with the mask of forward_consumer._hide_first."""
    tiles = -(-length // columns)
    hidden = tiles * columns - length
    row, seen = start + length - columns, []
    for j in range(tiles):
        seen += [row + c for c in range(columns) if j > 0 or c >= hidden]
        if length >= columns:
            assert start <= row <= start + length - columns
        row = start + (tiles - 2 - j) * columns
    assert sorted(seen) == list(range(start, start + length))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, forward_small.KEYS + 20), st.integers(0, 300), st.integers(0, 126), st.integers(1, 500))
@example(128, 0, 1, 300)
@example(128, 172, 65, 500)
@example(1000, 0, 100, 127)
@example(1, 499, 0, 600)
def test_small_blocks_every_row_meets_its_keys_once_and_some_of_them_at_once(block, more, first_block, n) -> None:
    """The masks of the kernel: all bounds in its first tile, the lower ones and the overlap in its last two."""
    pattern = BlockWindow(block, block + more, 0, min(first_block, block))
    keys = forward_small.KEYS
    if not forward_small.serves(64, block, n, 0):
        return
    ends = [min(block_end(row, block, pattern.grid_start), n) for row in range(n)]
    lows = [max(end - pattern.window, 0) for end in ends]
    for row in range(0, n, 64):
        rows = range(row, min(row + 64, n))
        first, end = lows[row], min(block_end(row + 63, block, pattern.grid_start), n)
        assert (first, end) == (min(lows[r] for r in rows), max(ends[r] for r in rows))
        tiles = -(-(end - first) // keys)
        starts = [start_of(tile, tiles, first, end, keys) for tile in range(tiles)]
        assert starts[0] + max(unseen_of(first, end, keys), 0) >= 0
        assert tiles == 1 or min(starts) == first
        for r in rows:
            met = [key for key in range(starts[0], starts[0] + keys) if lows[r] <= key < ends[r]]
            assert met, "an online softmax needs a score in its first tile"
            for tile in range(1, tiles):
                tile_keys = range(starts[tile], starts[tile] + keys)
                low, stop = (lows[r], stop_of(tile, end, keys)) if is_low_edge(tile, tiles) else (0, n)
                met += [key for key in tile_keys if low <= key < stop]
            assert sorted(met) == [key for key in range(n) if pattern.visible(r, key, n)]
        if tiles == 1:
            cleared = range(starts[0], starts[0] + max(unseen_of(first, end, keys), 0))
            assert list(cleared) == [key for key in range(end - keys, end) if key < first]


def test_the_kernel_for_small_blocks_is_for_what_its_masks_allow() -> None:
    assert forward_small.serves(64, 127, 4000, 0)
    assert forward_small.serves(64, 4000, 127, 0)
    assert not forward_small.serves(64, 128, 128, 0)
    assert not forward_small.serves(64, 48, 4000, 1)
    assert not forward_small.serves(128, 48, 4000, 0)
