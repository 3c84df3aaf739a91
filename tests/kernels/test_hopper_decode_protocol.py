"""How producer and consumers of the Hopper decode cooperate: run on the CPU, under random schedules.

The own source of both kernels runs (`gluon_emulator.py`) on small random calls, by any plan: with tiles whole or cut,
filled lengths of any kind, with queries of their own for the sinks. Each row, its parts put together, must come out
made of the very slots that are filled, each once and with its value, and the protocol must hold. That these tests see
what they look for is shown by kernels with mistakes in them.
"""

from __future__ import annotations

import random
from collections import Counter
from types import CodeType, SimpleNamespace

import numpy as np
import pytest
from gluon_attention import keys_of, stand_ins
from gluon_emulator import Machine, compile_modules, swapped
from gluon_values import Array, Tile

pytest.importorskip("triton.experimental.gluon")

from swba_kernels.hopper.decode_plan import CONFIGS, lane_plans, table_of

MODULES = ("compat", "pipeline", "starts", "softmax", "decode_plan")
KERNELS = {False: ("decode_persistent",), True: ("small", "decode_small")}
PART, LSE, PART_LSE = 10**6, 10**9, 2 * 10**9  # addresses


def modules_of(small: bool, changes: dict[str, tuple[str, str]]) -> list[CodeType]:
    return compile_modules((*MODULES, *KERNELS[small]), changes)


