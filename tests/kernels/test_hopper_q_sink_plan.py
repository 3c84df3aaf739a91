"""Which keys the Hopper kernels read by q and which by q_sink, walked through in Python as the kernels walk."""

from __future__ import annotations

from collections import defaultdict

import pytest

pytest.importorskip("triton.experimental.gluon")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swba_kernels.hopper import supports
from swba_kernels.hopper.decode_plan import CONFIGS, MAX_FRACTIONS, lane_plans, runs_of_part, table_of

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
        assert MAX_FRACTIONS * (-(-supports.TOO_MANY_TOKENS // config.key_tile) + 1) < 2**31
