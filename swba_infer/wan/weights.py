"""Where the tensors of a checkpoint lie: their shapes and dtypes first, their bytes one tensor at a time."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint import read_header
from ..errors import CheckpointError, ConfigError

PICKLES = (".pt", ".pth", ".ckpt", ".bin")

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_EMA = ("generator_ema", "ema", "model_ema")
_PLAIN = ("generator", "model", "state_dict", "params", "module")


class StoredTensor(NamedTuple):
    """A tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a checkpoint by stored name.

    Attributes:
        tensors: what there is.
        read: yields the named tensors, on the CPU and memory-mapped, in an order of its own.
    """

    tensors: Mapping[str, StoredTensor]
    read: Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]


def open_safetensors(path: Path) -> Weights:
    """Open a safetensors file, or the one set of them in a folder, after checking every header.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or a tensor is stored twice or in a foreign dtype.
    """
    home: dict[str, Path] = {}
    tensors: dict[str, StoredTensor] = {}
    for file in _files(path):
        for name, spec in read_header(file).items():
            if name in home:
                raise CheckpointError(f"{file}: tensor {name!r} is already in {home[name].name}")
            if spec["dtype"] not in _DTYPES:
                raise CheckpointError(
                    f"{file}: tensor {name!r}: expected a dtype of {sorted(_DTYPES)}, got {spec['dtype']}"
                )
            home[name], tensors[name] = file, StoredTensor(tuple(spec["shape"]), _DTYPES[spec["dtype"]])

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = sorted(names, key=lambda name: (str(home[name]), name))
        for file in sorted({home[name] for name in wanted}):
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in (name for name in wanted if home[name] == file):
                        yield name, handle.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: expected a readable safetensors file, got {error}") from error

    return Weights(tensors, read)


def open_pickle(path: Path, key: str | None = None) -> tuple[Weights, str]:
    """Open a checkpoint written by `torch.save`, without running any code that it may carry.

    Args:
        path: the file.
        key: which entry of the file holds the tensors, dotted if it lies in another; default: the EMA of the
            generator, else the generator.

    Returns:
        The weights, and the dotted key under which they stood ("" for the file itself).

    Raises:
        CheckpointError: the file is damaged or holds more than tensors, or no tensors where they should be.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle fails as whatever the unpickler trips over
        line = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: expected a readable file of tensors only, got {line}") from error
    found, where = _find_tensors(content, key, path)
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.dtype not in _DTYPES.values():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{path}: {name!r}: expected a floating tensor, got {got}")
    tensors = {name: StoredTensor(tuple(value.shape), value.dtype) for name, value in found.items()}
    return Weights(tensors, lambda names: ((name, found[name]) for name in names)), where


def _find_tensors(content: Any, key: str | None, path: Path) -> tuple[dict[str, Any], str]:
    where: list[str] = []
    names: list[str] = []
    if key is not None:  # a name with dots of the file's own goes first
        names = [key] if isinstance(content, dict) and key in content else key.split(".")
    for name in names:
        if not isinstance(content, dict) or name not in content:
            have = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
            raise CheckpointError(f"{path}: expected the key {key!r}, got {have}")
        content = content[name]
        where.append(name)
    while isinstance(content, dict):
        # What trainers keep beside the models may be tensors, too: a step; and an EMA that has not begun is empty.
        filled = (name for name in (*_EMA, *_PLAIN) if isinstance(content.get(name), dict) and content[name])
        inner = next(filled, None)
        if inner is None:
            break
        content = content[inner]
        where.append(inner)
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        have = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: expected tensors under one of {[*_EMA, *_PLAIN]}, got {have}")
    return content, ".".join(where)


def _files(path: Path) -> list[Path]:
    """Return the safetensors files that make up one checkpoint."""
    if path.is_file():
        if path.suffix in PICKLES:
            raise ConfigError(f"model: expected safetensors, got {path}; `swba-infer convert` makes them of it")
        if path.suffix != ".safetensors":
            raise ConfigError(f"model: expected a .safetensors file, got {path}")
        shard = _SHARD.fullmatch(path.name)
        return _shards(path.parent, [path.parent / name for name in _siblings(path, shard)]) if shard else [path]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        pickles = sorted(other.name for other in path.iterdir() if other.suffix in PICKLES)
        hint = f"; `swba-infer convert` makes them of {pickles}" if pickles else ""
        raise CheckpointError(f"{path}: expected safetensors files, found none{hint}")
    return _shards(path, found)


def _siblings(path: Path, shard: re.Match[str]) -> list[str]:
    same = (_SHARD.fullmatch(other.name) for other in path.parent.glob("*.safetensors"))
    return sorted(other[0] for other in same if other and (other[1], other[3]) == (shard[1], shard[3]))


def _shards(folder: Path, found: list[Path]) -> list[Path]:
    names = sorted(path.name for path in found)
    if len(found) == 1 and not _SHARD.fullmatch(names[0]):
        return found
    matches = [_SHARD.fullmatch(name) for name in names]
    sets = {(match[1], int(match[3])) if match else (name, 1) for name, match in zip(names, matches, strict=True)}
    if len(sets) != 1:
        raise CheckpointError(f"{folder}: expected one checkpoint, got {names}; name the file")
    stem, total = sets.pop()
    wanted = [f"{stem}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    missing = sorted(set(wanted) - set(names))
    if missing or len(names) != total:
        raise CheckpointError(f"{folder}: missing shards {missing} of {total}, got {names}")
    _check_index(folder / f"{stem}.safetensors.index.json", set(wanted))
    return [folder / name for name in wanted]


def _check_index(path: Path, files: set[str]) -> None:
    """Raise CheckpointError if there is an index that speaks of other files."""
    if not path.is_file():
        return
    try:
        named = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected an index with a weight_map, got {error!r}") from error
    if named != files:
        raise CheckpointError(f"{path}: expected the files {sorted(files)}, got {sorted(named)}")
