"""A report of racecheck is read whole or refused."""

from __future__ import annotations

import ast

import pytest
from race_report import KERNELS, count, races


def lines(file: str, kernel: str) -> tuple[int, int]:
    """Return the line of a kernel's `def`, and that of its last statement."""
    tree = ast.parse((KERNELS / file).read_text())
    node = next(x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == kernel)
    return node.lineno, node.body[-1].lineno


def hazard(kernel: str, *places: tuple[str, int]) -> str:
    (file, line), *others = places
    text = f"========= Error: Race reported between Write access at {kernel}+0x1a0 in {file}:{line}\n"
    for file, line in others:
        text += f"=========     and Read access at {kernel}+0x2f0 in {file}:{line} [12 hazards]\n"
    return text + "=========\n"


def report(*hazards: str) -> str:
    n = len(hazards)
    summary = f"========= RACECHECK SUMMARY: {n} hazards displayed ({n} errors, 0 warnings)\n"
    return "".join(["========= COMPUTE-SANITIZER\n", *hazards, "ran\n", summary])


FORWARD, SPECIALIZE = lines("forward.py", "_forward")
TELL, _ = lines("notes.py", "tell")
TOLD, _ = lines("notes.py", "told")
ONE = hazard("_forward", ("forward.py", FORWARD), ("forward.py", SPECIALIZE))


def test_places_of_accesses() -> None:
    text = report(ONE, hazard("_forward", ("notes.py", TELL + 3), ("notes.py", TOLD + 3), ("forward.py", FORWARD)))
    assert races(text) == {frozenset({"triton"}), frozenset({"tell", "told"}), frozenset({"tell", "triton"})}
    assert count(text) == 2
    assert races(report()) == set()


def test_a_kernels_own_lines_are_not_tritons() -> None:
    inside = hazard("_forward", ("forward.py", FORWARD + 25), ("forward.py", FORWARD))
    assert races(report(inside)) == {frozenset({"_forward", "triton"})}


@pytest.mark.parametrize(
    ("file", "kernel"), [("decode_small.py", "decode_small"), ("forward_small.py", "forward_small")]
)
def test_kernels_that_do_not_specialise_have_no_lines_of_tritons(file, kernel) -> None:
    first, last = lines(file, kernel)
    assert races(report(hazard(kernel, (file, first), (file, last)))) == {frozenset({kernel})}


WHOLE = report(ONE, ONE)


@pytest.mark.parametrize(
    "text",
    [
        WHOLE.replace("RACECHECK SUMMARY", "Maximum number of hazards reached"),
        WHOLE.replace("2 hazards displayed (2 errors", "2 hazards displayed (28 errors"),
        WHOLE.replace("2 hazards displayed (2 errors", "3 hazards displayed (3 errors"),
        WHOLE + WHOLE,
        WHOLE.replace("ran", "========= Error: Potential RAW hazard detected at __shared__ 0x10 in block (0,0,0)"),
        WHOLE.replace("ran", "========= Error: Barrier error detected. Invalid arguments"),
        WHOLE.replace(" in forward.py", " in "),
        WHOLE.replace(f" in forward.py:{FORWARD}", ""),
    ],
)
def test_a_report_that_is_not_understood_is_refused(text) -> None:
    assert text != WHOLE
    with pytest.raises(ValueError, match=r"summary|shown|understood"):
        races(text)
