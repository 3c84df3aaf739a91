"""How a prefill's work items are cut along the keys, without a GPU: every tile once, and when it is worth it."""

from __future__ import annotations

import heapq
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from aot import record_launches
from forward_calls import items_of
from hypothesis import given, settings
from hypothesis import strategies as st

from swba_kernels import BlockWindow

pytest.importorskip("triton.experimental.gluon")

from swba_kernels.hopper import forward_cut
from swba_kernels.hopper.forward import Ring, choose_config, cut_of_call, forward
from swba_kernels.hopper.forward_cut import Cut, Cuts, Load, choose_cut, time_of
from swba_kernels.hopper.forward_plan import place_of, plan_forward, rows_of
from swba_kernels.hopper.supports import build_obstacle

part_of, merge_of, share_of = (getattr(forward_cut, name).fn for name in ("part_of", "merge_of", "share_of"))
tiles_of, in_front = forward_cut.tiles_of.fn, forward_cut.in_front.fn

MEASURED = Path(__file__).parents[2] / "docs" / "benchmarks" / "h200-prefill-cuts.json"


@pytest.fixture(scope="module", autouse=True)
def plain_functions():
    """Let them call plain Python functions."""
    with pytest.MonkeyPatch.context() as patch:
        for function in (forward_cut.item_of_cut, forward_cut.tiles_of, place_of, rows_of):
            patch.setattr(forward_cut, function.fn.__name__, function.fn)
        patch.setattr(forward_cut.gl, "static_range", range)
        yield


@given(st.integers(1, 4), st.integers(0, 20), st.integers(1, 20), st.integers(2, 9))
def test_every_part_of_every_item_of_every_row_once_whole_ones_first(rows, whole, cut, parts) -> None:
    cuts = Cuts(rows * whole, whole, cut, parts, None, None)
    seen = [part_of(at, cuts) for at in range(rows * (whole + cut * parts))]
    assert all(count == 1 for *_, count in seen[: rows * whole])
    expected = [
        (row * (whole + cut) + i, part, count)
        for row in range(rows)
        for i in range(whole + cut)
        for count in [1 if i < whole else parts]
        for part in range(count)
    ]
    assert sorted(seen) == expected


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 700), st.integers(1, 300), st.integers(1, 6), st.sampled_from([2, 3]))
def test_the_merge_adds_up_what_the_parts_left(data, n, block, of_batch, groups) -> None:
    """Every row of every item that is cut once, from its parts' units as the producer counts them."""
    grid_start = -data.draw(st.integers(0, block - 1))
    plan = plan_forward(n, block, 0, 0, grid_start, groups * 64)
    batch = data.draw(st.sampled_from([x for x in (1, 2, 3) if of_batch % x == 0]))
    items = of_batch // batch * plan.tiles
    whole, parts = data.draw(st.integers(0, items - 1)), data.draw(st.integers(2, 9))
    cuts = Cuts(batch * whole, whole, items - whole, parts, None, None)
    of_plan = (of_batch * plan.heavy, of_batch * plan.per_block, *plan)
    left = {}
    for at in range(cuts.whole_items, cuts.whole_items + batch * cuts.cut * parts):
        item, *_ = part_of(at, cuts)
        head, block_of, tile = place_of.fn(item, *of_plan)
        first, end = rows_of.fn(block_of, tile, n, block, grid_start, groups * 64)
        for group in range(groups):
            if first + group * 64 < end:
                left.setdefault((head, first + group * 64, end), []).append((at - cuts.whole_items) * groups + group)
    merged = {}
    for at in range(batch * cuts.cut * groups):
        head, first, end, unit = merge_of(at, *cuts[1:4], groups, n, block, grid_start, *of_plan)
        if first < end:
            assert (head, first, end) not in merged
            merged[head, first, end] = [unit + groups * i for i in range(parts)]
    assert merged == left


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.integers(0, 700), min_size=4, max_size=4).filter(any), st.integers(1, 20), st.sampled_from([64, 128])
)
def test_parts_read_every_key_of_every_segment_once(lengths, count, columns) -> None:
    """By tiles that are whole but for a segment's last one, with which the part that reads of it begins."""
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


