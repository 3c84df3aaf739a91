"""Run the Hopper kernels' own source on the CPU, under one random schedule after another.

A kernel's modules are compiled as they are, with stand-ins for what they import (neither Triton nor a GPU is needed),
and each call made a `yield from`, so that a partition can be suspended in any stand-in. Partitions, matmuls and copies
are tasks, of which a seeded scheduler lets one at a time go on. A partition counts as one thread.

Data are symbolic: a tile is a set of facts that tell what it was made of. Integers (ranges, notes, turns) are computed.

Races are found by clocks, so not by luck: an access must be ordered behind those before it by barriers, counters or
waits. A matmul or a copy has its operands from when it is issued until its issuer has waited for it, and a load from
global memory until its barrier is full. Named barriers order no data here, since `starts.py` says that they need not.
"""

from __future__ import annotations

import ast
import random
import re
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import CodeType, GeneratorType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from gluon_values import Access, Array, Barrier, Cell, Tile, Violation, hidden, same, tile

import swba_kernels

FOLDER = Path(swba_kernels.__file__).parent / "hopper"
Steps = Generator[Any, None, Any]  # yields None, or a function that tells whether the task may go on
ENDED = object()


class _CallsAreSteps(ast.NodeTransformer):
    """Outside of comprehensions, which only host code has."""

    visit_ListComp = visit_GeneratorExp = visit_SetComp = visit_DictComp = lambda self, node: node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        call = ast.Call(ast.Name("step", ast.Load()), [node.func, *node.args], node.keywords)
        return ast.copy_location(ast.YieldFrom(call), node)


def step(function: Callable[..., Any], *args: Any, **named: Any) -> Steps:
    """Call a function, and suspend the task where the function does."""
    result = function(*args, **named)
    return (yield from result) if isinstance(result, GeneratorType) else result


@cache
def compile_module(name: str, change: tuple[str, str] | None = None) -> CodeType:
    """Compile a module of the Hopper kernels without imports and decorators, one (old, new) piece of text changed."""
    path = FOLDER / f"{name}.py"
    text = path.read_text()
    if change:
        old, new = change
        assert text.count(old) == 1, f"{name}.py holds this {text.count(old)} times, not once: {old}"
        text = text.replace(old, new)
    tree = ast.parse(text)
    tree.body = [x for x in tree.body if not isinstance(x, (ast.Import, ast.ImportFrom))]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
            node.body = [_CallsAreSteps().visit(statement) for statement in node.body]
    return compile(ast.fix_missing_locations(tree), str(path), "exec")  # annotations are not evaluated, as in this file


def compile_modules(names: Sequence[str], changes: Mapping[str, tuple[str, str]]) -> list[CodeType]:
    """Compile what a kernel needs, with one (old, new) piece of text changed in some modules."""
    assert changes.keys() <= set(names)
    return [compile_module(name, changes.get(name)) for name in names]


def swapped(first: str, second: str, indent: int = 8) -> tuple[str, str]:
    """Return the change of a kernel's text that swaps two statements."""
    between = "\n" + " " * indent
    return first + between + second, second + between + first


