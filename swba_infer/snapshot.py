"""A ring cache's content at one moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .config import StreamConfig
from .errors import StreamStateError

if TYPE_CHECKING:
    from .cache import RingKVCache


class RingSnapshot(NamedTuple):
    """The used slots [layers, lanes, Hkv, used, D], positions and written ends, in memory of their own."""

    stream: StreamConfig
    k: Tensor
    v: Tensor
    position: tuple[int, ...]
    written_end: tuple[int, ...]

    def check(self, cache: RingKVCache) -> None:
        """Raise StreamStateError unless the cache can be restored from this."""
        if self.stream != cache.stream:
            raise StreamStateError(f"snapshot: expected one of {cache.stream}, got {self.stream}")
        if len(self.position) != cache.lanes or len(self.written_end) != cache.lanes:
            raise StreamStateError(f"snapshot: expected {cache.lanes} lanes, got {len(self.position)}")
        if min(self.position) < 0 or min(self.written_end) < 0:
            raise StreamStateError(f"snapshot: expected positions of at least 0, got {self.position}")
        used = min(max(self.position), cache.capacity)
        expected = [cache.layers, cache.lanes, cache.kv_heads, used, cache.head_dim]
        for name, ring in (("k", self.k), ("v", self.v)):
            if list(ring.shape) != expected or ring.dtype != cache.dtype:
                raise StreamStateError(
                    f"snapshot.{name}: expected {expected} of {cache.dtype}, got {list(ring.shape)} of {ring.dtype}"
                )


def copy_layers(ring: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Copy a ring [layers, ...] to `device` (default: where it is), one layer at a time to save memory."""
    with torch.inference_mode(False):
        copy = torch.empty(ring.shape, dtype=ring.dtype, device=ring.device if device is None else device)
        for target, source in zip(copy, ring, strict=True):
            target.copy_(source)
    return copy
