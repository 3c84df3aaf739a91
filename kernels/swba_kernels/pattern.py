"""The block window: the one definition of who sees whom.

N tokens; block_size, window, sink and first_block are numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import sym_node

# What marks an int as dynamic for torch.compile; torch 2.9 has no such thing yet and stays with int.
_DynamicInt: type[int] = getattr(sym_node, "DynamicInt", int)


def _check_int(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")


class _Dynamic:
    """A place for the sizes as torch.compile shall see them, beside the fields of the dataclass."""

    __slots__ = ("_dynamic",)
    _dynamic: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class BlockWindow(_Dynamic):
    """Describe block-causal attention with a sliding window and sinks, all in tokens.

    The sequence is cut into blocks of `block_size` tokens; with `first_block > 0` block 0 has `first_block` tokens.
    With `end(q)` the end of the block that holds token q, clipped to the length of the sequence,

        visible(q, k)  <=>  k < end(q)  and  (k >= end(q) - window  or  k < sink).

    Args:
        block_size: tokens of a block, at least 1.
        window: tokens a block sees up to its own end, at least `block_size`; need not be a multiple of it.
        sink: tokens at the start of the sequence that every block sees.
        first_block: tokens of block 0, at most `block_size`; 0 means a regular first block.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is out of its range.
    """

    block_size: int
    window: int
    sink: int = 0
    first_block: int = 0

    def __post_init__(self) -> None:
        _check_int("block_size", self.block_size, 1)
        _check_int("window", self.window, 1)
        _check_int("sink", self.sink, 0)
        _check_int("first_block", self.first_block, 0)
        if self.window < self.block_size:
            raise ValueError(f"window: expected at least block_size ({self.block_size}), got {self.window}")
        if self.first_block > self.block_size:
            raise ValueError(f"first_block: expected at most block_size ({self.block_size}), got {self.first_block}")
        sizes = (self.block_size, self.window, self.sink, self.grid_start)
        if not torch.compiler.is_compiling():
            sizes = tuple(_DynamicInt(size) for size in sizes)
        object.__setattr__(self, "_dynamic", sizes)

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockWindow, (self.block_size, self.window, self.sink, self.first_block)

    @classmethod
    def from_blocks(cls, bs: int, ws: int, sink_blocks: int = 0) -> BlockWindow:
        """Make the classic pattern: block i sees blocks i - ws + 1 .. i and the first `sink_blocks` blocks."""
        _check_int("bs", bs, 1)
        _check_int("ws", ws, 1)
        _check_int("sink_blocks", sink_blocks, 0)
        return cls(bs, bs * ws, sink=bs * sink_blocks)

    @classmethod
    def from_frames(
        cls,
        tokens_per_frame: int,
        frames_per_block: int,
        window_frames: int,
        sink_frames: int = 0,
        first_block_frames: int = 0,
    ) -> BlockWindow:
        """Make the pattern of a video stream whose sizes are given in frames of `tokens_per_frame` tokens."""
        _check_int("tokens_per_frame", tokens_per_frame, 1)
        _check_int("frames_per_block", frames_per_block, 1)
        _check_int("window_frames", window_frames, 1)
        _check_int("sink_frames", sink_frames, 0)
        _check_int("first_block_frames", first_block_frames, 0)
        if window_frames < frames_per_block:
            raise ValueError(
                f"window_frames: expected at least frames_per_block ({frames_per_block}), got {window_frames}"
            )
        if first_block_frames > frames_per_block:
            raise ValueError(
                f"first_block_frames: expected at most frames_per_block ({frames_per_block}), got {first_block_frames}"
            )
        return cls(
            tokens_per_frame * frames_per_block,
            tokens_per_frame * window_frames,
            sink=tokens_per_frame * sink_frames,
            first_block=tokens_per_frame * first_block_frames,
        )

    @property
    def grid_start(self) -> int:
        """Where the block grid starts, at most 0: block i covers [grid_start + i*block_size, ...) clipped to [0, N)."""
        return self.first_block - self.block_size if self.first_block else 0

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Return block_size, window, sink and grid_start, as the ops take them.

        In code under torch.compile, which would take an int of an object for a constant until it has seen it change,
        they are dynamic from the first trace on (torch 2.10 and up): another pattern is no reason to compile again.
        """
        if torch.compiler.is_compiling():
            return self._dynamic
        return self.block_size, self.window, self.sink, self.grid_start

    def blocks(self, n: int) -> Iterator[tuple[int, int]]:
        """Iterate over the (start, end) of each block of a sequence of `n` tokens."""
        start = 0
        for end in self.block_ends(n):
            yield start, end
            start = end

    def block_ends(self, n: int) -> list[int]:
        """Return the end of each block of a sequence of `n` tokens, the last clipped to `n`."""
        return [min(end, n) for end in range(self.grid_start + self.block_size, n + self.block_size, self.block_size)]

    def ends(self, n: int, device: torch.device | str | None = None) -> Tensor:
        """Return the end of each token's block in a sequence of `n` tokens, int64 [n]."""
        token = torch.arange(n, device=device)
        start = token - torch.remainder(token - self.grid_start, self.block_size)
        return (start + self.block_size).clamp(max=n)

    def key_ranges(self, start: int, end: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the disjoint key ranges (sink_lo, sink_hi), (lo, hi) that the block [start, end) sees.

        Only `end` decides; `start` is taken so that `key_ranges(*block)` reads well.
        """
        lo = max(0, end - self.window)
        return (0, min(self.sink, lo)), (lo, end)

    def visible(self, q: int, k: int, n: int) -> bool:
        """Tell whether token `q` sees token `k` in a sequence of `n` tokens."""
        end = min(n, q - (q - self.grid_start) % self.block_size + self.block_size)
        return 0 <= k < end and (k >= end - self.window or k < self.sink)

    def mask(self, n: int, device: torch.device | str | None = None) -> Tensor:
        """Return the boolean mask [n, n], rows are queries; true where the query sees the key."""
        token, end = torch.arange(n, device=device), self.ends(n, device)[:, None]
        return (token < end) & ((token >= end - self.window) | (token < self.sink))

    def pairs(self, n: int) -> int:
        """Return the exact number of visible (query, key) pairs in a sequence of `n` tokens (one head)."""
        total = 0
        for start, end in self.blocks(n):
            (_, sink_hi), (lo, hi) = self.key_ranges(start, end)
            total += (end - start) * (sink_hi + hi - lo)
        return total
