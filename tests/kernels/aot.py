"""Ahead-of-time compiles of Triton kernels, without a GPU: what a kernel needs of registers, spills and shared memory.

A kernel is described by a `Case`: its jit function, the type of each runtime argument and its constants. Kernels of
other modules join by adding cases to the table in test_aot.py.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    """What the compiler made: registers per thread, spilled bytes per thread, shared bytes, and the PTX."""

    registers: int
    spills: int
    shared: int
    ptx: str


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
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = resources(compiled.asm["cubin"])
    return Report(registers, spills, compiled.metadata.shared, compiled.asm["ptx"])


def resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers, stack bytes) per thread of the only kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
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
