"""A progress line on stderr: rich on a terminal where it is installed, else a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(
    items: Iterable[T], total: int, label: str, unit: str = "frames", note: Callable[[], str] = str
) -> Iterator[T]:
    """Yield the items and show how many have passed, how many pass per second, and what `note` says."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield from _plain(items, total, label, unit, note)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _plain(items, total, label, unit, note)
        return
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} " + unit + "/s"),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total, rate="-", note="")
        started = time.perf_counter()
        for done, item in enumerate(items, start=1):
            yield item
            progress.update(task, completed=done, rate=f"{done / (time.perf_counter() - started):.1f}", note=note())


def _plain(
    items: Iterable[T], total: int, label: str, unit: str, note: Callable[[], str], every: float = 5.0
) -> Iterator[T]:
    started = shown = time.perf_counter()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        if now - shown >= every or done == total:
            line = f"{label} {done}/{total}  {done / (now - started):.1f} {unit}/s  {note()}"
            print(line.rstrip(), file=sys.stderr, flush=True)
            shown = now
