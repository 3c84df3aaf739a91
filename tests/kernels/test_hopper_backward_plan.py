"""The walks of the Hopper backward, run on the CPU: every visible pair is met once, and nothing hidden is touched."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon")

from swba_kernels import BlockWindow
from swba_kernels.hopper import backward, backward_ranges

NUMPY = SimpleNamespace(minimum=np.minimum, maximum=np.maximum, where=np.where, constexpr=int)
NAMES = (
    "block_end", "queries_of", "query_walk", "latest_row", "key_walk", "key_tile",
    "walk_grid", "next_row", "number_of", "first_tile", "place", "place_apart", "pattern_of", "work_of",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def ranges():
    """Run the kernels' own index functions on numpy numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward_ranges, "gl", NUMPY)
        for name in NAMES:
            patch.setattr(backward_ranges, name, getattr(backward_ranges, name).fn)
        yield


@st.composite
def problems(draw) -> tuple[BlockWindow, int]:
    block_size = draw(st.integers(1, 40))
    window = block_size + draw(st.integers(0, 60))
    pattern = BlockWindow(block_size, window, draw(st.integers(0, 30)), draw(st.integers(0, block_size)))
    return pattern, draw(st.integers(1, 130))


def numbers(pattern: BlockWindow, n: int) -> tuple[int, ...]:
    """Return the pattern as the launcher hands it to the kernels."""
    return (
        n,
        min(pattern.block_size, n - pattern.grid_start),
        min(pattern.window, n),
        min(pattern.sink, n),
        pattern.grid_start,
    )


def walk_queries(pattern: BlockWindow, n: int, keys: int, rows: int) -> np.ndarray:
    """Walk as the kernel of dk and dv does, and return how often each (query, key) pair entered a sum."""
    sizes = numbers(pattern, n)
    met = np.zeros((n, n), int)
    for first in range(0, n, keys):
        start, stop, all_start, all_stop = backward_ranges.query_walk(first, sizes, keys)
        latest = backward_ranges.latest_row(stop, sizes, rows)
        tile = first + np.arange(keys)
        seen_from, seen_to = backward_ranges.queries_of(tile, sizes)
        for walked in range(start, stop, rows):
            row = min(walked, latest)
            queries = row + np.arange(rows)[:, None]
            assert row >= start, "a tile slid back past the queries that see its keys"
            if walked < all_start or walked + rows > all_stop:
                visible = (queries >= np.maximum(seen_from, walked)) & (queries < seen_to)
            else:
                visible = np.ones((rows, keys), bool)
                assert (queries < n).all()
                assert (tile < n).all()
            if stop < n:
                assert (queries < stop).all(), "a query that sees none of the keys was read"
            i_query, i_key = np.nonzero(visible & (queries < n) & (tile < n))
            np.add.at(met, (row + i_query, first + i_key), 1)
            assert not (visible & ((queries >= n) | (tile >= n))).any()
    return met


def walk_fused(pattern: BlockWindow, n: int, keys: int, rows: int, down: bool) -> np.ndarray:
    """Walk as the fused kernel does, and return how often each (query, key) pair entered a sum."""
    sizes = numbers(pattern, n)
    met = np.zeros((n, n), int)
    for first in range(0, n, keys):
        tiles, from_row, to_row, all_start, all_stop = backward_ranges.walk_grid(first, sizes, rows, keys, down)
        tile = first + np.arange(keys)
        seen_from, seen_to = backward_ranges.queries_of(tile, sizes)
        row = from_row
        for i in range(tiles):
            assert row % rows == 0
            assert (row == to_row) == (i == tiles - 1)
            queries = row + np.arange(rows)[:, None]
            visible = np.ones((rows, keys), bool)
            if row < all_start or row + rows > all_stop:
                visible = (queries >= seen_from) & (queries < seen_to)
            assert visible.any()
            assert not (visible & ((queries >= n) | (tile >= n))).any()
            i_query, i_key = np.nonzero(visible)
            np.add.at(met, (row + i_query, first + i_key), 1)
            row = backward_ranges.next_row(row, from_row, to_row, rows, down)
        assert row == from_row, "the next head's walk starts where this one did"
    return met


