"""Which keys the Hopper kernels read by q and which by q_sink, walked through in Python as the kernels walk."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("triton.experimental.gluon")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swba_kernels import BlockWindow
from swba_kernels.hopper import backward, forward_plan, supports
from swba_kernels.hopper import backward_ranges as ranges
from swba_kernels.hopper.decode_plan import CONFIGS, MOST_SLOTS_BY_TILES, lane_plans, runs_of_part, table_of
from swba_kernels.reference import ring_layout

DECODE_CONFIGS = [config for configs in CONFIGS.values() for config in configs]


def slots_of_part(low: int, high: int, valid: int, sink: int, parts: int, key_tile: int) -> list[list[range]]:
    """Return the slots that count, tile by tile, of a part's run of sinks and of its other run."""
    runs = []
    for lowest, end, (tiles, slot, behind) in zip(
        (0, min(sink, valid)),
        (min(sink, valid), valid),
        runs_of_part.fn(low, high, valid, sink, parts, key_tile),
        strict=True,
    ):
        run = [range(slot + i * key_tile, slot + (i + 1) * key_tile) for i in range(tiles)]
        assert tiles >= 0
        assert not run or (run[-1].stop <= end and behind == slot - lowest > -key_tile)
        runs.append([range(max(tile.start, lowest), tile.stop) for tile in run])
        assert all(tile.start >= lowest for tile in run[1:]), "only a run's first tile is masked"
    return runs


def flat(tiles: list[range]) -> list[int]:
    return [slot for tile in tiles for slot in tile]