class Call:
    """A random small call of the decode, by one of its plans."""

    def __init__(self, seed: int, small: bool, apart: bool) -> None:
        draw = random.Random(seed)
        self.small, self.apart = small, apart
        self.head_dim = draw.choice([64, 128])
        self.config = draw.choice([x for x in CONFIGS[self.head_dim] if (x.warpgroups == 1) == small])
        around = (2 * self.config.stages + 2) * self.config.key_tile  # past each stage twice
        self.n = draw.choice([draw.randint(1, 64), draw.randint(1, 300)])
        self.slots = draw.randint(1, draw.choice([900, around]))
        self.rows, self.group = draw.randint(1, 2), draw.randint(1, 2)
        self.heads = self.group * draw.randint(1, 2)
        self.sink = draw.randint(1, self.slots) if apart else 0
        self.valid = [draw.choice([1, self.slots, draw.randint(1, self.slots)]) for _ in range(self.rows)]
        self.lanes = draw.sample(range(3), self.rows) if draw.random() < 0.5 else None
        self.processors, self.resident = draw.randint(1, 6), draw.randint(1, 4)
        plans = lane_plans(self.config, self.heads, self.n, self.slots, self.rows, self.processors)
        self.plan = draw.choice([plans[-1], *plans])  # the last one cuts no tile, or fewest
        self.table = table_of(self.plan, self.rows, self.n, self.processors)

    def run(self, machine: Machine) -> None:
        machine.names |= stand_ins(machine)
        items = [x for item in self.table.items for x in item]
        words = [*items, *self.valid, *(self.lanes or [])]
        names = ("q", "q_sink", "k", "v", "out")
        tensors = {f"{name}_desc": SimpleNamespace(name=name, dtype=None, bytes=2) for name in names}
        numbers = {
            "p_lse": LSE, "p_part": PART, "p_part_lse": PART_LSE, "p_valid": len(items),
            "p_lanes": len(items) + self.rows, "heads": self.heads, "group": self.group, "n": self.n,
            "slots": self.slots, "sink": self.sink, "stride_valid": 1, "stride_lanes": 1,
        }  # fmt: skip
        constants = {
            "BN": self.config.key_tile, "D": self.head_dim, "STAGES": self.config.stages, "num_warps": 4,
            "HAS_LANES": self.lanes is not None, "Q_SINK": self.apart, "scale2": 1.0,
        }  # fmt: skip
        if self.small:
            splits = len(self.plan.bundles) // len(self.plan.tiles)
            grid = (-(-self.n // 64) * splits, self.heads, self.rows)
            gl = machine.names["gl"]
            gl.program_id = lambda axis: Array(np.unravel_index(machine.now.program, grid, order="F")[axis])
            gl.num_programs = lambda axis: Array(grid[axis])
            kernel, programs, numbers["splits"] = "decode_small", int(np.prod(grid)), splits
        else:
            kernel, programs = "decode_persistent", self.table.ctas
            numbers |= {"slot_tiles": self.plan.slot_tiles, "p_items": 0}
            constants |= {"W": self.config.warpgroups, "TURNS": self.config.turns, "REGISTERS": 0}
        machine.run(
            kernel, programs, self.resident, words, **tensors, **constants,
            **{name: Array(x) for name, x in numbers.items()},
        )  # fmt: skip

    def parts(self, machine: Machine) -> tuple[dict[int, Tile], dict[int, float]]:
        """Return what each unit of partial results is made of, and its log-sum-exp, in those that were stored."""
        made, lse = {}, {}
        for addresses, x in machine.stored:
            first = int(addresses.min())
            if isinstance(x, Tile):
                unit = (first - PART) // (64 * self.head_dim)
                assert unit not in made
                made[unit] = x
            elif first >= PART_LSE:
                unit = (first - PART_LSE) // 64
                assert unit not in lse
                lse[unit] = float(x[0])
        return made, lse

    def check(self, modules: list[CodeType], seed: int) -> None:
        """Run under a schedule and assert that every row is made of what is filled."""
        machine = Machine(modules, seed, False)
        self.run(machine)
        made, lse = self.parts(machine)
        tiles: dict[tuple[int, int, int], list[Tile]] = {}
        for (name, b, h, row, _), cell in machine.memory.items():
            assert name == "out"
            tiles[b, h, row] = cell.content
        for b, h, row, unit, step, count in self.table.merges:
            units = [unit + step * i for i in range(count)]
            assert (b, h, row) not in tiles
            assert all((x in made) == (lse[x] == 0) for x in units)
            tiles[b, h, row] = [made[x] for x in units if x in made]
        starts = range(0, self.n, 64)
        assert tiles.keys() == {(b, h, row) for b in range(self.rows) for h in range(self.heads) for row in starts}
        for (b, h, first), parts in tiles.items():
            home = {"k": (self.lanes[b] if self.lanes else b, h // self.group)}
            seen = sum((Counter(keys_of(x, (b, h, first), home, self.config.key_tile)) for x in parts), Counter())
            assert seen == {("q_sink" if x < self.sink else "q", "k", x): 1 for x in range(self.valid[b])}, (b, h)


KINDS = {  # small, apart
    "persistent": (False, False),
    "persistent, sinks apart": (False, True),
    "small": (True, False),
    "small, sinks apart": (True, True),
}


def check(kind: str, modules: list[CodeType], calls: int = 40) -> None:
    for seed in range(calls):
        Call(seed, *KINDS[kind]).check(modules, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_under_any_schedule_every_row_is_made_of_what_is_filled(kind) -> None:
    check(kind, modules_of(KINDS[kind][0], {}))


PERSISTENT, SMALL, SHARED, PLAN = "decode_persistent", "decode_small", "small", "decode_plan"
GIVEN_BACK = "mbarrier.arrive(v_empty.index(v_stage), count=1)"
MISTAKES = {  # what is wrong: (kind of call, how it shows, where, (old, new) text)
    "keys are not waited for": ("persistent", "race: _scores", PERSISTENT, (
        "k_smem.shape[0])\n    mbarrier.wait(k_full.index(stage), phase)", "k_smem.shape[0])",
    )),
    "values are not waited for": ("persistent", "race: _next_tile", PERSISTENT, (
        "mbarrier.wait(v_full.index(v_stage), v_phase)", "pass",
    )),
    "keys are overwritten unasked": ("persistent", "race: _copy_keys", PERSISTENT, (
        "mbarrier.wait(k_empty.index(stage), phase)", "pass",
    )),
    "values are overwritten unasked": ("persistent", "race: _copy_keys", PERSISTENT, (
        "mbarrier.wait(v_empty.index(stage), phase)", "pass",
    )),
    "queries are overwritten unasked": ("persistent", "race|phase", PERSISTENT, (
        "mbarrier.wait(q_empty.index(q_stage), q_phase)", "pass",
    )),
    "queries are given back by one": ("persistent", "race|phase|deadlock", PERSISTENT, (
        "_barriers(Q_STAGES, W)", "_barriers(Q_STAGES, 1)",
    )),
    "queries are not given back": ("persistent", "deadlock", PERSISTENT, (
        "    mbarrier.arrive(q_read, count=1)\n    if Q_SINK:", "    if Q_SINK:",
    )),
    "queries are given back before their last scores": ("persistent, sinks apart", "race|phase|deadlock", PERSISTENT, (
        "    for _ in range(1, run[0]):", "    mbarrier.arrive(q_read, count=1)\n    for _ in range(1, run[0]):",
    )),
    "values are given back before both matmuls have ended": ("persistent", "race: _copy_keys", PERSISTENT, swapped(
        "s, acc = warpgroup_mma_wait(0, deps=(s, acc))", GIVEN_BACK,
    )),
    "values are given back before their matmul has ended": ("persistent", "race: _copy_keys", PERSISTENT, swapped(
        "acc = warpgroup_mma_wait(0, deps=(acc,))", GIVEN_BACK,
    )),
    "who has no rows gives nothing back": ("persistent", "deadlock|race|phase", PERSISTENT, (
        "for _ in range(tiles):\n        mbarrier.wait(k_full", "for _ in range(0):\n        mbarrier.wait(k_full",
    )),
    "who has no rows does not let the next one start": ("persistent", "deadlock", PERSISTENT, (
        "        pass_start(W, TURNS, ME)\n        mbarrier.arrive(k_empty", "        mbarrier.arrive(k_empty",
    )),
    "the last start is not taken": ("persistent", "ends before", PERSISTENT, ("    close_starts(TURNS, ME)\n", "")),
    "rows are overwritten while they are sent": ("persistent", "race: _consumer", PERSISTENT, (
        "tma.store_wait(0)\n                    staged", "staged",
    )),
    "rows are sent without a fence": ("persistent", "no fence", PERSISTENT, (
        "fence_async_shared()\n                    tma_store", "tma_store",
    )),
    "a program ends while its rows are sent": ("persistent", "ends before", PERSISTENT, (
        "close_starts(TURNS, ME)\n    tma.store_wait(0)", "close_starts(TURNS, ME)",
    )),
    "slots below the first are not hidden": ("persistent", "assert", PERSISTENT, (
        "first_weights(hide_first(s, run[2])", "first_weights((s)",
    )),
    "slots of the sinks count twice": ("persistent, sinks apart", "assert", PERSISTENT, ("if BEGINS:", "if False:")),
    "sinks are read by queries of the window": ("persistent, sinks apart", "assert", PERSISTENT, (
        "_copy_queries(q_sink_desc", "_copy_queries(q_desc",
    )),
    "parts overlap": ("persistent", "assert", PLAN, (
        "return low * filled // slot_tiles, high", "return max(low * filled // slot_tiles - 1, 0), high",
    )),
    "another lane is read": ("persistent", "elsewhere", PERSISTENT, ("lane = i_b\n", "lane = i_b + 1\n")),
    "small: keys are not waited for": ("small", "race: next_scores", SMALL, (
        "        mbarrier.wait(k_full.index(stage), j // STAGES & 1)\n", "",
    )),
    "small: values are not waited for": ("small", "race: next_scores", SHARED, (
        "    mbarrier.wait(v_full.index(last), (j - 1) // STAGES & 1)\n", "",
    )),
    "small: the sum is not waited for": ("small", "may not be done|race", SHARED, (
        "s, acc = warpgroup_mma_wait(0, deps=(s, acc))", "s = warpgroup_mma_wait(1, deps=(s,))",
    )),
    "small: a tile too far ahead is copied": ("small", "race|bytes|phase|deadlock", SMALL, (
        "        _copy(v_desc, at, j - 1 + STAGES, tiles", "        _copy(v_desc, at, j + STAGES, tiles",
    )),
    "small: queries of the window are not waited for": ("small, sinks apart", "race: next_scores", SMALL, (
        "mbarrier.wait(q_full, 1, pred=j == sinks)", "pass",
    )),
    "small: queries of the sinks are replaced too early": ("small, sinks apart", "assert|race|bytes|deadlock", SMALL, (
        "_replace_queries(queries, (j + 1 == sinks)", "_replace_queries(queries, (j + 2 == sinks)",
    )),
    "small: slots of the sinks count twice": ("small, sinks apart", "assert", SMALL, (
        "            if j == sinks:\n", "            if False:\n",
    )),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake) -> None:
    kind, shows, module, change = MISTAKES[mistake]
    modules = modules_of(KINDS[kind][0], {module: change})
    with pytest.raises(AssertionError, match=shows):
        check(kind, modules, 60)