def take_turns(
    pattern: BlockWindow, n: int, keys: int, rows: int, turn_rows: int, heads: int, group: int, together: int
) -> None:
    """Run the work of the fused kernel in the order in which it is handed out, and assert that it is somebody's turn.

    A program that would wait here waits for one that was handed out later, which may never start.
    """
    sizes = numbers(pattern, n)
    sink = sizes[3]
    apart = sink > 0
    shape = (heads * group, group, heads, together)

    def first_tiles(step: int) -> np.ndarray:
        part = (*sizes[:3], 0, sizes[4])
        of_others = [backward_ranges.first_tile(row, sink, part, keys) for row in range(0, n, step)]
        return np.array([of_others, [0] * len(of_others)][: 1 + apart])[:, None].repeat(heads * group, 1)

    counters, first_writers = ~first_tiles(turn_rows), first_tiles(rows)
    written = np.zeros(first_writers.shape, bool)
    work = -(-sink // keys) + -(-(n - sink) // keys)
    for i_work in range(work * heads):
        in_sinks, part, _, i_h, first, i_sums = backward_ranges.work_of(i_work, sizes, shape, keys, apart)
        count, from_row, to_row, _, _ = backward_ranges.walk_grid(first, part, rows, keys, True)
        tile, _ = backward_ranges.number_of(first, in_sinks, sizes, keys, apart)
        for head in range(i_h * group, (i_h + 1) * group):
            row = from_row
            for _ in range(count):
                at, turn = (i_sums, head, row // rows), (i_sums, head, row // turn_rows)
                if row == from_row or (row + rows) % turn_rows == 0:
                    assert counters[turn] in (tile, ~tile)
                assert (first_writers[at] == tile) == (not written[at])
                assert turn_rows > rows or written[at] == (counters[turn] >= 0)
                written[at] = True
                if row == to_row or row % turn_rows == 0:
                    counters[turn] = tile + 1
                row = backward_ranges.next_row(row, from_row, to_row, rows, True)
    for in_sinks, part in enumerate(written):
        reader = backward._first_reader_of_others(sizes) if apart and not in_sinks else 0
        unread = -(-n // rows) if reader == n else reader // rows
        assert not part[:, :unread].any(), "sums that are cleared, and then added to"
        assert part[:, unread:].all(), "sums that nobody writes"


def walk_keys(pattern: BlockWindow, n: int, rows: int, columns: int) -> np.ndarray:
    """Walk as the kernel of dq does, and return how often each (query, key) pair entered a sum."""
    sizes = numbers(pattern, n)
    _, _, window, sink, _ = sizes
    met = np.zeros((n, n), int)
    for first in range(0, n, rows):
        count, walk = backward_ranges.key_walk(first, sizes, rows, columns)
        assert count >= 1
        query = first + np.arange(rows)[:, None]
        row_end = backward_ranges.block_end(query, sizes)
        seen_by_some = pattern.mask(n).numpy()[first : first + rows].any(0)
        for j in range(int(count)):
            start, stop, edge = backward_ranges.key_tile(j, walk, columns)
            keys = start + np.arange(columns)
            assert start >= 0
            kept = keys[(keys < stop) | (stop >= n)]
            assert seen_by_some[kept[kept < n]].all(), "a key that no row sees stayed in the tile"
            visible = np.ones((rows, columns), bool)
            if edge:
                in_window = (keys >= row_end - window) | (keys < sink)
                visible = in_window & (keys < np.minimum(row_end, stop))
            assert not (visible & (keys >= n)).any()
            i_query, i_key = np.nonzero(visible & (query < n))
            np.add.at(met, (first + i_query, keys[i_key]), 1)
    return met


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from([(8, 4), (8, 8), (12, 4), (12, 8), (1, 1)]))
def test_the_walk_over_queries_meets_every_visible_pair_once(problem, tile) -> None:
    pattern, n = problem
    np.testing.assert_array_equal(walk_queries(pattern, n, *tile), pattern.mask(n).numpy())


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from([(8, 4), (8, 8), (12, 4), (12, 8), (1, 1), (4, 16)]))
def test_the_walk_over_keys_meets_every_visible_pair_once(problem, tile) -> None:
    pattern, n = problem
    np.testing.assert_array_equal(walk_keys(pattern, n, *tile), pattern.mask(n).numpy())


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from([(8, 4), (8, 8), (12, 4), (16, 4), (1, 1), (4, 16)]), st.booleans())
def test_the_fused_walk_meets_every_visible_pair_once_up_or_down(problem, tile, down) -> None:
    pattern, n = problem
    np.testing.assert_array_equal(walk_fused(pattern, n, *tile, down), pattern.mask(n).numpy())


@settings(max_examples=150, deadline=None)
@given(
    problems(),
    st.sampled_from([(8, 4), (8, 8), (12, 4), (16, 4), (1, 1), (4, 16)]),
    st.sampled_from([1, 2, 4]),
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 4)),
)
def test_programs_that_add_in_turn_wait_only_for_those_handed_out_before(problem, tile, tiles, heads) -> None:
    take_turns(*problem, *tile, tiles * tile[1], *heads)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(1, 8))
