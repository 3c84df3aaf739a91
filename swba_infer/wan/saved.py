"""A stream of a `WanGenerator` in a file: the engine's stream file, with decoder caches and clean latents beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine import StreamingEngine
from ..errors import CheckpointError
from ..stream_state import StoredStream
from .decoder import StreamDecoder
from .history import LatentHistory
from .sampler import RenoisingSampler

_DECODER = "decoder."


class LaneRecord(NamedTuple):
    """What a lane is besides its tensors: seed of the noise, blocks drawn, whether it has its prompts."""

    seed: int = 0
    blocks: int = 0
    prompted: bool = False
    guided: bool = False


class Stored(NamedTuple):
    """What a file holds for the engine and for the decoder."""

    stream: StoredStream
    decoder: dict[str, Tensor]


def write_saved(
    path: str | os.PathLike[str],
    engine: StreamingEngine,
    decoder: StreamDecoder,
    lanes: Sequence[tuple[LaneRecord, LatentHistory]],
    sampler: RenoisingSampler,
) -> None:
    """Write the file; it appears under its name only when complete."""
    tensors = {_DECODER + name: x for name, x in decoder.state_dict().items()}
    for i, (_, history) in enumerate(lanes):
        tensors |= {f"latents.{i}.first": history.first, f"latents.{i}.last": history.last}
    records = [{**record._asdict(), "frames": history.frames} for record, history in lanes]
    extra = {"wan.lanes": json.dumps(records), "wan.sampler": json.dumps(sampler.to_dict())}
    engine.save(path, extra, tensors)


def read_saved(
    path: str | os.PathLike[str], engine: StreamingEngine, empty: LatentHistory, lanes: int, guided: bool
) -> tuple[Stored, list[tuple[LaneRecord, LatentHistory]], RenoisingSampler]:
    """Read a file and check it against the generator that is to take it; change nothing.

    Raises:
        CheckpointError: the file is damaged or of another model, stream or number of lanes.
    """
    stored = engine.read(path)
    try:
        records = json.loads(str(stored.extra["wan.lanes"]))
        sampler = RenoisingSampler.from_dict(json.loads(str(stored.extra["wan.sampler"])))
        read = [_read_lane(path, record, stored.tensors, i, empty) for i, record in enumerate(records)]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: expected a stream saved by WanGenerator, got {error!r}") from error
    if len(read) != lanes or (sampler.guidance != 1) != guided:
        raise CheckpointError(
            f"{path}: expected {lanes} lanes {'with' if guided else 'without'} guidance, got {len(read)} and a "
            f"guidance of {sampler.guidance:g}"
        )
    tokens = engine.stream.tokens_per_frame
    held = list(stored.ring.position[:lanes])
    if held != [history.frames * tokens for _, history in read]:
        raise CheckpointError(f"{path}: expected latents of {held} tokens, got {[h.frames for _, h in read]} frames")
    decoder = {name.removeprefix(_DECODER): x for name, x in stored.tensors.items() if name.startswith(_DECODER)}
    return Stored(stored, decoder), read, sampler


def _read_lane(
    path: str | os.PathLike[str], record: dict[str, Any], tensors: dict[str, Tensor], lane: int, empty: LatentHistory
) -> tuple[LaneRecord, LatentHistory]:
    frames = record.pop("frames")
    parts = []
    for name, keep in (("first", empty.keep_first), ("last", empty.keep_last)):
        x = tensors[f"latents.{lane}.{name}"]
        shape = [1, empty.first.shape[1], x.shape[2] if x.ndim == 5 else keep, *empty.first.shape[3:]]
        if list(x.shape) != shape or x.dtype != torch.float32 or x.shape[2] > frames:
            raise CheckpointError(f"{path}: latents.{lane}.{name}: expected {shape}, got {x.dtype} {list(x.shape)}")
        parts.append(x[:, :, :keep] if name == "first" else x[:, :, max(0, x.shape[2] - keep) :])
    first, last = (part.to(empty.first.device) for part in parts)
    return LaneRecord(**record), LatentHistory(first, last, frames, empty.keep_first, empty.keep_last)
