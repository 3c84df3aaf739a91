"""Ahead-of-time compiles of Triton kernels, without a GPU: what a kernel needs of registers, spills and shared memory.

Two ways. A `Case` describes one kernel: its jit function, the type of each runtime argument and its constants; kernels
join by adding cases to the table in test_aot.py. `compile_launches` calls the host code on tensors without memory and
compiles what it would launch, with the very signature, descriptors and constants of the launch.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


class Case(NamedTuple):
    """One kernel to compile. `types` maps argument names to Triton types ("*bf16", "i32", "i64", "fp32");
    `divisible` names the integers that are multiples of 16."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    aligned: bool = True
    divisible: frozenset[str] = frozenset()


class Report(NamedTuple):
    """What the compiler made: registers per thread, spilled bytes per thread, shared bytes, PTX and machine code."""

    registers: int
    spills: int
    shared: int
    ptx: str
    cubin: bytes


def compile_case(case: Case, arch: int) -> Report:
    """Compile `case` for sm_<arch>; pointers are 16-byte aligned as torch's allocator makes them if `case.aligned`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    missing = [x for x in names if x not in case.types and x not in case.constants]
    assert not missing, f"{case.name}: no type for {missing}"
    signature = {x: case.types.get(x, "constexpr") for x in names}
    attributes = {}
    if case.aligned:
        attributes = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(names) if signature[x].startswith("*")}
    attributes |= {(i,): [["tt.divisibility", 16]] for i, x in enumerate(names) if x in case.divisible}
    source = ASTSource(
        case.kernel, signature, {(names.index(x),): value for x, value in case.constants.items()}, attributes
    )
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return _report(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options))


def _report(compiled: Any) -> Report:
    registers, spills = resources(compiled.asm["cubin"])
    return Report(registers, spills, compiled.metadata.shared, compiled.asm["ptx"], compiled.asm["cubin"])


class _NoGpu:
    """A driver that knows its target and nothing else: enough to compile, too little to launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _intercepted(run: Callable[..., None], arch: int, multiprocessors: int) -> Iterator[None]:
    """Let `run` take each launch; the host code believes to be on a GPU of that many multiprocessors."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    with (
        mock.patch.object(driver, "_active", _NoGpu(arch)),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=False),
    ):
        yield


def compile_launches(
    call: Callable[[], object], arch: int = 90, multiprocessors: int = 132
) -> list[tuple[str, Report]]:
    """Run `call`, whose tensors live on the meta device; return (kernel, report) of each launch it would make.

    Addresses of meta tensors are 0, thus aligned as those of torch's allocator.
    """
    from triton.runtime.jit import JITFunction

    launches = []
    compile_now = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self.fn.__name__, compile_now(self, *args, grid=grid, warmup=True, **kwargs)))

    with _intercepted(run, arch, multiprocessors):
        call()
    return [(name, _report(compiled)) for name, compiled in launches]


def record_launches(
    call: Callable[[], object], arch: int = 90, multiprocessors: int = 132
) -> list[tuple[str, dict[str, Any]]]:
    """Run `call` likewise; return (kernel, arguments, options and grid by name) of each launch, without a compiler."""
    launches = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False))
        launches.append((self.fn.__name__, {**given, **kwargs, "grid": grid}))

    with _intercepted(run, arch, multiprocessors):
        call()
    return launches


@cache
def assembler_warnings(ptx: str) -> list[str]:
    """Assemble for sm_90 once more and return the warnings, serialised wgmma (C75..) among them."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    return [line for line in lines if re.search(r"\bC7\d\d\d\b", line)]


def _ask(tool: str, option: str, cubin: bytes) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def instructions(cubin: bytes) -> list[str]:
    """Return the machine code of a cubin, an instruction each, in the order of addresses."""
    return re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", _ask("nvdisasm", "-c", cubin), re.MULTILINE)


@cache
def resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers, stack bytes) per thread of the only kernel in a cubin."""
    text = _ask("cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def matches(names: list[str], pattern: str, kind: str) -> dict[str, str]:
    """Give every argument whose name matches `pattern` the type `kind`."""
    return {x: kind for x in names if re.fullmatch(pattern, x)}


def check_limits(case: Case, arch: int, spills: int) -> None:
    """Assert that `case` fits the shared memory of sm_<arch> and spills at most `spills` bytes a thread."""
    report = compile_case(case, arch)
    assert report.shared <= SHARED_LIMIT[arch], report.shared
    assert report.spills <= spills, report.spills


def check_hopper_instructions(case: Case) -> None:
    """Assert that `case` runs on sm_90's own matmul instruction and copies asynchronously."""
    ptx = compile_case(case, 90).ptx
    assert "wgmma.mma_async" in ptx
    assert "cp.async.cg.shared.global" in ptx
