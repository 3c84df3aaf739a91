"""A stream in a file: one safetensors file, which appears under its name only when complete.

It holds the rings' used slots, positions, written ends, the model's lane state, the caller's counters and tensors and
a fingerprint of the model and of the sizes of the stream.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .cache import RingKVCache
from .checkpoint import read_tensors
from .errors import CheckpointError, StreamStateError
from .files import replacing
from .snapshot import RingSnapshot

FORMAT = "swba_infer.stream.1"

_FULLY_HASHED_ELEMENTS = 1 << 20
_SAMPLED_ELEMENTS = 1 << 16
_OWN = "own."
_ADDED_LATER = {"sink_distance": "growing"}  # fields of StreamConfig that older files lack, and what they meant


class StoredStream(NamedTuple):
    """A stream file's content, checked against the stream that is to take it."""

    ring: RingSnapshot
    state: dict[str, Tensor]
    extra: dict[str, int | str]
    tensors: dict[str, Tensor]


class ModelFingerprint:
    """Tell a model by its class, config and weights; hashing is repeated only after the weights have changed.

    Tensors of more than 2^20 elements are hashed at 2^16 evenly spaced ones.
    """

    def __init__(self, model: Any) -> None:
        self._model = getattr(model, "_orig_mod", model)
        self._versions: list[tuple[str, int, int]] | None = None
        self._weights = ""

    def __call__(self) -> dict[str, Any]:
        """Return the fingerprint as plain JSON."""
        return {
            "class": type(self._model).__name__,
            "config": _plain_config(getattr(self._model, "config", None)),
            "weights": self._hash_weights(),
        }

    def _hash_weights(self) -> str:
        tensors = self._model.state_dict() if isinstance(self._model, torch.nn.Module) else {}
        versions = None
        if not any(x.is_inference() for x in tensors.values()):
            versions = [(name, x.data_ptr(), x._version) for name, x in tensors.items()]
        if versions is None or versions != self._versions:
            digest = hashlib.sha256()
            for name, x in sorted(tensors.items()):
                digest.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
                digest.update(_sample(x))
            self._weights, self._versions = digest.hexdigest(), versions
        return self._weights


def write_stream(
    path: str | os.PathLike[str],
    cache: RingKVCache,
    state: Mapping[str, Tensor],
    model: Mapping[str, Any],
    extra: Mapping[str, int | str] | None,
    own: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the stream to `path`, over an older file only once all bytes are on the disk.

    Raises:
        ConfigError: the path cannot be written.
        StreamStateError: `extra` holds something else than ints and strings.
    """
    extra = {} if extra is None else dict(extra)
    for name, value in extra.items():
        if not isinstance(name, str) or not isinstance(value, int | str):
            raise StreamStateError(f"extra: expected names with ints or strings, got {name!r}: {value!r}")
    ring = cache.snapshot("cpu")
    tensors = {
        "ring.k": ring.k,
        "ring.v": ring.v,
        "position": torch.tensor(ring.position, dtype=torch.int64),
        "written_end": torch.tensor(ring.written_end, dtype=torch.int64),
        **{f"state.{name}": value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()},
        **{f"{_OWN}{name}": value.detach().to("cpu", copy=True).contiguous() for name, value in (own or {}).items()},
    }
    metadata = {
        "format": FORMAT,
        "fingerprint": json.dumps(_fingerprint(cache, model), sort_keys=True),
        "extra": json.dumps(extra, sort_keys=True),
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
        _flush(temporary)
    _flush(Path(path).parent)


def read_stream(
    path: str | os.PathLike[str], cache: RingKVCache, state: Mapping[str, Tensor], model: Mapping[str, Any]
) -> StoredStream:
    """Read a stream file and check all of it against the stream that is to take it; change nothing.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model, stream or number of lanes.
    """
    tensors = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a stream file ({FORMAT}), got format {metadata.get('format')!r}")
    try:
        found, extra = json.loads(metadata["fingerprint"]), json.loads(metadata["extra"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a fingerprint and extra in JSON, got {error!r}") from error
    if not isinstance(extra, dict):
        raise CheckpointError(f"{path}: expected extra to be an object, got {extra!r}")
    _compare_fingerprints(path, json.loads(json.dumps(_fingerprint(cache, model))), found)
    names = {"ring.k", "ring.v", "position", "written_end", *(f"state.{name}" for name in state)}
    own = {name.removeprefix(_OWN): tensors.pop(name) for name in sorted(tensors) if name.startswith(_OWN)}
    if set(tensors) != names:
        missing, more = sorted(names - set(tensors)), sorted(set(tensors) - names)
        raise CheckpointError(f"{path}: missing tensors {missing}, extra tensors {more}")
    for name in ("position", "written_end"):
        if tensors[name].dtype != torch.int64 or list(tensors[name].shape) != [cache.lanes]:
            raise CheckpointError(
                f"{path}: {name}: expected int64 [{cache.lanes}], got {tensors[name].dtype} {list(tensors[name].shape)}"
            )
    position, written_end = (tuple(tensors[name].tolist()) for name in ("position", "written_end"))
    ring = RingSnapshot(cache.stream, tensors["ring.k"], tensors["ring.v"], position, written_end)
    try:
        ring.check(cache)
    except StreamStateError as error:
        raise CheckpointError(f"{path}: {error}") from error
    stored = {name: tensors[f"state.{name}"] for name in state}
    for name, value in state.items():
        if stored[name].shape != value.shape or stored[name].dtype != value.dtype:
            raise CheckpointError(
                f"{path}: state.{name}: expected {value.dtype} {list(value.shape)}, "
                f"got {stored[name].dtype} {list(stored[name].shape)}"
            )
    return StoredStream(ring, stored, extra, own)


def _fingerprint(cache: RingKVCache, model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": dict(model),
        "stream": cache.stream.to_dict(),
        "cache": {
            "layers": cache.layers,
            "lanes": cache.lanes,
            "kv_heads": cache.kv_heads,
            "head_dim": cache.head_dim,
            "dtype": str(cache.dtype),
        },
    }


def _compare_fingerprints(path: str | os.PathLike[str], expected: dict[str, Any], found: Any) -> None:
    for part, fields in expected.items():
        theirs = found.get(part) if isinstance(found, dict) else None
        for name, value in fields.items():
            got = theirs.get(name, _ADDED_LATER.get(name)) if isinstance(theirs, dict) else None
            if got != value:
                raise CheckpointError(f"{path}: expected a stream of this {part}: {name} {value!r}, got {got!r}")


def _plain_config(config: Any) -> Any:
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    elif not isinstance(config, Mapping):
        config = getattr(config, "to_dict", lambda: None)()
    return json.loads(json.dumps(config, sort_keys=True, default=str)) if isinstance(config, Mapping) else None


def _sample(x: Tensor) -> bytes:
    flat = x.detach().reshape(-1)
    if flat.numel() > _FULLY_HASHED_ELEMENTS:
        flat = flat[:: flat.numel() // _SAMPLED_ELEMENTS]
    return flat.contiguous().cpu().view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _flush(path: Path) -> None:
    """Have the operating system put a file, or a directory's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
