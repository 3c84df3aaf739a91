"""How producer and consumers of the Hopper forward cooperate: run on the CPU, under random schedules.

The kernel's own source runs (`gluon_emulator.py`) on small random calls: on top of a ring or not, with sinks, with
queries of their own for them, in tiles that straddle blocks, cut along the keys. Each row, its parts put together, must
come out made of the very keys that it sees, each once and with its value, and the protocol must hold: no deadlock, no
race, no phase of a barrier taken for another one. That these tests see what they look for is shown by kernels with
mistakes in them.

B batch, H query heads, N tokens, L ring lanes, S ring slots.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from types import CodeType, SimpleNamespace

import pytest
from gluon_attention import keys_of, stand_ins
from gluon_emulator import Machine, compile_modules, swapped
from gluon_values import Array, Tile

from swba_kernels import BlockWindow

pytest.importorskip("triton.experimental.gluon")

from swba_kernels.hopper.forward_cut import Cuts, item_of_cut
from swba_kernels.hopper.forward_plan import place_of, plan_forward, rows_of

MODULES = ("compat", "pipeline", "notes", "starts", "forward_plan")
OF_FORWARD = ("shared", "cut", "producer", "outputs", "consumer")
PERSISTENT = (*MODULES, *(f"forward_{name}" for name in OF_FORWARD), "forward")
SMALL = (*MODULES, "small", "forward_small")
OUT, LSE, PART, PART_LSE = 10**6, 10**9, 2 * 10**9, 3 * 10**9  # addresses


def modules_of(kind: str, changes: dict[str, tuple[str, str]]) -> list[CodeType]:
    return compile_modules(SMALL if kind == "small blocks" else PERSISTENT, changes)


class Call:
    """A random small call of the forward, by one of the kernel's shapes, or by the kernel for small blocks."""

    def __init__(
        self, seed: int, ring: bool, q_sink: bool, straddle: bool, small: bool = False, cut: bool = False
    ) -> None:
        draw = random.Random(seed)
        self.head_dim, self.groups, self.columns, self.stages = draw.choice(
            [(128, 2, 128, 2), (64, 3, 128, 2), (64, 2, 128, 3)] + [(64, 4, 64, 3)] * (not ring)
        )
        self.turns = self.head_dim == 64 or draw.random() < 0.2
        n, block = draw.choice([draw.randint(1, 200), draw.randint(200, 500)]), draw.randint(64 if straddle else 1, 300)
        sink = draw.choice([0, draw.randint(1, 150)]) if not q_sink else draw.randint(1, 150)
        self.ring, self.apart, self.straddle, self.small = ring, q_sink, straddle, small
        wider, long_sinks = draw.randint(0, 250), cut and draw.random() < 0.4
        if long_sinks:  # those of the call's own come in more than one tile
            n, block, sink, wider = draw.randint(300, 500), draw.randint(1, 90), draw.randint(150, 300), 0
        if small:
            self.head_dim, self.columns, block, sink = 64, 128, draw.randint(1, 127), 0
        self.pattern = BlockWindow(block, block + wider, sink, draw.randint(0, block))
        self.n, self.batch, self.group = n, draw.randint(1, 2), draw.randint(1, 2)
        self.heads = self.group * draw.randint(1, 2)
        self.resident = draw.randint(1, 4)
        self.window, self.sink = self.pattern.window, sink
        if not ring:
            self.window, self.sink = min(self.window, n), min(sink, n)
        self.slots = sink + self.window + draw.choice([0, draw.randint(1, 90)])
        positions = [0] if long_sinks else [0, sink, draw.randint(0, self.slots), draw.randint(0, 3 * self.slots)]
        self.positions = [draw.choice(positions) if ring else 0 for _ in range(self.batch)]
        self.lanes = draw.sample(range(3), self.batch) if draw.random() < 0.5 else None
        weighed = (0, 0) if self.ring else (self.window, self.sink)
        self.plan = plan_forward(n, block, *weighed, self.pattern.grid_start, self.groups * 64, self.straddle)
        items = self.heads * self.plan.tiles
        whole = draw.choice([0, draw.randint(0, items - 1)])
        cuts = Cuts(self.batch * whole, whole, items - whole, draw.randint(2, 6), PART, PART_LSE)
        self.cuts = cuts if cut else None

    def run(self, machine: Machine) -> None:
        machine.names |= stand_ins(machine)
        names = ("q", "q_sink", "k", "v", "out", "ring_k", "ring_v")
        tensors = {f"{name}_desc": SimpleNamespace(name=name, dtype=None, bytes=2) for name in names}
        start = self.pattern.grid_start
        sizes = {
            "p_lse": LSE, "heads": self.heads, "group": self.group, "n": self.n, "window": self.window,
            "block_size": self.pattern.block_size, "grid_start": start,
        }  # fmt: skip
        if self.small:
            of_small = {name: tensors[name] for name in ("q_desc", "k_desc", "v_desc", "out_desc")}
            programs = -(-self.n // 64) * self.batch * self.heads
            machine.run(
                "forward_small", programs, self.resident, [], **of_small, scale2=1.0, BN=128, D=64, STAGES=2,
                num_warps=4, **{name: Array(x) for name, x in sizes.items()},
            )  # fmt: skip
            return
        plan, cuts = self.plan, self.cuts or Cuts(*[None] * 6)
        items = self.batch * self.heads * plan.tiles
        if self.cuts:
            items = cuts.whole_items + self.batch * cuts.cut * cuts.parts
        of_batch = self.batch * self.heads
        sizes |= {
            "p_out": OUT, "p_position": 1, "p_lanes": 1 + self.batch,
            "s_ob": self.heads * self.n * self.head_dim, "s_oh": self.n * self.head_dim, "s_on": self.head_dim,
            "sink": self.sink, "ring_window": self.slots - self.sink, "heavy_items": of_batch * plan.heavy,
            "group_items": of_batch * plan.per_block, **plan._asdict(), "items": items,
            **(cuts._asdict() if self.cuts else {}),
        }  # fmt: skip
        machine.run(
            "_forward", min(self.resident, items), self.resident, [0, *self.positions, *(self.lanes or [])],
            **{**cuts._asdict(), **tensors, **{name: Array(x) for name, x in sizes.items()}}, scale2=1.0, p_ticket=0,
            GROUPS=self.groups, COLUMNS=self.columns, D=self.head_dim, STAGES=self.stages, Q_STAGES=2, REGISTERS=0,
            TURNS=self.turns, SINKS=self.sink > 0, RING=self.ring, LANES=self.lanes is not None, Q_SINK=self.apart,
            STRADDLE=self.straddle, CUT=self.cuts is not None,
        )  # fmt: skip

    def rows(self, machine: Machine) -> Iterator[tuple[tuple[int, int, int], list[Tile]]]:
        """Yield ((row of the batch, head, row), parts that it is made of) of all rows of out as they were stored."""
        for (name, b, h, row, _), cell in machine.memory.items():
            assert name == "out"
            for i in range(row, min(row + 64, self.n)):
                yield (b, h, i), cell.content
        for addresses, x in machine.stored:
            if isinstance(x, Tile) and addresses.max() < PART:
                for at in set(((addresses - OUT) // self.head_dim).tolist()):
                    b, rest = divmod(at, self.heads * self.n)
                    yield (b, *divmod(rest, self.n)), [x]
        if self.cuts:
            yield from self.rows_of_parts(machine)

    def rows_of_parts(self, machine: Machine) -> Iterator[tuple[tuple[int, int, int], list[Tile]]]:
        """Yield as `rows` those of items that are cut, of which each part was stored once, or told to have no keys."""
        made, lse, plan, cuts = {}, {}, self.plan, self.cuts
        for addresses, x in machine.stored:
            found, base, size = (made, PART, 64 * self.head_dim) if isinstance(x, Tile) else (lse, PART_LSE, 64)
            if addresses.max() >= base:
                unit = (int(addresses.min()) - base) // size
                assert unit not in found
                found[unit] = x
        assert made.keys() == {unit for unit, x in lse.items() if x[0] == 0}
        of_batch = self.batch * self.heads
        sizes = (of_batch * plan.heavy, of_batch * plan.per_block, *plan)
        for at in range(self.batch * cuts.cut):
            head, block, tile = place_of.fn(item_of_cut.fn(at, cuts.whole, cuts.cut), *sizes)
            grid = (self.n, self.pattern.block_size, self.pattern.grid_start, self.groups * 64)
            first, end = rows_of.fn(block, tile, *grid)
            for row in range(first, min(first + self.groups * 64, end)):
                units = [(at * cuts.parts + i) * self.groups + (row - first) // 64 for i in range(cuts.parts)]
                assert lse.keys() >= set(units)
                yield (*divmod(head, self.heads), row), [made[x] for x in units if x in made]

    def expected(self, b: int, row: int) -> dict[tuple, int]:
        """Return what `keys_of` a row should."""
        past, start, block = self.positions[b], self.pattern.grid_start, self.pattern.block_size
        end = min(row - (row - start) % block + block, self.n) + past
        keys = {*range(min(self.sink, end)), *range(max(end - self.window, 0), end)}
        names = {}
        for key in keys:
            queries = "q_sink" if self.apart and key < self.sink else "q"
            slot = key if key < self.sink else self.sink + (key - self.sink) % (self.slots - self.sink)
            names[(queries, "k", key - past) if key >= past else (queries, "ring_k", slot)] = 1
        return names

    def check(self, modules: list[CodeType], seed: int) -> None:
        """Run under a schedule and assert that every row was stored once, made of what it sees."""
        machine = Machine(modules, seed, False)
        self.run(machine)
        rows = list(self.rows(machine))
        assert len(rows) == len(dict(rows)) == self.batch * self.heads * self.n
        for at, made in rows:
            b, h, row = at
            lanes = {"k": b, "ring_k": self.lanes[b] if self.lanes else b}
            homes = {x: (lane, h // self.group) for x, lane in lanes.items()}
            seen = sum((Counter(keys_of(x, at, homes, self.columns)) for x in made), Counter())
            assert seen == self.expected(b, row), at
        lse = [x for addresses, value in machine.stored if not isinstance(value, Tile) for x in addresses.tolist()]
        cut = dict(self.rows_of_parts(machine)) if self.cuts else ()
        whole = [(b * self.heads + h) * self.n + row for (b, h, row), _ in rows if (b, h, row) not in cut]
        assert sorted(x - LSE for x in lse if x < PART) == sorted(whole)


KINDS = {  # ring, q_sink, straddle, small, cut
    "whole blocks": (False, False, False),
    "sinks apart": (False, True, False),
    "straddling": (False, False, True),
    "on a ring": (True, False, False),
    "on a ring, sinks apart": (True, True, False),
    "small blocks": (False, False, False, True),
    "on a ring, cut": (True, False, False, False, True),
}


def check(kind: str, modules: list[CodeType], calls: int = 25) -> None:
    for seed in range(calls):
        Call(seed, *KINDS[kind]).check(modules, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_under_any_schedule_every_row_is_made_of_the_keys_that_it_sees(kind) -> None:
    check(kind, modules_of(kind, {}))


CONSUMER, PRODUCER, KERNEL, PLAN = "forward_consumer", "forward_producer", "forward", "forward_plan"
CUT, OUTPUTS = "forward_cut", "forward_outputs"
BLOCKS, SHARED = "forward_small", "small"
MISTAKES = {  # what is wrong: (kind of call, how it shows, where, (old, new) text)
    "keys are not waited for": ("whole blocks", "race: _issue_scores", CONSUMER, (
        "buffers.k.shape[0])\n    mbarrier.wait(bars.k_full.index(stage), phase)", "buffers.k.shape[0])",
    )),
    "values are not waited for": ("whole blocks", "race: _next_tile", CONSUMER, (
        "mbarrier.wait(bars.v_full.index(last), last_phase)", "pass",
    )),
    "keys are overwritten unasked": ("whole blocks", "race: _copy", PRODUCER, (
        "mbarrier.wait(bars.k_empty.index(stage), phase)", "pass",
    )),
    "values are overwritten unasked": ("on a ring", "race: _copy", PRODUCER, (
        "mbarrier.wait(bars.v_empty.index(stage), phase)", "pass",
    )),
    "keys are given back by all but one": ("whole blocks", "race|phase", KERNEL, (
        "init(k_empty.index(i), count=GROUPS)", "init(k_empty.index(i), count=GROUPS - 1)",
    )),
    "values are given back before both matmuls have ended": ("whole blocks", "race: _copy", CONSUMER, swapped(
        "s, acc = warpgroup_mma_wait(0, deps=(s, acc))", "mbarrier.arrive(bars.v_empty.index(last), count=1)",
    )),
    "values are given back before their matmul has ended": ("whole blocks", "race: _copy", CONSUMER, swapped(
        "acc = warpgroup_mma_wait(0, deps=(acc,))", "mbarrier.arrive(bars.v_empty.index(last), count=1)",
    )),
    "the sum is rescaled before it is done": ("whole blocks", "may not be done", CONSUMER, (
        "acc = warpgroup_mma_wait(0, deps=(acc,))\n        mbarrier.arrive(bars.v_empty.index(last)",
        "mbarrier.arrive(bars.v_empty.index(last)",
    )),
    "the sum of both is not waited for": ("straddling", "may not be done|race", CONSUMER, (
        "s, acc = warpgroup_mma_wait(0, deps=(s, acc))", "s, acc = warpgroup_mma_wait(1, deps=(s, acc))",
    )),
    "queries are given back by one": ("whole blocks", "race|phase|deadlock", KERNEL, (
        "init(q_empty.index(i), count=GROUPS)", "init(q_empty.index(i), count=1)",
    )),
    "queries are overwritten unasked": ("whole blocks", "race|phase", PRODUCER, (
        "    mbarrier.wait(bars.q_empty.index(q_stage), q_phase)\n    tell(item", "    tell(item",
    )),
    "a note is told behind its barrier": ("whole blocks", "race: tell|race: told", PRODUCER, swapped(
        "tell(item, buffers.notes, q_stage)", "mbarrier.expect(q_full, GROUPS * 64 * D * 2)", 4,
    )),
    "a stage counts as full too early": ("whole blocks", "bytes", PRODUCER, (
        "mbarrier.expect(k_full, COLUMNS * D * 2)", "mbarrier.expect(k_full, COLUMNS * D)",
    )),
    "who has no rows gives nothing back": ("whole blocks", "deadlock|race|phase", CONSUMER, (
        "for _ in range(tiles):\n        mbarrier", "for _ in range(0):\n        mbarrier",
    )),
    "who has no rows does not let the next one start": ("whole blocks", "deadlock", CONSUMER, (
        "        pass_start(buffers.out.shape[0], TURNS, GROUP)\n        mbarrier.arrive(bars.k_empty",
        "        mbarrier.arrive(bars.k_empty",
    )),
    "the last start is not taken": ("whole blocks", "ends before", CONSUMER, ("    close_starts(TURNS, GROUP)\n", "")),
    "rows are overwritten while they are sent": ("whole blocks", "race: _write", OUTPUTS, (
        "        tma.store_wait(0)\n        smem.store", "        smem.store",
    )),
    "rows are sent without a fence": ("whole blocks", "no fence", OUTPUTS, (
        "        smem.store(out)\n        fence_async_shared()", "        smem.store(out)",
    )),
    "a program ends while its rows are sent": ("whole blocks", "ends before", CONSUMER, (
        "    close_starts(TURNS, GROUP)\n    tma.store_wait(0)", "    close_starts(TURNS, GROUP)",
    )),
    "rows of the next block are written": ("whole blocks", "assert", OUTPUTS, (
        "if (row + 64 <= end) | (end == call.n):", "if row >= 0:",
    )),
    "one key too many is hidden": ("whole blocks", "assert", CONSUMER, ("(column >= hidden)", "(column > hidden)")),
    "two rows see what one does": ("straddling", "assert", CONSUMER, ("< first_end\n", "<= first_end\n")),
    "a consumer skips a tile too many": ("straddling", "assert|race|phase|deadlock", PLAN, (
        "rest = 0 if sink > 0 else (low - first) // columns", "rest = 0 if sink > 0 else (low - first) // columns + 1",
    )),
    "queries of the sinks are not waited for": ("sinks apart", "race", CONSUMER, (
        "    mbarrier.wait(bars.q_full.index(q_stage), q_phase)\n    return", "    return",
    )),
    "sinks are read by queries of the window": ("sinks apart", "assert|race", CONSUMER, (
        "            reads = buffers.q.index(q_stage * GROUPS + GROUP)", "            reads = q",
    )),
    "a ring is read from one slot too early": ("on a ring", "assert", PLAN, (
        "start = sink + turn - held +", "start = sink + turn - held - 1 +",
    )),
    "small: keys are not waited for": ("small blocks", "race: next_scores", BLOCKS, (
        "        mbarrier.wait(k_full.index(stage), j // STAGES & 1)\n", "",
    )),
    "small: values are not waited for": ("small blocks", "race: next_scores", SHARED, (
        "    mbarrier.wait(v_full.index(last), (j - 1) // STAGES & 1)\n", "",
    )),
    "small: the sum is used before it is done": ("small blocks", "may not be done", SHARED, (
        "s, acc = warpgroup_mma_wait(0, deps=(s, acc))", "s = warpgroup_mma_wait(1, deps=(s,))",
    )),
    "small: a tile too far ahead is copied": ("small blocks", "race|bytes|phase|deadlock", BLOCKS, (
        "        _copy(v_desc, at, j - 1 + STAGES, tiles", "        _copy(v_desc, at, j + STAGES, tiles",
    )),
    "small: keys of two tiles count twice": ("small blocks", "assert", BLOCKS, (
        "(key < stop_of(j, end, BN))", "(key < end)",
    )),
    "a part reads a tile of the next one": ("on a ring, cut", "assert", CUT, (
        "last = min(max(high - before, 0), tiles)", "last = min(max(high - before + 1, 0), tiles)",
    )),
    "a part goes to the place of another": ("on a ring, cut", "assert", PRODUCER, (
        "unit = (at - cuts.whole_items) * GROUPS", "unit = (at - cuts.whole_items)",
    )),
    "of a part without keys nobody tells": ("on a ring, cut", "assert", PRODUCER, (
        "for g in gl.static_range(GROUPS):\n            gl.store", "for g in gl.static_range(0):\n            gl.store",
    )),
    "a part begins at the first of the call's own sinks": ("on a ring, cut", "assert", PRODUCER, (
        "i_kv, sinks_at, sinks,", "i_kv, 0, sinks,",
    )),
    "an item that is cut is written whole": ("on a ring, cut", "assert|race", OUTPUTS, (
        "item.unit > 0", "item.unit > 10**6",
    )),
    "the first segment has no keys": ("on a ring, cut", "assert|race|phase|deadlock", CUT, (
        "if own == 0:", "if False:",
    )),
    "another lane is read": ("on a ring", "elsewhere", PRODUCER, (
        "lane = gl.load(call.p_lanes + i_b)", "lane = (i_b + 1)",
    )),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake) -> None:
    kind, shows, module, change = MISTAKES[mistake]
    modules = modules_of(kind, {module: change})
    with pytest.raises(AssertionError, match=shows):
        check(kind, modules)
