"""compute-sanitizer finds nothing in small calls of the Hopper kernels that has no explanation."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from sanitized import CALLS

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0"),
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed"),
]

KERNELS = Path(__file__).parents[2] / "kernels" / "swba_kernels" / "hopper"
ACCESS = re.compile(r"(between|and) \w+ access at (\w+)\+0x[0-9a-f]+ in (\w+\.py):(\d+)")

# Which functions race, as racecheck sees it; "kernel" is one's own body.
EXPLAINED = {
    # What Triton's code for warp_specialize tells the other warps, before a hardware barrier of all threads. (Why
    # racecheck names it is not known: it follows such barriers in `racecheck.cu`.)
    frozenset({"kernel"}),
    # A note is read behind a barrier at which one thread arrives for its partition, and written again behind another
    # such: racecheck follows a thread's own arrivals only, as `racecheck.cu` shows.
    frozenset({"tell", "told"}),
    # As above: where the assembler reads two words of a note at once, it gives the line of the kernel.
    frozenset({"tell", "kernel"}),
    # Every consumer that reads a ragged tile clears the same rows of it first; they write the same.
    frozenset({"clear_rows"}),
    frozenset({"clear_past"}),
}


def sanitize(tool: str, *command: str) -> str:
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--print-limit", "100000", *command],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def watch(tool: str, call: str, head_dim: int) -> str:
    report = sanitize(tool, sys.executable, str(Path(__file__).with_name("sanitized.py")), call, str(head_dim))
    assert f"ran {call} {head_dim}" in report, report[-4000:]
    return report


@cache
def functions(file: str) -> list[tuple[int, int, str]]:
    """Return (first line, last line, name) of each function of a kernel's file, decorators included."""
    nodes = [x for x in ast.walk(ast.parse((KERNELS / file).read_text())) if isinstance(x, ast.FunctionDef)]
    return [(min([x.lineno, *(d.lineno for d in x.decorator_list)]), x.end_lineno or 0, x.name) for x in nodes]


def races(report: str) -> set[frozenset[str]]:
    """Return the pairs of functions between which a report of racecheck names hazards."""
    pairs, first = set(), ""
    for line in report.splitlines():
        if found := ACCESS.search(line):
            place, kernel, file, number = found.groups()
            name = next(name for low, high, name in functions(file) if low <= int(number) <= high)
            name = "kernel" if name == kernel else name
            if place == "and":
                pairs.add(frozenset({first, name}))
            else:
                first = name
    return pairs


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("call", CALLS)
def test_no_access_outside_of_an_allocation(call, head_dim) -> None:
    report = watch("memcheck", call, head_dim)
    assert "ERROR SUMMARY: 0 errors" in report, report[-4000:]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("call", CALLS)
def test_no_race_without_an_explanation(call, head_dim) -> None:
    report = watch("racecheck", call, head_dim)
    assert report.count("access at") == len(ACCESS.findall(report)) > 0, report[-4000:]
    assert races(report) <= EXPLAINED, races(report) - EXPLAINED


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize(("exchange", "hazards"), [("0", False), ("1", True), ("2", False)])
def test_racecheck_follows_only_threads_that_arrive_themselves(exchange, hazards, tmp_path) -> None:
    """Else the explanation of hazards between notes does not hold."""
    program = str(tmp_path / "racecheck")
    subprocess.run(["nvcc", "-arch=sm_90", "-o", program, str(Path(__file__).with_name("racecheck.cu"))], check=True)
    report = sanitize("racecheck", program, exchange)
    assert "no error, sum 28" in report, report
    assert ("RACECHECK SUMMARY: 0 hazards" not in report) == hazards, report
