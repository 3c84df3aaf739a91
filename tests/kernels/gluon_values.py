"""What an emulated kernel computes with: integers, tiles of which only is known what they were made of, and barriers.

Part of `gluon_emulator.py`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


class Violation(AssertionError):
    """The protocol is broken."""


def same(x: Any, *_: Any, **__: Any) -> Any:
    return x


class Array(np.ndarray):
    """Integers as a kernel computes with them: one alone is an array, too, and none changes in place."""

    to, type = same, SimpleNamespace(layout=None)
    __iadd__, __isub__ = np.ndarray.__add__, np.ndarray.__sub__

    def __new__(cls, x: Any) -> Array:
        return np.asarray(x).view(cls)

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Array:
        return array.view(Array)


class Tile(frozenset[Any]):
    """A tile of numbers, of which only is known what they were made of, and at times the shape."""

    type, shape = SimpleNamespace(layout=None), None
    __getitem__ = to = reshape = permute = content = same
    __add__ = __sub__ = __mul__ = lambda self, other: Tile(self | other) if isinstance(other, Tile) else self


def tile(facts: Any, shape: Any) -> Tile:
    """Return a tile of a shape."""
    made = Tile(facts)
    made.shape = shape
    return made


def hidden(visible: np.ndarray) -> Tile:
    """Return what is known of a tile in which only some numbers are `visible`."""
    return Tile() if visible.all() else Tile({np.asarray(visible, bool).tobytes()})


class Barrier:
    """An mbarrier. A phase ends when `count` arrivals and all expected bytes have come."""

    def __init__(self, count: int) -> None:
        self.count, self.missing, self.bytes, self.ended = count, count, 0, 0
        self.arrived, self.released = {}, {}  # clocks

    def settle(self, arrivals: int, size: int) -> None:
        self.missing -= arrivals
        self.bytes += size
        if self.bytes < 0:
            raise Violation("a barrier got more bytes than expected")
        if self.missing == self.bytes == 0:
            self.ended, self.missing, self.released, self.arrived = self.ended + 1, self.count, self.arrived, {}


class Access:
    """One use of a cell. It ends at `time` by the clock of `who`; without a time it may still go on."""

    def __init__(self, line: str, who: Any, time: int | None, fenced: bool) -> None:
        self.line, self.who, self.time, self.fenced = line, who, time, fenced


class Cell:
    """64 x 64 numbers in memory, or fewer, or a barrier."""

    def __init__(self, content: Any) -> None:
        self.content, self.writer, self.readers = content, None, []