@given(
    st.sampled_from(DECODE_CONFIGS),
    st.tuples(st.integers(1, 4), st.sampled_from([1, 64, 200, 520]), st.integers(1, 3000), st.integers(1, 3)),
    st.sampled_from([1, 4, 78, 132]),
    st.data(),
)
@settings(max_examples=150, deadline=None)
def test_decode_reads_each_slot_once_by_the_queries_that_are_its_own(config, sizes, multiprocessors, data) -> None:
    heads, n, slots, lanes = sizes
    plan = data.draw(st.sampled_from(lane_plans(config, heads, n, slots, lanes, multiprocessors)))
    edges = [x * config.key_tile + y for x in range(slots // config.key_tile + 1) for y in (-1, 0, 1)]
    number = st.one_of(st.integers(1, slots), st.sampled_from([x for x in edges if 1 <= x <= slots] or [slots]))
    valid, sink = data.draw(number), data.draw(number)
    met = defaultdict(lambda: ([], []))
    for bundle in plan.bundles:
        for part in bundle:
            runs = slots_of_part(part.low, part.high, valid, sink, plan.slot_tiles, config.key_tile)
            for seen, run in zip(met[part.tile], runs, strict=True):
                seen += flat(run)
    assert set(met) == set(range(len(plan.tiles)))
    for of_sinks, others in met.values():
        assert sorted(of_sinks) == list(range(min(sink, valid)))
        assert sorted(others) == list(range(min(sink, valid), valid))


@given(st.integers(1, 16), st.integers(1, 900), st.integers(1, 900), st.sampled_from([64, 128]))
@settings(max_examples=300, deadline=None)
def test_the_small_decode_replaces_its_queries_where_the_sinks_end(splits, valid, sink, key_tile) -> None:
    """decode_small.py counts the tiles of both runs as one, and knows the slot of each from its number."""
    for split in range(splits):
        of_sinks, others = runs_of_part.fn(split, split + 1, valid, sink, splits, key_tile)
        sinks, tiles = of_sinks[0], of_sinks[0] + others[0]
        after = others[1] - sinks * key_tile
        starts = [(of_sinks[1] if tile < sinks else after) + tile * key_tile for tile in range(tiles)]
        expected = [run[1] + i * key_tile for run in (of_sinks, others) for i in range(run[0])]
        assert starts == expected


@given(
    st.sampled_from([c for c in DECODE_CONFIGS if c.warpgroups > 1]),
    st.integers(1, 700),
    st.integers(1, 700),
    st.data(),
)
@settings(max_examples=30, deadline=None)
def test_merged_parts_of_a_decode_equal_attention(config, valid, sink, data) -> None:
    """Emulate items and merge with numbers."""
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    heads, n, slots, d = 2, 130, 700, 8
    plan = data.draw(st.sampled_from(lane_plans(config, heads, n, slots, 1, 132)))
    table = table_of(plan, 1, n, 132)
    q, q_sink = (torch.randn(heads, n, d, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(heads, slots, d, dtype=torch.float64) for _ in range(2))
    k[:, valid:], v[:, valid:] = float("nan"), float("nan")
    parts: dict[tuple[int, int], list] = defaultdict(list)
    for column in range(table.ctas):
        for i in range(table.items[column][6]):
            _, head, first, low, high, unit = table.items[column + i * table.ctas][:6]
            rows = slice(first, first + config.warpgroups * 64)
            of_sinks, others = (
                flat(x) for x in slots_of_part(low, high, valid, sink, plan.slot_tiles, config.key_tile)
            )
            scores = torch.cat([q_sink[head, rows] @ k[head, of_sinks].T, q[head, rows] @ k[head, others].T], 1)
            lse = torch.logsumexp(scores, -1)
            values = torch.softmax(scores, -1) @ v[head, of_sinks + others]
            parts[head, first].append((unit, lse, values if scores.shape[1] else torch.zeros_like(values)))
    ranks = torch.arange(slots) < sink
    scores = torch.where(ranks, q_sink @ k.mT, q @ k.mT)[..., :valid]
    expected = torch.softmax(scores, -1) @ v[:, :valid]
    for (head, first), found in parts.items():
        found.sort(key=lambda part: part[0])
        weights = torch.softmax(torch.stack([lse for _, lse, _ in found]), 0)
        merged = sum(w[:, None] * x for w, (_, _, x) in zip(weights, found, strict=True))
        torch.testing.assert_close(merged, expected[head, first : first + config.warpgroups * 64])


def test_fractions_of_both_runs_of_the_longest_ring_fit_32_bits() -> None:
    for config in DECODE_CONFIGS:
        fractions = -(-MOST_SLOTS_BY_TILES // config.key_tile)
        assert fractions * (-(-supports.TOO_MANY_TOKENS // config.key_tile) + 1) < 2**31


@st.composite
def problems(draw) -> tuple[BlockWindow, int]:
    block_size = draw(st.integers(1, 40))
    window = block_size + draw(st.integers(0, 60))
    pattern = BlockWindow(block_size, window, draw(st.integers(1, 90)), draw(st.integers(0, block_size)))
    return pattern, draw(st.integers(1, 130))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_own_keys_of_the_forward_are_those_the_pattern_shows(problem) -> None:
    pattern, n = problem
    for start, end in pattern.blocks(n):
        first, sinks = forward_plan.own_keys_apart.fn(end, min(pattern.window, n), min(pattern.sink, n))
        seen = [k for k in range(n) if pattern.visible(start, k, n)]
        of_sinks = [k for k in seen if k < pattern.sink]
        own = list(range(first, end))
        assert own, "the first tile of an item"
        if end <= pattern.sink:
            assert (own, sinks) == (of_sinks, 0) == (seen, 0)
        else:
            assert (own, list(range(sinks))) == ([k for k in seen if k >= pattern.sink], of_sinks)


@settings(max_examples=400, deadline=None)
@given(problems(), st.integers(0, 400), st.sampled_from([0, 0, 1, 7]))
def test_segments_of_a_prefill_are_the_visible_history(problem, position, spare) -> None:
    """The slots that forward_shared.keys_of gives the producer, and the queries that read each."""
    pattern, n = problem
    ring_window = pattern.window + spare
    tokens, slots = ring_layout(position, pattern.sink + ring_window, pattern.sink)
    slot_of = dict(zip(tokens, slots, strict=True))
    for end in pattern.block_ends(n):
        turn = (position - pattern.sink) % (1 << 64) % ring_window
        start, held, low = forward_plan.ring_keys.fn(position, turn, end, pattern.window, pattern.sink, ring_window)
        kept, own_sink = min(pattern.sink, position), max(pattern.sink - position, 0)
        low -= kept
        others = [*range(start, start + held), *range(pattern.sink, pattern.sink + low)]
        oldest = position + end - pattern.window
        assert sorted(others) == sorted(slot_of[p] for p in range(pattern.sink, position) if p >= oldest)
        assert list(range(kept)) == [slot_of[p] for p in range(position) if p < pattern.sink]
        first, sinks = forward_plan.own_keys_apart.fn(end, pattern.window, own_sink)
        if end <= own_sink:
            assert (first, sinks, others) == (0, 0, []), "an item's first queries are those of the sinks"
        else:
            assert sinks + kept == pattern.sink
            assert [*range(first, end)] == [i for i in range(end) if i >= max(own_sink, end - pattern.window)]


WALKS = [
    "block_end",
    "queries_of",
    "query_walk",
    "latest_row",
    "key_tile",
    "key_walk_apart",
    "hide_others",
    "all_start_without_others",
]
PLACES = ["place", "place_apart", "pattern_of"]


@pytest.fixture(scope="module", autouse=True)
def numpy_ranges():
    """Run the backward's own index functions on numpy numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ranges, "gl", SimpleNamespace(minimum=np.minimum, maximum=np.maximum, where=np.where, constexpr=int)
        )
        for name in WALKS + PLACES:
            patch.setattr(ranges, name, getattr(ranges, name).fn)
        yield


def numbers(pattern: BlockWindow, n: int) -> tuple[int, ...]:
    """Return the pattern as the launcher hands it to the kernels."""
    sizes = (min(pattern.block_size, n - pattern.grid_start), min(pattern.window, n), min(pattern.sink, n))
    return (n, *sizes, pattern.grid_start)


def parts_of_mask(pattern: BlockWindow, n: int) -> list[np.ndarray]:
    """Return which sinks, and which other keys, each query sees."""
    mask = pattern.mask(n).numpy()
    of_sinks = np.arange(n) < pattern.sink
    return [mask & of_sinks, mask & ~of_sinks]


def key_tiles(sizes: tuple[int, ...], keys: int) -> list[tuple[bool, int]]:
    """Return (in_sinks, first key) of every program of the kernels that keep a tile of keys, for one head."""
    n, _, _, sink, _ = sizes
    count = -(-sink // keys) + -(-(n - sink) // keys)
    placed = [ranges.place_apart(i, 1, 1, 1, sizes, keys) for i in range(count)]
    assert all((i_b, i_h) == (0, 0) for _, i_b, i_h, _ in placed)
    return [(bool(in_sinks), int(first)) for in_sinks, _, _, first in placed]


def walk_queries(pattern: BlockWindow, n: int, keys: int, rows: int, fused: bool) -> list[np.ndarray]:
    """Return how often each pair entered a sum, by part; outputs of the sinks' part end with the sinks."""
    sizes = numbers(pattern, n)
    sink = sizes[3]
    met = [np.zeros((n, n), int), np.zeros((n, n), int)]
    stored = np.zeros(n, int)
    for in_sinks, first in key_tiles(sizes, keys):
        part = ranges.pattern_of(in_sinks, sizes)
        start, stop, all_start, all_stop = ranges.query_walk(first, part, keys)
        latest = ranges.latest_row(stop, part, rows)
        tile = first + np.arange(keys)
        end = sink if in_sinks else n
        stored[tile[tile < end]] += 1
        seen_from, seen_to = ranges.queries_of(tile, part)
        if fused:
            seen_to = ranges.hide_others(tile, seen_from, seen_to, in_sinks, sizes)
            all_start = ranges.all_start_without_others(all_start, first, in_sinks, sizes, keys)
            start = start // rows * rows
        for walked in range(start, stop, rows):
            row = walked if fused else min(walked, latest)
            assert row >= start, "a tile slid back past the queries that see its keys"
            queries = row + np.arange(rows)[:, None]
            visible = np.ones((rows, keys), bool)
            if walked < all_start or walked + rows > all_stop:
                visible = (queries >= (seen_from if fused else np.maximum(seen_from, walked))) & (queries < seen_to)
            counts = visible & (tile < end)
            assert not (counts & (queries >= n)).any()
            assert not fused or (counts == visible).all(), "a key of the other part entered the sum of dq"
            i_query, i_key = np.nonzero(counts)
            np.add.at(met[not in_sinks], (row + i_query, first + i_key), 1)
    assert (stored == 1).all(), "rows of dk and dv that nobody writes, or two"
    return met


def walk_keys(pattern: BlockWindow, n: int, rows: int, columns: int) -> list[np.ndarray]:
    """Walk as the kernel of dq does, and return how often each pair entered a sum, by part."""
    sizes = numbers(pattern, n)
    met = [np.zeros((n, n), int), np.zeros((n, n), int)]
    rest = backward._first_reader_of_others(sizes)
    for in_sinks, begin in ((True, 0), (False, rest)):
        _, _, window, sink, _ = ranges.pattern_of(in_sinks, sizes)
        for first in range(begin, n, rows):
            count, walk = ranges.key_walk_apart(first, in_sinks, sizes, rows, columns)
            assert count >= 1
            query = first + np.arange(rows)[:, None]
            row_end = ranges.block_end(query, sizes)
            for j in range(int(count)):
                start, stop, edge = ranges.key_tile(j, walk, columns)
                keys = start + np.arange(columns)
                visible = np.ones((rows, columns), bool)
                if edge:
                    visible = ((keys >= row_end - window) | (keys < sink)) & (keys < np.minimum(row_end, stop))
                assert not (visible & (keys >= n)).any()
                i_query, i_key = np.nonzero(visible & (query < n))
                np.add.at(met[not in_sinks], (first + i_query, keys[i_key]), 1)
    return met


def check_walks(pattern: BlockWindow, n: int, keys: int, rows: int) -> None:
    for expected, *found in zip(
        parts_of_mask(pattern, n),
        walk_queries(pattern, n, keys, rows, fused=False),
        walk_queries(pattern, n, keys, rows, fused=True),
        walk_keys(pattern, n, keys, rows),
        strict=True,
    ):
        for met in found:
            np.testing.assert_array_equal(met, expected)


@settings(max_examples=200, deadline=None)
@given(problems(), st.sampled_from([(8, 4), (8, 8), (12, 4), (16, 4), (1, 1)]))
def test_the_backward_meets_every_visible_pair_once_in_its_part(problem, tile) -> None:
    check_walks(*problem, *tile)


@pytest.mark.parametrize("sink", [1, 63, 64, 65, 127, 128, 129, 512])
@pytest.mark.parametrize("n", [1, 63, 129, 1000])
def test_real_tiles_of_the_backward_meet_every_visible_pair_once(sink, n) -> None:
    for pattern in (BlockWindow(64, 192, sink), BlockWindow(256, 600, sink, 17), BlockWindow(333, 333, sink)):
        check_walks(pattern, n, 128, 64)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_work_of_the_fused_backward_is_handed_out_once_sinks_first(sink, others, batch, kv_heads, together) -> None:
    sizes = (sink + others, 1, 1, sink, 0)
    heads = batch * kv_heads
    count = (-(-sink // 8) + -(-others // 8)) * heads
    placed = [ranges.place_apart(i, kv_heads, heads, together, sizes, 8) for i in range(count)]
    assert [bool(x[0]) for x in placed] == sorted((bool(x[0]) for x in placed), reverse=True)
    starts = [(True, first) for first in range(0, sink, 8)] + [
        (False, first) for first in range(sink, sink + others, 8)
    ]
    expected = [(x, b, h, first) for b in range(batch) for h in range(kv_heads) for x, first in starts]
    assert sorted((bool(x), int(b), int(h), int(f)) for x, b, h, f in placed) == sorted(expected)
