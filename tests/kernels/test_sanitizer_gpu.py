"""compute-sanitizer finds nothing in small calls of the Hopper kernels that has no explanation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from race_report import count, races
from sanitized import CALLS

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0"),
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed"),
]

RACECHECK = ("racecheck", "--racecheck-report", "analysis")

# Between which functions racecheck sees hazards; "triton" is Triton's own code for warp_specialize.
EXPLAINED = {
    # What it tells the other warps, before a hardware barrier of all threads. racecheck names it where a kernel has an
    # mbarrier, too, and not otherwise, as `specialized.py` shows.
    frozenset({"triton"}),
    # A note is read behind a barrier at which one thread arrives for its partition, and written again behind another
    # such: racecheck follows a thread's own arrivals only, as `racecheck.cu` shows.
    frozenset({"tell", "told"}),
    # As above: where the assembler reads two words of a note at once, it gives the line of the kernel.
    frozenset({"tell", "triton"}),
    # Every consumer that reads a ragged tile clears the same rows of it first; they write the same.
    frozenset({"clear_rows"}),
    frozenset({"clear_past"}),
}


def sanitize(tool: tuple[str, ...], *command: str) -> str:
    done = subprocess.run(
        ["compute-sanitizer", "--print-limit", "100000", "--tool", *tool, *command],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-4000:]
    return report


def watch(tool: tuple[str, ...], call: str, head_dim: int) -> str:
    report = sanitize(tool, sys.executable, str(Path(__file__).with_name("sanitized.py")), call, str(head_dim))
    assert f"ran {call} {head_dim}" in report, report[-4000:]
    return report


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("call", CALLS)
def test_no_access_outside_of_an_allocation(call, head_dim) -> None:
    report = watch(("memcheck",), call, head_dim)
    assert "ERROR SUMMARY: 0 errors" in report, report[-4000:]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("call", CALLS)
def test_no_race_without_an_explanation(call, head_dim) -> None:
    found = races(watch(RACECHECK, call, head_dim))
    assert found <= EXPLAINED, found - EXPLAINED


@pytest.mark.parametrize(("kernel", "hazards"), [("alone", False), ("by_a_barrier", True)])
def test_racecheck_names_tritons_own_code_where_there_is_an_mbarrier(kernel, hazards) -> None:
    """Else the explanation of hazards in that code does not hold."""
    report = sanitize(RACECHECK, sys.executable, str(Path(__file__).with_name("specialized.py")), kernel)
    assert f"ran {kernel}" in report, report
    assert (count(report) > 0) == hazards, report


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize(("exchange", "hazards"), [("0", False), ("1", True), ("2", False)])
def test_racecheck_follows_only_threads_that_arrive_themselves(exchange, hazards, tmp_path) -> None:
    """Else the explanation of hazards between notes does not hold."""
    program = str(tmp_path / "racecheck")
    subprocess.run(["nvcc", "-arch=sm_90", "-o", program, str(Path(__file__).with_name("racecheck.cu"))], check=True)
    report = sanitize(RACECHECK, program, exchange)
    assert "no error, sum 28" in report, report
    assert (count(report) > 0) == hazards, report
