"""How a prefill's work items are cut along the keys, in plain Python: every tile once, and when it is worth it."""

from __future__ import annotations

import heapq
import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon")

from swba_kernels.hopper import forward_cut
from swba_kernels.hopper.combine import MAX_PARTS
from swba_kernels.hopper.forward import choose_config, cut_of_call
from swba_kernels.hopper.forward_cut import Cut, Parts, choose_cut
from swba_kernels.hopper.forward_plan import plan_forward

item_of_cut, part_of, share_of = (getattr(forward_cut, name).fn for name in ("item_of_cut", "part_of", "share_of"))
tiles_of, in_front = forward_cut.tiles_of.fn, forward_cut.in_front.fn

MULTIPROCESSORS = 132
MEASURED = Path(__file__).parents[2] / "docs" / "benchmarks" / "h200-prefill-cuts.json"
TILE_TIME = {64: 1.1, 128: 1.5}


@pytest.fixture(scope="module", autouse=True)
def plain_functions():
    """Let them call plain Python functions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_cut, "item_of_cut", item_of_cut)
        patch.setattr(forward_cut, "tiles_of", tiles_of)
        patch.setattr(forward_cut.gl, "static_range", range)
        yield


@given(st.integers(1, 4), st.integers(0, 20), st.integers(1, 20), st.integers(2, 9))
def test_every_part_of_every_item_of_every_row_once_whole_ones_first(rows, whole, cut, each) -> None:
    parts = Parts(rows * whole, whole, cut, each, None, None)
    seen = [part_of(at, parts) for at in range(rows * (whole + cut * each))]
    assert all(count == 1 for *_, count in seen[: rows * whole])
    expected = [
        (row * (whole + cut) + i, part, count)
        for row in range(rows)
        for i in range(whole + cut)
        for count in [1 if i < whole else each]
        for part in range(count)
    ]
    assert sorted(seen) == expected


@given(st.integers(0, 3), st.integers(1, 20), st.integers(0, 20), st.integers(2, 9))
def test_the_merge_looks_where_the_parts_went(row, cut, whole, each) -> None:
    """Parts of the cut item `at` are units [at * each, (at + 1) * each) of the workspace, those of one consumer."""
    parts = Parts(4 * whole, whole, cut, each, None, None)
    for at in range(row * cut, (row + 1) * cut):
        for i in range(each):
            assert part_of(parts.whole_items + at * each + i, parts) == (item_of_cut(at, whole, cut), i, each)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.integers(0, 700), min_size=4, max_size=4).filter(any), st.integers(1, 20), st.sampled_from([64, 128])
)
def test_parts_read_every_key_of_every_segment_once(lengths, count, columns) -> None:
    """By tiles that are whole but for a segment's last one, which the first part that reads of it begins with."""
    tiles = sum(tiles_of(x, columns) for x in lengths)
    seen = [[0] * length for length in lengths]
    for part in range(count):
        begin, stop, before, met = part * tiles // count, (part + 1) * tiles // count, 0, 0
        shares = []
        for i, length in enumerate(lengths):
            offset, share = share_of(length, before, begin, stop, columns)
            before += tiles_of(length, columns)
            met += tiles_of(share, columns)
            shares.append(share)
            assert share % columns == 0 or offset + share == length
            for key in range(offset, offset + share):
                seen[i][key] += 1
        assert met == stop - begin
        front = in_front(*shares)
        assert [x for x in front if x] == [x for x in shares if x]
        assert front[0] > 0 or not any(shares)
    assert all(x == 1 for keys in seen for x in keys)


def end_of(cut: Cut, lanes: int, tiles: int, head_dim: int) -> float:
    """Return when the last of all items ends if whoever is free takes the next one, in microseconds."""
    time = [TILE_TIME[head_dim] * x + forward_cut._ITEM for x in (tiles, tiles / cut.parts)]
    free = [0.0] * MULTIPROCESSORS
    for one, count in zip(time, (lanes * cut.whole, lanes * cut.cut * cut.parts), strict=True):
        for _ in range(count):
            heapq.heapreplace(free, free[0] + one)
    return max(free)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 600), st.integers(1, 6), st.integers(1, 300), st.sampled_from([64, 128]))
def test_a_cut_is_chosen_where_it_ends_earlier(items, lanes, tiles, head_dim) -> None:
    cut = choose_cut(items, lanes, tiles, TILE_TIME[head_dim], 128, head_dim, MULTIPROCESSORS)
    if cut is not None:
        assert cut.whole + cut.cut == items
        assert cut.cut > 0
        assert 2 <= cut.parts <= min(MAX_PARTS, tiles // 2)
        assert end_of(cut, lanes, tiles, head_dim) < end_of(Cut(items, 0, 1), lanes, tiles, head_dim)


@pytest.mark.parametrize(
    ("items", "lanes", "tiles", "gain"),
    [(24, 1, 24, 2.0), (156, 1, 74, 1.4), (444, 1, 256, 1.1), (39, 4, 74, 1.4), (1, 1, 300, 12.0)],
)
def test_few_items_are_spread_over_all_multiprocessors(items, lanes, tiles, gain) -> None:
    """Of a block of 333 tokens of 8 heads, of 1560 and of 4680 tokens of 12 heads, on four lanes, of one item."""
    cut = choose_cut(items, lanes, tiles, TILE_TIME[128], 128, 128, MULTIPROCESSORS)
    assert cut is not None
    assert end_of(cut, lanes, tiles, 128) * gain < end_of(Cut(items, 0, 1), lanes, tiles, 128)


def test_chosen_cuts_are_near_the_fastest_that_were_measured() -> None:
    losses = []
    for result in json.loads(MEASURED.read_text())["results"]:
        us, head_dim, window = result["us"], result["head_dim"], result["ws"] * result["block_size"] + result["sink"]
        n = result["blocks"] * result["block_size"]
        config, _ = choose_config(head_dim, result["block_size"], window, True, False)
        rows = config.groups * 64
        items = result["heads"] * plan_forward(n, result["block_size"], 0, 0, 0, rows).tiles
        cut = cut_of_call(items, result["lanes"], window, config, head_dim, MULTIPROCESSORS)
        chosen = us["none"] if cut is None else us[f"{cut.whole}/{cut.parts}"]
        assert chosen < 1.01 * us["none"], result
        losses.append(chosen / min(us.values()) - 1)
    assert max(losses) < 0.11
    assert statistics.mean(losses) < 0.015


@pytest.mark.parametrize(("items", "tiles"), [(132, 80), (264, 80), (4000, 80), (24, 2), (24, 1)])
def test_items_that_fill_the_multiprocessors_or_are_short_stay_whole(items, tiles) -> None:
    assert choose_cut(items, 1, tiles, TILE_TIME[128], 128, 128, MULTIPROCESSORS) is None
