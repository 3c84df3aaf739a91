"""What compute-sanitizer's racecheck reports of the Hopper kernels (`--racecheck-report analysis`), by function."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "kernels" / "swba_kernels" / "hopper"
HAZARD = re.compile(
    r"(?:Race reported between|and) (?:Read|Write) access"
    r" at (?P<kernel>\w+)\+0x[0-9a-f]+ in (?P<file>\w+\.py):(?P<line>\d+)"
)
SUMMARY = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)")
SPECIALIZING = "warp_specialize"  # what Triton's own code for it does has the line of the kernel's `def`, or its own


@cache
def _functions(file: str) -> dict[str, tuple[range, frozenset[int]]]:
    """Return the lines of each function, and those of them that are Triton's: none where it does not specialise."""
    found = {}
    for node in ast.walk(ast.parse((KERNELS / file).read_text())):
        if isinstance(node, ast.FunctionDef):
            last = node.body[-1]
            of_triton = {node.lineno, *range(last.lineno, (last.end_lineno or 0) + 1)}
            lines = range(min([node.lineno, *(x.lineno for x in node.decorator_list)]), (node.end_lineno or 0) + 1)
            found[node.name] = (lines, frozenset(of_triton if SPECIALIZING in ast.unparse(last) else ()))
    return found


def place(kernel: str, file: str, line: int) -> str:
    """Return the name of the function that holds a line, or "triton" if the line stands for Triton's own code."""
    name, (_, of_triton) = next((name, x) for name, x in _functions(file).items() if line in x[0])
    return "triton" if name == kernel and line in of_triton else name


def count(report: str) -> int:
    """Return how many hazards a complete report has; raise ValueError if it is not complete."""
    found = SUMMARY.findall(report)
    if len(found) != 1:
        raise ValueError(f"expected one summary, got {len(found)}")
    displayed, errors, warnings = map(int, found[0])
    shown = report.count("Race reported between")
    if not displayed == errors + warnings == shown or report.count("Error:") + report.count("Warning:") != shown:
        raise ValueError(f"not all is shown, or more than hazards: {found[0]}, {shown} of them in the report")
    return displayed


def races(report: str) -> set[frozenset[str]]:
    """Return the pairs of places between which a report has hazards; raise ValueError if any is not understood."""
    pairs, first, accesses = set(), "", 0
    for line in report.splitlines():
        if found := HAZARD.search(line):
            accesses += 1
            name = place(found["kernel"], found["file"], int(found["line"]))
            if "between" in line:
                first = name
            else:
                pairs.add(frozenset({first, name}))
    if accesses != report.count(" access at ") or bool(pairs) != bool(count(report)):
        raise ValueError(f"{report.count(' access at ')} accesses, of which {accesses} are understood")
    return pairs