def load_of(items: int, tiles: int, head_dim: int = 128, multiprocessors: int = 132) -> Load:
    return Load(items, tiles, {64: 1.1, 128: 1.5}[head_dim], 128, head_dim, multiprocessors)


loads = st.builds(load_of, st.integers(1, 600), st.integers(1, 300), st.sampled_from([64, 128]))


@settings(max_examples=200, deadline=None)
@given(loads, st.integers(1, 6), st.data())
def test_the_time_is_that_of_items_that_are_taken_as_multiprocessors_get_free(load, batch, data) -> None:
    """To within a part."""
    whole = data.draw(st.integers(0, load.items - 1))
    cut = Cut(whole, load.items - whole, data.draw(st.integers(2, 32)))
    times = [load.tile_time * x + forward_cut._ITEM for x in (load.tiles, -(-load.tiles // cut.parts))]
    free = [0.0] * load.multiprocessors
    parts = batch * cut.cut * cut.parts
    for one, count in zip(times, (batch * cut.whole, parts), strict=True):
        for _ in range(count):
            heapq.heapreplace(free, free[0] + one)
    merge = forward_cut._MERGE[load.head_dim] + parts * load.rows * load.head_dim * 8 / forward_cut._MERGE_BYTES
    assert time_of(cut, load, batch) - merge == pytest.approx(max(free), abs=times[1] + 1e-6)


@settings(max_examples=300, deadline=None)
@given(loads, st.integers(1, 8))
def test_a_cut_gains_on_one_row_and_all_lanes_and_loses_little_between(load, lanes) -> None:
    cut = choose_cut(load, lanes)
    if cut is not None:
        assert cut.whole + cut.cut == load.items
        assert cut.cut > 0
        assert 2 <= cut.parts <= min(32, load.tiles // 2)
        assert lanes * cut.cut * cut.parts * load.rows * load.head_dim * 4 <= 64 << 20
        times = [time_of(cut, load, x) / time_of(Cut(load.items, 0, 1), load, x) for x in range(1, lanes + 1)]
        assert max(times[0], times[-1]) <= 1
        assert max(times) <= 1.15
        assert times[0] * times[-1] < 0.97**2


@pytest.mark.parametrize(
    ("items", "lanes", "tiles", "below"),
    [(24, 1, 24, 0.6), (156, 1, 74, 0.75), (444, 1, 256, 0.9), (48, 4, 100, 0.9), (1, 1, 300, 0.15), (24, 8, 249, 0.9)],
)
def test_few_items_are_spread_over_all_multiprocessors(items, lanes, tiles, below) -> None:
    """Of blocks of 333 tokens of 8 heads, of 1560 and 4680 tokens of 12; on four lanes, of one item, on 8 lanes."""
    load = load_of(items, tiles)
    cut = choose_cut(load, lanes)
    assert cut is not None
    assert time_of(cut, load, lanes) < below * time_of(Cut(items, 0, 1), load, lanes)


@pytest.mark.parametrize(("items", "tiles"), [(132, 80), (264, 80), (4000, 80), (24, 2), (24, 1)])
def test_items_that_fill_the_multiprocessors_or_are_short_stay_whole(items, tiles) -> None:
    assert choose_cut(load_of(items, tiles), 1) is None


@pytest.mark.parametrize(("items", "lanes"), [(400_000, 1), (4000, 300), (4290, 1), (1000, 4), (300, 14)])
def test_a_choice_takes_the_host_no_longer_than_a_call(items, lanes, monkeypatch) -> None:
    """Each candidate about a microsecond: some thousands at most, beside a kernel of ten milliseconds."""
    asked = []
    monkeypatch.setattr(forward_cut, "time_of", lambda *x: asked.append(x) or time_of(*x))
    choose_cut.__wrapped__(load_of(items, 256), lanes)
    assert len(asked) < 6000


def test_chosen_cuts_are_near_the_fastest_that_were_measured() -> None:
    losses = []
    for result in json.loads(MEASURED.read_text())["results"]:
        us, head_dim, block = result["us"], result["head_dim"], result["block_size"]
        pattern = BlockWindow(block, result["ws"] * block, result["sink"])
        keys = pattern.window + pattern.sink
        config, _ = choose_config(head_dim, block, keys, True, False)
        items = items_of(result["blocks"] * block, pattern, head_dim, result["heads"])
        cut = cut_of_call(items, result["lanes"], keys, config, head_dim, 132)
        chosen = us["none"] if cut is None else us[f"{cut.whole}/{cut.parts}"]
        assert chosen < 1.01 * us["none"], result
        losses.append(chosen / min(us.values()) - 1)
    assert max(losses) < 0.11
    assert statistics.mean(losses) < 0.015


def launches(
    batch: int, lanes: int, cut: Cut | None = None, sink: int = 0, apart: bool = False
) -> list[tuple[str, dict[str, Any]]]:
    """Return the launches of a prefill of one block of 333 tokens on a ring of 9 of them and some sinks."""
    sizes = ((batch, 333), (lanes, sink + 2997))
    q, ring = (torch.empty(x, 8, n, 128, dtype=torch.bfloat16, device="meta") for x, n in sizes)
    q_sink = torch.empty_like(q) if apart else None
    position = torch.empty(batch, dtype=torch.int64, device="meta")
    of_ring = Ring(ring, ring, position, position)
    pattern = {"block_size": 333, "window": 2997, "sink": sink, "grid_start": 0}
    return record_launches(lambda: forward(q, q, q, scale=0.1, ring=of_ring, q_sink=q_sink, cut=cut, **pattern))


CALLS = [(1, 1, None), (2, 2, None), (1, 2, None), (3, 3, Cut(4, 20, 7))]


@pytest.mark.skipif(build_obstacle() is not None, reason="this Triton cannot build the Hopper kernels")
class TestLaunches:
    @pytest.mark.parametrize(("batch", "lanes", "cut"), CALLS)
    def test_workspace_and_grid_hold_every_part(self, batch, lanes, cut) -> None:
        config, _ = choose_config(128, 333, 2997, True, False)
        chosen = cut or cut_of_call(24, lanes, 2997, config, 128, 132)
        assert chosen is not None
        (kernel, call), (merge, adds) = launches(batch, lanes, cut)
        assert (kernel, merge) == ("_forward", "combine_cut")
        parts = batch * chosen.cut * chosen.parts
        assert call["items"] == batch * chosen.whole + parts
        assert call["whole_items"] == batch * chosen.whole
        assert tuple(call[x] for x in ("whole", "cut", "parts")) == tuple(adds[x] for x in Cut._fields) == chosen
        assert call["p_part"].shape == (parts * config.groups * 64, 128)
        assert call["p_part_lse"].numel() == parts * config.groups * 64
        assert adds["grid"] == (batch * chosen.cut * config.groups, 64 // adds["ROWS"])
        assert adds["p_part"] is call["p_part"]
        assert adds["p_part_lse"] is call["p_part_lse"]
        assert adds["GROUPS"] == config.groups

    def test_a_row_is_cut_alike_whatever_the_call_brings_along(self) -> None:
        config, _ = choose_config(128, 333, 2997, True, False)
        assert cut_of_call(24, 1, 2997, config, 128, 132) != cut_of_call(24, 3, 2997, config, 128, 132)
        of_one, of_three = (launches(batch, 3)[0][1] for batch in (1, 3))
        assert of_one["CUT"] == of_three["CUT"]
        assert all(of_one[x] == of_three[x] for x in Cut._fields)

    def test_sinks_with_queries_of_their_own_are_not_cut(self) -> None:
        ((_, call),) = launches(1, 1, sink=40, apart=True)
        assert not call["CUT"]
        with pytest.raises(ValueError, match="cut: items are cut on a ring only"):
            launches(1, 1, Cut(4, 20, 2), sink=40, apart=True)

    def test_more_rows_than_lanes_are_not_cut(self) -> None:
        ((_, call),) = launches(2, 1)
        assert not call["CUT"]

    @pytest.mark.parametrize("cut", [Cut(4, 19, 2), Cut(-1, 25, 2), Cut(0, 24, 1), Cut(0, 24, 0)])
    def test_a_cut_that_does_not_fit_raises(self, cut) -> None:
        with pytest.raises(ValueError, match="cut: expected 24 items"):
            launches(1, 1, cut)