def test_work_is_handed_out_once_and_by_key_within_a_head(n, batch, kv_heads, together) -> None:
    tiles = -(-n // 4)
    seen = {(b, h): 0 for b in range(batch) for h in range(kv_heads)}
    for i_work in range(tiles * batch * kv_heads):
        i_b, i_h, first = backward_ranges.place(i_work, kv_heads, batch * kv_heads, together, (n, 1, 1, 0, 0), 4)
        assert first == seen[i_b, i_h]
        seen[i_b, i_h] += 4
    assert set(seen.values()) == {tiles * 4}


SHAPES = [
    BlockWindow.from_blocks(64, 3),
    BlockWindow.from_blocks(144, 2, 1),
    BlockWindow(256, 600, 31, 17),
    BlockWindow(333, 700, 130),
    BlockWindow(880, 880, 0, 1),
]


@pytest.mark.parametrize("pattern", SHAPES, ids=str)
@pytest.mark.parametrize("n", [1, 63, 129, 1000])
def test_real_tiles_meet_every_visible_pair_once(pattern, n) -> None:
    mask = pattern.mask(n).numpy()
    for keys, rows in ((128, 64), (192, 64), (128, 128)):
        np.testing.assert_array_equal(walk_queries(pattern, n, keys, rows), mask)
        np.testing.assert_array_equal(walk_keys(pattern, n, keys, rows), mask)
        for down in (False, True):
            np.testing.assert_array_equal(walk_fused(pattern, n, keys, rows, down), mask)
    for turn_rows in (64, 256, 512):
        take_turns(pattern, n, 128, 64, turn_rows, 2, 1, 2)


def test_turns_are_for_calls_with_more_programs_than_start_at_once() -> None:
    for head_dim in (64, 128):
        assert backward.choose_config(head_dim, True, 2.9) is backward.SPLIT[head_dim]
        assert backward.choose_config(head_dim, True, 3.0) is backward.IN_TURN[head_dim]
        for waves in (0.1, 9.0):
            assert backward.choose_config(head_dim, False, waves) is backward.FAST[head_dim]


@pytest.mark.parametrize(("heads", "expected"), [(1, 1), (4, 4), (5, 3), (6, 3), (10, 4), (12, 4), (64, 4)])
def test_heads_run_side_by_side_in_groups_of_nearly_equal_size(heads, expected) -> None:
    assert backward.FAST[128].side_by_side(heads, 1) == expected


@pytest.mark.parametrize("config", [*backward.FAST.values(), *backward.IN_TURN.values()])
def test_as_many_heads_run_side_by_side_as_the_cache_holds(config) -> None:
    for head_bytes in (1, 1 << 20, 3 << 20, 7 << 20, 20 << 20, 1 << 30):
        for heads in (1, 2, 3, 7, 12, 32, 64, 1000):
            together = config.side_by_side(heads, head_bytes)
            assert 1 <= together <= min(heads, config.most_heads)
            assert together <= config.fewest_heads or together * head_bytes <= config.cache
            # One more in every group would be too many, or would not make the groups fewer.
            more = together + 1
            assert (
                more > config.most_heads
                or more * head_bytes > config.cache
                or -(-heads // more) == -(-heads // together)
                or together == heads
            )


@pytest.mark.parametrize(
    ("configs", "heads", "group", "window", "head_dim", "expected"),
    [  # as was measured best, or nearly (docs/benchmarks/h200-side-by-side.json)
        (backward.FAST, 64, 1, 4096, 64, 11),
        (backward.FAST, 32, 1, 9360, 64, 7),
        (backward.FAST, 12, 1, 32760, 64, 4),
        (backward.FAST, 64, 1, 1024, 64, 11),
        (backward.FAST, 32, 1, 4096, 128, 4),
        (backward.FAST, 12, 1, 9360, 128, 3),
        (backward.FAST, 12, 1, 32760, 128, 2),
        (backward.FAST, 4, 4, 9360, 128, 2),
        (backward.IN_TURN, 64, 1, 4096, 64, 22),
        (backward.IN_TURN, 32, 1, 9360, 64, 8),
        (backward.IN_TURN, 12, 1, 32760, 64, 6),
        (backward.IN_TURN, 64, 1, 1024, 64, 32),
        (backward.IN_TURN, 4, 4, 9360, 128, 4),
    ],
)
def test_heads_side_by_side_of_calls_that_were_measured(configs, heads, group, window, head_dim, expected) -> None:
    n = 2 * window
    q, k = (torch.empty(1, h, n, head_dim, dtype=torch.float16, device="meta") for h in (heads * group, heads))
    call = backward._Call(q, None, k, k, q, q, q, 1.0, (n, 64, window, 0, 0))
    assert call.head_bytes() == group * window * (2 * 2 * head_dim + 4 * head_dim)
    assert configs[head_dim].side_by_side(heads, call.head_bytes()) == expected
