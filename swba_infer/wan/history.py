"""The clean latents that a stream keeps of its past, to be encoded again under another prompt or in another ring.

C latent channels, F latent frames, h, w latent rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class LatentHistory:
    """The first and the last frames of one stream; never written again, so a copy of the value is a copy of the state.

    Args:
        first, last: clean latents [1, C, F, h, w]; they overlap while the stream is short.
        frames: latent frames of the stream.
        keep_first, keep_last: how many frames are kept of either end.
    """

    first: Tensor
    last: Tensor
    frames: int
    keep_first: int
    keep_last: int

    @classmethod
    def empty(cls, frame: Tensor, keep_first: int, keep_last: int) -> LatentHistory:
        """Return the history of a stream that has not begun; `frame` [1, C, 1, h, w] gives the sizes."""
        none = frame[:, :, :0]
        return cls(none, none, 0, keep_first, keep_last)

    def extend(self, latents: Tensor) -> LatentHistory:
        """Return the history with the next latents [1, C, F, h, w]."""
        whole = self.first.shape[2] == self.frames
        missing = max(0, self.keep_first - self.frames) if whole else 0
        first = torch.cat((self.first, latents[:, :, :missing]), dim=2) if missing else self.first
        last = torch.cat((self.last, latents), dim=2)[:, :, -self.keep_last :].clone()
        return LatentHistory(first, last, self.frames + latents.shape[2], self.keep_first, self.keep_last)

    def between(self, start: int, end: int) -> Tensor:
        """Return the frames from `start` to before `end`; raise ConfigError if they were not kept."""
        oldest = self.frames - self.last.shape[2]
        if not 0 <= start <= end <= self.frames or (start < oldest and end > self.first.shape[2]):
            raise ConfigError(
                f"latents: expected frames of the first {self.first.shape[2]} or the last {self.last.shape[2]} of "
                f"{self.frames}, which are kept; got {start} to {end}"
            )
        if end <= self.first.shape[2]:
            return self.first[:, :, start:end]
        return self.last[:, :, start - oldest : end - oldest]