class View:
    """A buffer in shared memory or a part of it."""

    dtype, permute = None, same

    def __init__(self, machine: Machine, cells: np.ndarray, shape: Any) -> None:
        self.machine, self.cells, self.shape = machine, cells, shape

    def index(self, i: Any) -> View:
        return View(self.machine, self.cells[i], self.shape[1:])

    def slice(self, start: int, length: int, dim: int) -> View:
        cells = self.cells.take(range(start // 64, (start + length) // 64), dim)
        return View(self.machine, cells, (*self.shape[:dim], length, *self.shape[dim + 1 :]))

    def reinterpret(self, dtype: Any, shape: Any, layout: Any) -> View:
        return View(self.machine, self.cells, shape)

    def content(self) -> Any:
        contents = [cell.content for cell in self.cells.flat]
        return Tile(frozenset().union(*contents)) if isinstance(contents[0], Tile) else contents[0]

    def load(self, layout: Any = None) -> Steps:
        yield
        self.machine.touch(self.cells.flat, self.machine.time())
        return self.content()

    def store(self, x: Any) -> Steps:
        yield
        access = self.machine.touch(self.cells.flat, self.machine.time(), writes=True, fenced=False)
        self.machine.now.unfenced.append(access)
        for cell in self.cells.flat:
            cell.content = x


class Operation:
    """What its issuer waits for: a matmul (stage 1: it is done) or a copy (1: it has read, 2: it has written)."""

    def __init__(self, *accesses: list[Access]) -> None:
        self.accesses, self.stage = accesses, 0  # those that end with each stage

    def _used(self, *_: Any) -> Any:
        raise Violation("the result of a matmul is used that may not be done")

    __add__ = __sub__ = __mul__ = __len__ = reshape = _used


class Task:
    """What the scheduler lets go on; its clock tells what it is ordered behind: times of others, phases of barriers."""

    def __init__(self, steps: Steps, weight: float, program: int = 0, warps: int = 0) -> None:
        self.steps, self.weight, self.program, self.warps = steps, weight, program, warps
        self.ready, self.line = None, ""
        self.clock, self.phases = {self: 1}, {}  # phases: of each barrier, the next one to wait for
        self.unfenced, self.matmuls, self.copies = [], [], []

    def acquire(self, clock: dict[Any, int]) -> None:
        for who, time in clock.items():
            self.clock[who] = max(self.clock.get(who, 0), time)

    def release(self, clock: dict[Any, int]) -> None:
        clock.update((who, max(clock.get(who, 0), time)) for who, time in self.clock.items())
        self.clock[self] += 1


class Machine:
    """A GPU that runs one launch of a kernel.

    `modules` are the kernel's, from `compile_modules`. With `in_turn`, programs must add to a tile of sums one after
    the other, and the first one write it. Afterwards `memory` holds a cell for each tile that was stored or added to,
    by (name of the tensor, *coordinates), and in it what came there, in order; `stored` what was stored without a copy,
    as (addresses, what). `names` are those that the kernel sees.
    """

    def __init__(self, modules: Iterable[CodeType], seed: int, in_turn: bool) -> None:
        self.random, self.in_turn = random.Random(seed), in_turn
        self.tasks, self.memory, self.word_clocks, self.named, self.stored = [], {}, {}, {}, []
        ignored = ("BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "SliceLayout")
        ignored += ("SwizzledSharedLayout", "MBarrierLayout", "static_assert", "barrier", "int32", "int64", "float32")
        ignored += ("uint32", "uint64")
        gl = SimpleNamespace(
            **dict.fromkeys(ignored, lambda *_, **__: None), constexpr=same, constexpr_function=same, exp2=same,
            where=lambda c, a, b: tile(a + hidden(c), a.shape) if isinstance(a, Tile) else Array(np.where(c, a, b)),
            arange=lambda start, stop, layout: Array(np.arange(start, stop)), sum=lambda x, _: Array(x.sum()),
            full_like=lambda x, _: Array(x * 0), zeros=lambda shape, *_: tile((), shape), convert_layout=same,
            static_range=range, load=lambda pointer: Array(self.words[int(pointer)]), store=self.store, log2=np.log2,
            full=lambda shape, x, *_: Array(np.full(shape, x)),
            minimum=np.minimum, maximum=np.maximum, shared_memory_descriptor=View, num_warps=lambda: self.now.warps,
            program_id=lambda _: Array(self.now.program), num_programs=lambda _: self.programs,
            atomic_add=self.atomic_add, allocate_shared_memory=self.allocate, warp_specialize=self.specialize,
            inline_asm_elementwise=self.assembly, init=self.init, wait=self.wait, arrive=self.arrive,
            expect=lambda x, size, pred=True: self.arrive(x, 1, size) if pred else None, async_load=self.copy_in,
            async_store=self.copy_out, store_wait=lambda newer: self.await_stage(self.now.copies, newer, 1),
        )  # fmt: skip
        self.names = {"step": step, "fence_async_shared": self.fence, "NamedTuple": NamedTuple, "Any": Any}
        self.names |= dict.fromkeys(("gl", "gluon", "mbarrier", "tma"), gl)
        self.names |= {"warpgroup_mma": self.matmul, "warpgroup_mma_wait": self.await_matmuls}
        for module in modules:
            exec(module, self.names)
        self.names["tma_add"] = lambda *x: self.copy_out(*x, adds=True)

    def run(self, kernel: str, programs: int, resident: int, words: list[int], **arguments: Any) -> None:
        """Run programs of a kernel in any order, `resident` at a time, on integers `words` in global memory."""
        self.programs, self.room, self.words = programs, resident, words

        def program() -> Steps:
            yield lambda: self.room > 0
            self.room -= 1
            yield from step(self.names[kernel], **arguments)
            self.room += 1

        for i in range(programs):
            self.start(program(), i, 4)
        while self.tasks:
            ready = [task for task in self.tasks if task.ready is None or task.ready()]
            if not ready:
                raise Violation("deadlock: " + ", ".join(task.line for task in self.tasks if task.line))
            self.now = self.random.choices(ready, [task.weight for task in ready])[0]
            self.now.ready = next(self.now.steps, ENDED)
            if self.now.ready is ENDED:
                self.tasks.remove(self.now)

    def start(self, steps: Steps, *of_partition: Any) -> Task:
        self.tasks.append(Task(steps, 2.0 ** self.random.uniform(-6, 0), *of_partition))
        return self.tasks[-1]

    def specialize(self, partitions: Any, warps: list[int], registers: list[int]) -> Steps:
        me, of_each = self.now, zip(partitions, [self.now.warps, *warps], strict=True)
        members = [self.start(step(f, *args), me.program, count) for (f, args), count in of_each]
        yield from self.until(lambda: all(member.ready is ENDED for member in members))
        reads = [access for x in members for operation in x.matmuls + x.copies for access in operation.accesses[0]]
        come = [x for at_barrier, _ in self.named.values() for x in at_barrier if x in members]
        if come or any(access.time is None for access in reads):
            raise Violation("a program ends before what it started")

    def line(self) -> str:
        frame: Any = sys._getframe()
        while frame.f_code.co_filename == __file__:  # until the line of the kernel that is running
            frame = frame.f_back
        return f"{frame.f_code.co_name}, line {frame.f_lineno}"

    def time(self) -> int:
        return self.now.clock[self.now]

    def until(self, ready: Callable[[], bool]) -> Steps:
        self.now.line = self.line()
        yield ready

    def touch(self, cells: Any, time: int | None, writes: bool = False, who: Any = None, fenced: bool = True) -> Access:
        """Check that an access is ordered behind others, and note it, until `time` of `who` (None: this partition)."""
        access = Access(self.line(), who or self.now, time, fenced)
        for cell in cells:
            for other in [cell.writer, *(cell.readers if writes else ())]:
                if other and (other.time is None or self.now.clock.get(other.who, 0) < other.time):
                    raise Violation(f"race: {access.line} is not ordered behind {other.line}")
            if time is None and not writes and cell.writer and not cell.writer.fenced:
                raise Violation(f"{access.line}: no fence behind {cell.writer.line}")
            cell.writer, cell.readers = (access, []) if writes else (cell.writer, [*cell.readers, access])
        return access

    def fence(self) -> None:
        while self.now.unfenced:
            self.now.unfenced.pop().fenced = True

    def allocate(self, dtype: Any, shape: Any, layout: Any, value: Any = None) -> View:
        sizes = [x // 64 if x >= 64 else x for x in shape[:-1]] + [-(-shape[-1] // 64)]
        cells = [Cell(Tile({"what memory held"}) if value is None else value) for _ in range(np.prod(sizes))]
        return View(self, np.array(cells, object).reshape(sizes), shape)

    def init(self, view: View, count: int) -> None:
        view.cells[0].content = Barrier(count)

    def arrive(self, barrier: View, count: int, size: int = 0) -> Steps:
        yield
        self.now.release(barrier.content().arrived)
        barrier.content().settle(count, size)

    def wait(self, view: View, parity: Any, pred: Any = True) -> Steps:
        """Wait for the next phase of a barrier, or by its parity for the last one once more.

        The first phase is 0, or by its parity -1, which ended before all others.
        """
        if not pred:
            return
        barrier, me = view.content(), self.now
        phase = me.phases.get(barrier, -int(parity))
        phase -= int(phase % 2 != parity)
        me.phases[barrier] = phase + 1
        yield from self.until(lambda: barrier.ended % 2 != parity)
        if barrier.ended != phase + 1:
            raise Violation(f"{self.line()}: takes phase {barrier.ended - 1} of a barrier for phase {phase}")
        me.acquire(barrier.released)
        me.clock[barrier] = barrier.ended

    def store(self, pointers: np.ndarray, x: Any, mask: Any = True) -> None:
        self.stored.append((pointers[np.broadcast_to(mask, pointers.shape)], x))

    def atomic_add(self, pointer: int, x: int) -> Array:
        self.words[pointer] += x
        return Array(self.words[pointer] - x)

    def assembly(self, text: str, constraints: str, arguments: Any, **_: Any) -> Steps:
        yield
        me, (pointer, tile) = self.now, map(int, arguments or (0, 0))
        if found := re.match(r"bar\.(?:sync|(arrive)) (\d+), (\d+);", text):
            index, threads = (me.program, int(found[2])), int(found[3])
            come, ended = self.named.setdefault(index, (set(), 0))  # partitions, phases
            if me in come:
                raise Violation(f"{self.line()}: comes to named barrier {found[2]} twice")
            come.add(me)
            if sum(x.warps * 32 for x in come) == threads:
                self.named[index] = (set(), ended + 1)
            if not found[1]:
                yield from self.until(lambda: self.named[index][1] > ended)
        elif found := re.match(r"cp\.async\.bulk\.wait_group (\d+);", text):
            yield from self.await_stage(me.copies, int(found[1]), 2)
        elif "ld.acquire.gpu.global" in text:
            yield from self.until(lambda: self.words[pointer] in (tile, ~tile))
            me.acquire(self.word_clocks.get(pointer, {}))
            return Array(self.words[pointer])
        elif "red.release.gpu.global.max" in text:
            self.words[pointer] = max(self.words[pointer], tile)
            me.release(self.word_clocks.setdefault(pointer, {}))
        elif not text.startswith("griddepcontrol"):
            raise NotImplementedError(text)

    def await_stage(self, operations: list[Operation], newer: int, stage: int) -> Steps:
        """Wait until all operations but some newer ones have reached a stage; return them."""
        older = operations[: max(len(operations) - newer, 0)]
        yield from self.until(lambda: all(x.stage >= stage for x in older))
        for access in (access for x in older for ended in x.accesses[:stage] for access in ended):
            access.time = access.time or self.time()
        return older

    def matmul(self, a: Any, b: View, acc: Tile, use_acc: bool = True, is_async: bool = False) -> Steps:
        yield
        operation = Operation([self.touch(x.cells.flat, None) for x in (a, b) if isinstance(x, View)])
        self.now.matmuls.append(operation)

        def multiply() -> Steps:
            yield
            pair = (a.content(), b.content())
            terms = acc | {(len(acc), pair)} if use_acc else {pair}  # a sum numbers its terms
            operation.result = tile(terms, acc.shape)
            operation.stage = 1

        self.start(multiply())
        return operation

    def await_matmuls(self, newer: int, deps: Any) -> Steps:
        older = yield from self.await_stage(self.now.matmuls, newer, 1)
        results = tuple(x.result if x in older else x for x in deps)
        del self.now.matmuls[: len(older)]
        return results if len(results) > 1 else results[0]

    def copy_in(self, desc: Any, at: Any, ready: View, view: View, pred: Any = True) -> Steps:
        yield
        if not pred:
            return
        barrier, (*outer, row, column) = ready.content(), map(int, at)
        self.touch(view.cells.flat, barrier.ended + 1, writes=True, who=barrier)

        def arrive() -> Steps:
            yield
            for (i, j), cell in np.ndenumerate(view.cells):
                cell.content = Tile({(desc.name, *outer, row + 64 * i, column + 64 * j)})
            barrier.settle(0, -int(np.prod(view.shape)) * desc.bytes)

        self.start(arrive())

    def copy_out(self, desc: Any, at: Any, view: View, adds: bool = False) -> Steps:
        yield
        cell = self.memory.setdefault((desc.name, *map(int, at)), Cell([]))
        written = self.touch([cell], None, writes=self.in_turn or not adds)
        operation = Operation([self.touch(view.cells.flat, None)], [written])
        self.now.copies.append(operation)

        def send() -> Steps:
            yield
            tile = view.content()
            operation.stage = 1
            yield
            if adds and self.in_turn and not cell.content:
                raise Violation("adds to what nobody has written")
            cell.content = [*cell.content, tile] if adds else [tile]
            operation.stage = 2

        self.start(send())
