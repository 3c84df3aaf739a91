"""The plan of Hopper's ring decode: what every CTA computes, walked through in Python as the kernels walk through it.

B rows of a call, L ring lanes, W warpgroups of 64 query rows in a tile, C key tiles of a full ring.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import pytest

pytest.importorskip("triton")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swba_kernels.hopper import decode, supports
from swba_kernels.hopper.decode_plan import (
    CONFIGS,
    MAX_PARTS,
    MOST_SLOTS_BY_TILES,
    LanePlan,
    Table,
    key_tiles_of_part,
    lane_plans,
    plan_lane,
    table_of,
)

key_tiles = key_tiles_of_part.fn
ALL_CONFIGS = [(d, config) for d, configs in CONFIGS.items() for config in configs]


def slots_of_item(low: int, high: int, valid: int, slot_tiles: int, key_tile: int) -> list[range]:
    """Return the slots that an item reads, tile by tile, clipped at zero as the copy engine does."""
    first, last = key_tiles(low, high, valid, slot_tiles, key_tile)
    slot = valid - last * key_tile
    tiles = []
    for _ in range(first, last):
        tiles.append(range(max(slot, 0), slot + key_tile))
        slot += key_tile
    return tiles


def walk(table: Table) -> list[tuple[int, ...]]:
    """Return the items that each CTA takes: as many of its column as the first one says."""
    taken = [range(cta, cta + table.items[cta][6] * table.ctas, table.ctas) for cta in range(table.ctas)]
    return [table.items[i][:6] for column in taken for i in column]


def work(plan: LanePlan, table: Table, valid: list[int], n: int) -> dict[tuple[int, int, int], list]:
    """Return (unit, slots) of every item for (row, head, 64 query rows), as the persistent kernel sees them."""
    found = defaultdict(list)
    for b, head, first, low, high, unit in walk(table):
        slots = slots_of_item(low, high, valid[b], plan.slot_tiles, plan.config.key_tile)
        assert low < high
        for w in range(plan.config.warpgroups):
            if first + 64 * w < n:
                found[b, head, first + 64 * w].append((unit + w if unit >= 0 else -1, slots))
    return found


shapes = st.tuples(
    st.sampled_from(ALL_CONFIGS),
    st.integers(1, 12),  # heads
    st.sampled_from([1, 7, 63, 64, 65, 144, 256, 333, 520, 1000]),  # queries
    st.integers(1, 3000),  # slots
    st.integers(1, 6),  # lanes
    st.sampled_from([1, 4, 78, 132]),  # multiprocessors
)


@given(shapes, st.data())
@settings(max_examples=150, deadline=None)
def test_each_slot_is_read_once_for_every_query_whatever_is_filled(shape, data) -> None:
    (_, config), heads, n, slots, lanes, sms = shape
    plans = lane_plans(config, heads, n, slots, lanes, sms)
    assert plans
    plan = data.draw(st.sampled_from(plans))
    rows = data.draw(st.integers(1, lanes + 1))
    edges = [x * config.key_tile + y for x in range(slots // config.key_tile + 1) for y in (-1, 0, 1)]
    filled = st.one_of(st.integers(1, slots), st.sampled_from([x for x in edges if 1 <= x <= slots] or [slots]))
    valid = [data.draw(filled) for _ in range(rows)]
    table = table_of(plan, rows, n, sms)
    found = work(plan, table, valid, n)
    assert set(found) == {(b, h, r) for b in range(rows) for h in range(heads) for r in range(0, n, 64)}
    merges = {(m[0], m[1], m[2]): m[3:] for m in table.merges}
    assert len(merges) == len(table.merges)
    assert set(merges) <= set(found)
    written = []
    for key, items in found.items():
        assert sorted(s for _, tiles in items for tile in tiles for s in tile) == list(range(valid[key[0]]))
        units = [unit for unit, _ in items]
        if key in merges:
            first, step, parts = merges[key]
            assert sorted(units) == [first + i * step for i in range(parts)]
            assert 1 < parts <= MAX_PARTS
            written += units
        else:
            assert units == [-1]
    assert len(set(written)) == len(written)
    assert all(0 <= unit < table.units for unit in written)


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_a_lane_is_cut_and_merged_alike_in_every_call(shape) -> None:
    (_, config), heads, n, slots, lanes, sms = shape
    plan = plan_lane(64, heads, n, slots, lanes, sms, config)

    def cuts_of(rows: int) -> list[dict]:
        """Return, for each row of a call, the fractions of each tile in the order of the merge."""
        table = table_of(plan, rows, n, sms)
        cuts = [defaultdict(list) for _ in range(rows)]
        for b, head, first, low, high, unit in walk(table):
            cuts[b][head, first].append((unit, low, high))
        return [{key: [part[1:] for part in sorted(x)] for key, x in row.items()} for row in cuts]

    alone = cuts_of(1)[0]
    assert all(row == alone for rows in (2, lanes, lanes + 3) for row in cuts_of(rows))
    for fractions in alone.values():
        assert fractions[0][0] == 0
        assert fractions[-1][1] == plan.slot_tiles
        assert all(a[1] == b[0] for a, b in pairwise(fractions))


@pytest.mark.parametrize(
    ("head_dim", "heads", "n", "slots", "lanes", "busy"),
    [
        (128, 12, 1560, 32760, 1, 0.97),
        (128, 12, 4680, 32760, 1, 0.98),
        (128, 40, 4680, 32760, 1, 0.98),
        (64, 12, 256, 4096, 1, 0.80),
        (64, 16, 256, 4096, 8, 0.90),
        (128, 12, 880, 17600, 1, 0.95),
        (128, 12, 2025, 16200, 1, 0.95),
        (128, 12, 1560, 32760, 3, 0.95),
    ],
)
def test_the_plan_keeps_the_multiprocessors_busy(head_dim, heads, n, slots, lanes, busy) -> None:
    plan = plan_lane(head_dim, heads, n, slots, lanes, 132)
    loads = defaultdict(float)
    table = table_of(plan, lanes, n, 132)
    weight = {(tile.head, tile.first): tile.weight for tile in plan.tiles}
    for i, (_, head, first, low, high, *_) in enumerate(table.items):
        loads[i % table.ctas] += weight[head, first] * (high - low)
    assert sum(loads.values()) / 132 / plan.config.resident >= busy * max(loads.values())


@pytest.mark.parametrize("config", [config for _, config in ALL_CONFIGS if config.warpgroups == 1])
@pytest.mark.parametrize("slots", [1, 129, 2000])
def test_the_small_kernel_s_arithmetic_is_its_plan(config, slots) -> None:
    """decode_small.py finds tile and split from the index of its CTA; the plan says the same."""
    heads, n, rows = 3, 150, 2
    for plan in lane_plans(config, heads, n, slots, 1, 132):
        table = table_of(plan, rows, n, 132)
        row_tiles, splits = -(-n // 64), len(plan.bundles) // len(plan.tiles)
        assert len(plan.bundles) == splits * len(plan.tiles)
        for b, head, first, unit, step, parts in table.merges:
            at = ((b * heads + head) * row_tiles + first // 64) * splits
            assert (unit, step, parts) == (at, 1, splits)
        for valid in {min(x, slots) for x in (1, 127, 128, 129, 1000, 1999, 2000)}:
            tiles = [slots_of_item(i, i + 1, valid, splits, config.key_tile) for i in range(splits)]
            assert sorted(s for x in tiles for t in x for s in t) == list(range(valid))
        longest = max(part.high - part.low for bundle in plan.bundles for part in bundle)
        assert longest == max(len(slots_of_item(i, i + 1, slots, splits, config.key_tile)) for i in range(splits))


@given(st.sampled_from([c for c in ALL_CONFIGS if c[1].warpgroups > 1]), st.integers(1, 700), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_merged_parts_equal_attention(config, valid, seed) -> None:
    """Emulate items and merge with numbers: NaN past `valid`, zeros below slot 0, NaN in untouched workspace."""
    _, config = config
    torch.manual_seed(seed)
    n, slots, d = 200, 700, 8
    plan = plan_lane(64, 2, n, slots, 1, 132, config)
    table = table_of(plan, 1, n, 132)
    q, k, v = (torch.randn(2, rows, d, dtype=torch.float64) for rows in (n, slots, slots))
    k[:, valid:], v[:, valid:] = float("nan"), float("nan")
    part = torch.full((table.units * 64, d), float("nan"), dtype=torch.float64)
    part_lse = torch.full((table.units * 64,), float("nan"), dtype=torch.float64)
    out = torch.full((2, n, d), float("nan"), dtype=torch.float64)
    for _, head, first, low, high, unit in walk(table):
        tiles = slots_of_item(low, high, valid, plan.slot_tiles, config.key_tile)
        seen = [s for tile in tiles for s in tile]
        rows = q[head, first : first + config.warpgroups * 64]
        if not seen:
            if unit >= 0:
                part_lse[unit * 64 : (unit + config.warpgroups) * 64] = float("-inf")
            continue
        scores = rows @ k[head, seen].T
        result = torch.softmax(scores, -1) @ v[head, seen]
        if unit < 0:
            out[head, first : first + len(rows)] = result
        else:
            part[unit * 64 : unit * 64 + len(rows)] = result
            part_lse[unit * 64 : unit * 64 + len(rows)] = torch.logsumexp(scores, -1)
    for _, head, first, unit, step, parts in table.merges:
        count = min(64, n - first)
        at = [slice((unit + i * step) * 64, (unit + i * step) * 64 + count) for i in range(parts)]
        lse = torch.stack([part_lse[x] for x in at])
        weights = torch.exp(lse - torch.logsumexp(lse, 0))
        numbers = torch.where((lse > float("-inf"))[..., None], torch.stack([part[x] for x in at]), 0.0)
        out[head, first : first + count] = (weights[..., None] * numbers).sum(0)
    expected = torch.softmax(q @ k[:, :valid].mT, -1) @ v[:, :valid]
    torch.testing.assert_close(out, expected)


def test_tables_are_allocated_outside_the_thread_of_the_call(monkeypatch) -> None:
    monkeypatch.setattr(decode, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch.inference_mode():  # of this thread, as are the memory pools of torch.compile's graphs
        tables = decode._tables.__wrapped__(1, 16, 77, 64, 501, 1, torch.device("cpu"), None)
    table = table_of(tables.plan, 1, 77, 132)
    assert not tables.items.is_inference()
    assert not tables.merges.is_inference()
    assert tables.items.tolist() == [list(x) for x in table.items]
    assert tables.merges.tolist() == [list(x) for x in table.merges]


def test_fractions_of_the_longest_ring_fit_32_bits() -> None:
    for _, config in ALL_CONFIGS:
        fractions = -(-MOST_SLOTS_BY_TILES // config.key_tile)
        assert fractions * -(-supports.TOO_MANY_TOKENS // config.key_tile) < 2**31
