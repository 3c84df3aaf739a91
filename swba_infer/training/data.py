"""Recorded episodes on one device, and random windows of them.

T frames in all, B sequences, F frames of a sequence, N tokens, C channels of a token.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..models.video_dit import patchify


class Episodes:
    """All episodes of the shards `name-*.safetensors` in a folder, kept as uint8.

    Attributes:
        frames: uint8 [T, height, width, 3].
        actions: int64 [T].
        bounds: (start, end) of each episode.
        seeds: of each episode.
    """

    def __init__(self, folder: Path | str, name: str = "train", device: torch.device | str = "cpu") -> None:
        from safetensors import SafetensorError, safe_open

        paths = sorted(Path(folder).glob(f"{name}-*.safetensors"))
        if not paths:
            raise CheckpointError(f"data: expected files {name}-*.safetensors in {folder}, got none")
        lengths = []
        for path in paths:
            try:
                with safe_open(str(path), "pt") as file:
                    lengths.append(file.get_slice("frames").get_shape())
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: expected a shard of recorded episodes, got {error}") from error
        if len({tuple(shape[1:]) for shape in lengths}) > 1:
            raise CheckpointError(f"data: expected frames of one size, got {[shape[1:] for shape in lengths]}")
        total = sum(shape[0] for shape in lengths)
        self.frames = torch.empty((total, *lengths[0][1:]), dtype=torch.uint8, device=device)
        self.actions = torch.empty(total, dtype=torch.int64, device=device)
        self.bounds: list[tuple[int, int]] = []
        self.seeds: list[int] = []
        offset = 0
        for path, shape in zip(paths, lengths, strict=True):
            with safe_open(str(path), "pt") as file:
                self.frames[offset : offset + shape[0]].copy_(file.get_tensor("frames"))
                self.actions[offset : offset + shape[0]].copy_(file.get_tensor("actions"))
                starts = (file.get_tensor("starts") + offset).tolist()
                self.bounds += list(itertools.pairwise(starts))
                self.seeds += file.get_tensor("seeds").tolist()
            offset += shape[0]

    def episode(self, index: int) -> tuple[Tensor, Tensor]:
        """Return frames uint8 [T, height, width, 3] and actions [T] of one episode."""
        start, end = self.bounds[index]
        return self.frames[start:end], self.actions[start:end]


class Windows:
    """Random windows of `length` frames that never cross an episode, gathered where the episodes are kept."""

    def __init__(self, episodes: Episodes, length: int) -> None:
        ranges = [torch.arange(start, end - length + 1) for start, end in episodes.bounds if end - start >= length]
        if not ranges:
            raise ConfigError(f"length: expected at most the longest episode, got {length} frames")
        self.episodes, self.length = episodes, length
        self.starts = torch.cat(ranges).to(episodes.frames.device)
        self.offsets = torch.arange(length, device=self.starts.device)

    def draw(self, batch: int, patch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return float32 tokens [B, N, C] in [-1, 1] and int64 actions [B, F]."""
        pick = torch.randint(len(self.starts), (batch,), generator=generator, device=self.starts.device)
        index = self.starts[pick][:, None] + self.offsets
        frames = self.episodes.frames.index_select(0, index.flatten())
        return patchify(frames.unflatten(0, index.shape), patch), self.episodes.actions[index]
