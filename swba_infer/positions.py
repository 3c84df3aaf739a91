"""Where the lanes of a cache stand: on the device for the kernels, mirrored on the host for checks and messages.

L lanes of the cache, B lanes of a call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INDICES_KEPT = 256


class LanePositions:
    """Committed tokens of each lane, and how far steps that were not committed have written beyond them.

    Args:
        lanes: independent streams.
        device: where `tensor` lives.

    Attributes:
        tensor: int64 [L] on the device; kernels read it, nobody reads it back.
        committed: the same on the host.
        written_end: how far each lane has been written by steps that were not committed; 0 if not at all.
    """

    def __init__(self, lanes: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.tensor = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.committed = [0] * lanes
        self.written_end = [0] * lanes
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def rows(self, lanes: Sequence[int] | None) -> Sequence[int]:
        """Return the lanes, where None stands for all."""
        return range(len(self.committed)) if lanes is None else lanes

    def index(self, lanes: tuple[int, ...]) -> Tensor:
        """Return the lanes as an int64 tensor on the device; the copy does not wait for the device."""
        index = self._indices.get(lanes)
        if index is None:
            if len(self._indices) >= _INDICES_KEPT:
                self._indices.clear()
            with torch.inference_mode(False):
                index = torch.tensor(lanes, dtype=torch.int64).to(self.tensor.device, non_blocking=True)
            self._indices[lanes] = index
        return index

    def reset(self, lanes: tuple[int, ...] | None) -> None:
        """Put the lanes (None: all) at position 0."""
        if lanes is None:
            self.tensor.zero_()
        else:
            self.tensor.index_fill_(0, self.index(lanes), 0)
        for lane in self.rows(lanes):
            self.committed[lane] = self.written_end[lane] = 0

    def copy(self, source: int, target: int) -> None:
        """Put one lane where another stands."""
        self.tensor[target : target + 1].copy_(self.tensor[source : source + 1])
        self.committed[target] = self.committed[source]
        self.written_end[target] = self.written_end[source]

    def restore(self, committed: Sequence[int], written_end: Sequence[int]) -> None:
        """Put every lane where it is said to stand."""
        self.committed, self.written_end = list(committed), list(written_end)
        self.follow_host()

    def follow_host(self) -> None:
        """Set the positions on the device from the host's."""
        self.tensor.copy_(torch.tensor(self.committed, dtype=torch.int64))

    def note_written(self, lanes: Sequence[int] | None, tokens: int) -> None:
        """Note that `tokens` beyond the lanes' positions are about to be written."""
        for lane in self.rows(lanes):
            self.written_end[lane] = max(self.written_end[lane], self.committed[lane] + tokens)

    def advance_device(self, index: Tensor | None, end: Tensor) -> None:
        """Move the lanes of `index` (None: all) to `end` [B] on the device."""
        if index is None:
            self.tensor.copy_(end)
        else:
            self.tensor.index_copy_(0, index, end)

    def advance_host(self, lanes: Sequence[int] | None, tokens: int, start: int | None) -> None:
        """Follow on the host: the lanes have `tokens` more, or stand that far behind `start`."""
        committed, written_end = list(self.committed), list(self.written_end)
        for lane in self.rows(lanes):
            committed[lane] = tokens + (committed[lane] if start is None else start)
            written_end[lane] = 0
        self.committed, self.written_end = committed, written_end
