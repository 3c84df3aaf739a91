"""What a decode plan is chosen by: the modelled cycles of a call, beside times that were measured."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton")

from swba_kernels.hopper.decode_plan import (
    CONFIGS,
    MOST_SLOTS_BY_TILES,
    Config,
    Costs,
    LanePlan,
    Part,
    Tile,
    cost_of,
    plan_lane,
)

MEASURED = Path(__file__).parents[2] / "docs" / "benchmarks" / "h200-decode-rooms.json"
TIMES = "us (consumers.stages.bundles of all lanes)"


def measured() -> dict[tuple[int, ...], dict[str, float]]:
    """Return the microseconds of each plan that was tried for (head dim, lanes, heads, queries, slots)."""
    samples = defaultdict(lambda: defaultdict(list))
    for rows in json.loads(MEASURED.read_text()).values():
        for row in rows if isinstance(rows, list) else ():
            for kind, us in row.get(TIMES, {}).items():
                shape = (row["head_dim"], *row["lanes, heads, queries, slots"])
                samples[shape][kind].append(us)
    return {shape: {kind: statistics.median(x) for kind, x in kinds.items()} for shape, kinds in samples.items()}


def test_what_is_chosen_is_nearly_the_fastest_plan_that_was_measured() -> None:
    losses = []
    for (head_dim, lanes, heads, n, slots), kinds in measured().items():
        plan = plan_lane(head_dim, heads, n, slots, lanes, 132)
        kind = f"{plan.config.warpgroups}.{plan.config.stages}.{len(plan.bundles) * lanes}"
        losses.append(kinds[kind] / min(kinds.values()) - 1)  # what was not tried is not chosen
    assert len(losses) == 30
    assert max(losses) < 0.14
    assert statistics.mean(losses) < 0.014


COSTS = Costs(start=1000.0, part=100.0, merge=500.0, merge_bytes=64.0)


def test_cycles_of_a_call_of_small_ctas() -> None:
    config = Config(1, 128, 2, 10.0, COSTS, resident=2)
    tile = Tile(0, 0, 1.0)
    whole = LanePlan(config, 8, (tile,), ((Part(0, 0, 8),),))
    halves = LanePlan(config, 8, (tile,), ((Part(0, 0, 5),), (Part(0, 5, 8),)))
    assert cost_of(whole, 1, 4, 64) == 1000 + 8 * 10 + 100
    assert cost_of(whole, 8, 4, 64) == cost_of(whole, 1, 4, 64)
    assert cost_of(whole, 9, 4, 64) == 1000 + 2 * (8 * 10 + 100)
    assert cost_of(halves, 1, 4, 64) == 1000 + 5 * 10 + 100 + 500 + 2 * 64 * 64 * 8 / 64


def test_cycles_of_a_call_of_persistent_ctas() -> None:
    config = Config(2, 128, 2, 1e6, COSTS)  # so slow that cut tiles never wait for memory
    tiles = (Tile(0, 0, 1.0), Tile(0, 128, 0.5))
    whole = LanePlan(config, 8, tiles, ((Part(0, 0, 8),), (Part(1, 0, 8),)))
    assert cost_of(whole, 1, 2, 64) == 1000 + 8e6 + 100
    assert cost_of(whole, 1, 1, 64) == 1000 + 12e6 + 200
    assert cost_of(whole, 2, 2, 64) == 1000 + 12e6 + 200
    cut = LanePlan(config, 8, tiles, ((Part(0, 0, 6),), (Part(0, 6, 8), Part(1, 0, 8))))
    merge = 500 + 2 * 2 * 64 * 64 * 8 / 64
    assert cost_of(cut, 1, 2, 64) == 1000 + 6e6 * 1.05 + 200 + merge


def test_cut_tiles_that_read_more_than_the_cache_holds_wait_for_memory() -> None:
    config = Config(2, 128, 2, 1.0, COSTS)
    slots = [128 * 8, 128 << 14]
    tile = Tile(0, 0, 1.0)
    short, long = (LanePlan(config, n // 128, (tile,), ((Part(0, 0, 4),), (Part(0, 4, n // 128),))) for n in slots)
    merge = 500 + 2 * 2 * 64 * 64 * 8 / 64
    assert cost_of(short, 1, 132, 64) == pytest.approx(1000 + 4 * 1.05 + 100 + merge)
    assert cost_of(long, 1, 132, 64) > 1000 + 100 * ((128 << 14) // 128 - 4)


@pytest.mark.parametrize("head_dim", CONFIGS)
@pytest.mark.parametrize(("heads", "n"), [(12, 1560), (5, 333), (12, 64), (24, 64)])
def test_rings_of_any_length_beyond_some_have_one_configuration(head_dim, heads, n) -> None:
    configs = {plan_lane(head_dim, heads, n, MOST_SLOTS_BY_TILES << i, 1, 132).config for i in range(5)}
    assert len(configs) == 1
