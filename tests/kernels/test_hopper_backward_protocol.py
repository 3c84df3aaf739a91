"""How the partitions of the fused Hopper backward cooperate: run on the CPU, under random schedules.

The kernels' own source runs (`gluon_emulator.py`) on small random calls. Every tile of dq, dk and dv must come out made
of the right tiles, and the protocol must hold: no deadlock, no race, no phase of a barrier taken for another one. That
these tests see what they look for is shown by kernels with mistakes in them.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import product
from types import CodeType, SimpleNamespace

import numpy as np
import pytest
from gluon_emulator import Machine, compile_modules, swapped
from gluon_values import hidden

from swba_kernels import BlockWindow

SHARED = (
    "compat", "pipeline", "notes", "starts",
    "backward_ranges", "backward_shared", "backward_order", "backward_loader",
)  # fmt: skip
KERNELS = {128: "backward_fused", 64: "backward_fused_narrow"}
Facts = frozenset


def modules_of(head_dim: int, changes: dict[str, tuple[str, str]]) -> list[CodeType]:
    return compile_modules((*SHARED, KERNELS[head_dim]), changes)


class Call:
    """A random small call of the backward, with 1 to 11 tiles of queries for a tile of keys."""

    def __init__(self, seed: int, head_dim: int, in_turn: bool) -> None:
        draw = random.Random(seed)
        n, block_size = draw.choice([draw.randint(1, 200), draw.randint(200, 640)]), draw.randint(1, 300)
        sink = draw.choice([0, 0, draw.randint(1, 140)])
        self.pattern = BlockWindow(block_size, block_size + draw.randint(0, 300), sink, draw.randint(0, block_size))
        start = self.pattern.grid_start
        self.sizes = (n, min(block_size, n - start), min(self.pattern.window, n), min(sink, n), start)
        self.batch, self.kv_heads, self.group = draw.choice([(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 2)])
        self.heads = self.kv_heads * self.group
        self.head_dim, self.in_turn = head_dim, in_turn
        self.apart = sink > 0 and (in_turn or draw.random() < 0.5)  # in any order, queries may read both
        self.turn_rows = in_turn * (64 if head_dim == 128 else draw.choice([64, 128, 256]))
        self.together, self.resident = draw.randint(1, 4), draw.randint(1, 4)

    def key_tiles(self) -> list[tuple[bool, int, np.ndarray]]:
        """Return (in sinks, first key, visible pairs [queries, 128]) of all tiles of keys, padded to whole tiles."""
        n, sink = self.sizes[0], self.sizes[3] * self.apart
        mask = np.zeros((n + 63, n + 127), bool)
        mask[:n, :n] = self.pattern.mask(n).numpy()
        of_sinks = mask * (np.arange(n + 127) < sink)
        tiles = [(True, first, of_sinks[:, first : first + 128]) for first in range(0, sink, 128)]
        return tiles + [(False, first, mask[:, first : first + 128]) for first in range(sink, n, 128)]

    def words(self) -> list[int]:
        """Return the counters in global memory: the ticket, and whose turn it is, ~(the first one's) to begin with."""
        words = [0]
        for in_sinks in [False, True][: 1 + self.apart]:
            tiles = [visible for apart, _, visible in self.key_tiles() if apart == in_sinks]
            first = [
                next((i for i, visible in enumerate(tiles) if visible[row : row + 64].any()), 0)
                for row in range(0, self.sizes[0], self.turn_rows)
            ]
            words += [~i for i in first] * (self.batch * self.heads * self.head_dim // 64)
        return words

    def run(self, machine: Machine) -> None:
        kv_in_all = self.batch * self.kv_heads
        work = len(self.key_tiles()) * kv_in_all
        names = ("q", "q_sink", "grad", "k", "v", "dk", "dv", "dk_sink", "dv_sink")
        tensors = {f"{name}_desc": SimpleNamespace(name=name, dtype=None, bytes=2) for name in names}
        for name in ("lse", "delta", "sum"):
            tensors[f"{name}_desc"] = SimpleNamespace(name=name, bytes=4)
        tensors |= dict(zip(("n", "block_size", "window", "sink", "grid_start"), self.sizes, strict=True))
        if self.head_dim == 64:
            tensors |= {"all_work": work, "SUM_REGISTERS": 0}
        machine.run(
            "fused_kernel" if self.head_dim == 128 else "fused_narrow_kernel",
            work if self.head_dim == 128 else min(work, self.resident), self.resident,
            self.words() if self.in_turn else [0], p_ticket=0, p_turns=1, **tensors, scale2=1.0,
            heads=self.heads, group=self.group, kv_in_all=kv_in_all, together=self.together, BLOCK_M=64,
            D=self.head_dim, STAGES=2 if self.head_dim == 128 else 4, SLOPE_STAGES=3, REGISTERS=0,
            TURN_ROWS=self.turn_rows, Q_SINK=self.apart,
        )  # fmt: skip

    def tile(self, *at) -> Facts:
        """Return what a tile is made of that was loaded from (tensor, batch row, head, row)."""
        return Facts((*at, column) for column in range(0, self.head_dim, 64))

    def expected(self) -> dict:
        """Return what each tile in global memory must be made of: of sums as a list, with one for each tile of keys."""
        memory = {}
        for (in_sinks, first, visible), b, head in product(self.key_tiles(), range(self.batch), range(self.heads)):
            rows = [row for row in range(0, self.sizes[0], 64) if visible[row : row + 64].any()]
            kv_head, sink = head // self.group, "_sink" * in_sinks
            for row in rows[::-1] if self.in_turn else rows:
                q, grad = self.tile("q" + sink, b, head, row), self.tile("grad", b, head, row)
                lse, delta = (Facts({(name, b * self.heads + head, row)}) for name in ("lse", "delta"))
                both = Facts()
                for half in range(2):
                    at = (b, kv_head, first + 64 * half)
                    mask = hidden(visible[row : row + 64, 64 * half : 64 * half + 64].T)
                    p = {(self.tile("k", *at), q)} | lse | mask
                    ds = p | {(self.tile("v", *at), grad)} | delta | mask
                    for name, pair in (("dv", (Facts(p), grad)), ("dk", (Facts(ds), q))):
                        (terms,) = memory.setdefault((name + sink, *at, 0), [set()])
                        terms.add((len(terms), pair))
                    both |= ds
                for column in range(0, self.head_dim, 64):
                    k = Facts(("k", b, kv_head, first + 64 * half, column) for half in range(2))
                    at = ("sum", b + self.batch * in_sinks, head, row * self.head_dim // 64 + column, 0)
                    memory.setdefault(at, []).append(Facts({(both, k)}))
        return memory

    def check(self, modules: list[CodeType], seed: int) -> None:
        """Run under a schedule and assert that every tile is made of what it should be, in turn also in which order."""
        machine = Machine(modules, seed, self.in_turn)
        self.run(machine)
        found, expected = ({at: cell.content for at, cell in machine.memory.items()}, self.expected())
        assert found.keys() == expected.keys()
        for at, parts in expected.items():
            assert found[at] == parts if self.in_turn else Counter(found[at]) == Counter(map(Facts, parts)), at


def check(head_dim: int, in_turn: bool, modules: list[CodeType], calls: int) -> None:
    for seed in range(calls):
        Call(seed, head_dim, in_turn).check(modules, seed)


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("head_dim", [128, 64])
def test_under_any_schedule_every_tile_is_made_of_the_right_ones(head_dim, in_turn) -> None:
    check(head_dim, in_turn, modules_of(head_dim, {}), 60)


FUSED, NARROW = KERNELS[128], KERNELS[64]
LOADER, ORDER = "backward_loader", "backward_order"
ANY_ORDER = {  # what is wrong: (how it shows, where, (old, new) text of the kernel at head dim 128)
    "queries are not waited for": ("race", FUSED, ("mbarrier.wait(full.index(stage), (i >> 1) & 1)", "pass")),
    "a stage is refilled unasked": ("race", LOADER, ("mbarrier.wait(empty.index(stage), phase)\n        if", "if")),
    "a stage is given back before the matmuls have ended": ("race: load_queries", FUSED, swapped(
        "dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))", "mbarrier.arrive(empty.index(stage), count=1)",
    )),
    "a stage is given back by one of two": ("race", FUSED, (
        "init(empty.index(i), count=2", "init(empty.index(i), count=1",
    )),
    "a stage counts as full too early": ("bytes", LOADER, ("2 * BLOCK_M * (D * 2 + 4)", "2 * BLOCK_M * D * 2")),
    "a stage is marked behind the barrier": ("race: tell|race: told", LOADER, swapped(
        "tell((gl.where(edge, row, -1),), marks, stage)", "mbarrier.expect(ready, 2 * BLOCK_M * (D * 2 + 4))",
    )),
    "S is used before it has been waited for": ("may not be done", FUSED, (
        "s_t = warpgroup_mma_wait(1", "s_t = warpgroup_mma_wait(2",
    )),
    "dS is overwritten unasked": ("race", FUSED, ("mbarrier.wait(ds_full.index(one_before), next_phase)", "pass")),
    "dS of the last tile is not waited for": ("race: _issue_dq", FUSED, (
        "mbarrier.wait(ds_full.index(two_before), phase)", "pass",
    )),
    "dS is told before it is written": ("race: _issue_dq", FUSED, swapped(
        "ds_smem.index(slot).slice(WARPGROUP * 64, 64, dim=0).store(ds_t)", "_announce(ds_full.index(slot))",
    )),
    "dS is told by one of two": ("race", FUSED, ("init(ds_full.index(i), count=2", "init(ds_full.index(i), count=1")),
    "dS and dQ are not fenced": ("no fence", FUSED, (
        "fence_async_shared()\n    mbarrier.arrive(full", "mbarrier.arrive(full",
    )),
    "dS has two slots": ("race", FUSED, ("ds_smem.index(slot).slice", "ds_smem.index(slot & 1).slice")),
    "dQ is overwritten unasked": ("race: _hand_over", FUSED, ("mbarrier.wait(empty, phase)", "pass")),
    "dQ is awaited by the other parity": ("deadlock", FUSED, ("dq_empty, stage ^ 1)", "dq_empty, stage)")),
    "dQ is given back before it has been read": ("race: _hand_over", ORDER, swapped(
        "tma.store_wait(0)", "mbarrier.arrive(empty, count=1)",
    )),
    "dQ is added a tile too early": ("assert", ORDER, (
        "static_range(2):\n        mbarrier.wait(full, phase)\n        mbarrier.arrive(empty, count=1)\n    phase = 0",
        "static_range(1):\n        mbarrier.wait(full, phase)\n        mbarrier.arrive(empty, count=1)\n    phase = 1",
    )),
    "dQ takes an odd phase for an even one": ("phase", ORDER, ("        phase ^= 1\n", "")),
    "a gradient goes out by a stage in use": ("race: _store", FUSED, (".index(count & 1)", ".index(count & 1 ^ 1)")),
    "a program ends while its gradients are read": ("ends before", FUSED, ("    tma.store_wait(0)\n", "")),
    "a start is not passed on": ("deadlock", FUSED, ("pass_start(2, not IN_TURN, WARPGROUP)", "pass")),
    "the last start is not taken": ("ends before", FUSED, ("close_starts(True, WARPGROUP)", "pass")),
    "both consumers start": ("twice|deadlock", "starts", ("if TURNS and ME == W - 1", "if TURNS")),
}  # fmt: skip
IN_TURN = {
    "a turn is not waited for": ("written|race: add", ORDER, ("now = await_turn(p_turn, tile)", "now = tile")),
    "a turn is passed on before the sums have arrived": ("race: add", ORDER, (
        "pass_turn(p_before, tile + 1, 1)", "pass_turn(p_before, tile + 1, 2)",
    )),
    "a turn is passed on at once": ("race: add", ORDER, (
        "if i > 0:\n                pass_turn(p_before, tile + 1, 1)", "pass_turn(p_turn, tile + 1, 1)",
    )),
    "the last turn is passed on before the sums have arrived": ("race: add", ORDER, (
        "pass_turn(p_before, tile + 1, 0)", "pass_turn(p_before, tile + 1, 1)",
    )),
    "the last turn is not passed on": ("deadlock", ORDER, ("    pass_turn(p_before, tile + 1, 0)", "    pass")),
    "the first one adds": ("nobody has written", ORDER, ("if now < 0", "if False")),
    "programs do not take tickets": ("deadlock", FUSED, ("gl.atomic_add(p_ticket, 1)", "gl.program_id(0)")),
}  # fmt: skip
OF_NARROW = {  # of the kernel at head dim 64, in turn
    "keys are overwritten unasked": ("race", LOADER, (
        "mbarrier.wait(keys_empty.index(key_stage), key_phase)\n        tell((tiles", "tell((tiles",
    )),
    "keys are given back while gradients are read": ("race", NARROW, (
        "tma.store_wait(0)\n        mbarrier.arrive(keys_empty", "mbarrier.arrive(keys_empty",
    )),
    "dS is overwritten unasked": ("race: _hand_on", NARROW, ("mbarrier.wait(ds_empty.index(stage), phase)", "pass")),
    "dQ is overwritten unasked": ("race: _fold_and_add", NARROW, ("tma.store_wait(1)", "tma.store_wait(2)")),
    "a turn is passed on before the sums have arrived": ("race: _fold_and_add", NARROW, (
        "pass_turn(p_turn, tile + 1, 0)\n                if", "pass_turn(p_turn, tile + 1, 1)\n                if",
    )),
}  # fmt: skip
MISTAKES = [
    pytest.param(head_dim, in_turn, *mistake, id=f"{what}, head dim {head_dim}")
    for head_dim, in_turn, mistakes in ((128, False, ANY_ORDER), (128, True, IN_TURN), (64, True, OF_NARROW))
    for what, mistake in mistakes.items()
]


@pytest.mark.parametrize(("head_dim", "in_turn", "shows", "module", "change"), MISTAKES)
def test_a_mistake_is_found(head_dim, in_turn, shows, module, change) -> None:
    modules = modules_of(head_dim, {module: change})
    with pytest.raises(AssertionError, match=shows):
        check(head_dim, in_turn, modules, 15)
