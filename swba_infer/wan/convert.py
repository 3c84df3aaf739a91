"""`swba-infer convert`: a training checkpoint of the Wan family, as a folder that this engine and diffusers read."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..models.wan import parameter_dtype
from ..models.wan_config import WanConfig
from .architecture import write_architecture
from .load import describe, find_transformer, match_model
from .weights import PICKLES, Weights, open_pickle, open_safetensors

DESCRIPTION = """Turn a checkpoint of the Wan family (Self-Forcing, CausVid, LongLive, Krea, Wan itself) into a folder
of safetensors and a config.json.

A .pt file is read without running any code in it; of its entries the generator's EMA is taken if there is one.
Prefixes of training wrappers are removed. Every tensor must belong to a Wan text-to-video transformer."""
EXAMPLES = """examples:
  swba-infer convert self_forcing_dmd.pt self-forcing
  swba-infer convert checkpoint.pt out --key generator --dtype bfloat16"""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STEM = "diffusion_pytorch_model"


class Converted(NamedTuple):
    """What `convert` read and wrote: the entry of the file ("" for all of it), the sizes, the bytes of the tensors."""

    key: str
    config: WanConfig
    bytes: int


def convert(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    key: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 2_000_000_000,
) -> Converted:
    """Write a Wan checkpoint as a folder in diffusers' form; it appears under its name only when complete.

    Args:
        source: a .pt file, or anything that `load_wan` reads.
        directory: a new path.
        key: which entry of a .pt file to take, dotted if it lies in another; default: the EMA of the generator, else
            the generator.
        dtype: of what is written, norms, modulation and time embedding excepted; default: as stored.
        max_shard_bytes: size limit of one file's tensors in bytes; a larger tensor gets a file of its own.

    Raises:
        ConfigError: no such source, or a directory that exists.
        CheckpointError: a damaged file, one that holds more than tensors, or one of another architecture.
    """
    target = Path(directory)
    if target.exists():
        raise ConfigError(f"out: expected a new path, got the existing {target}")
    place = find_transformer(source)
    weights, found = _open(place, key)
    config = describe(place, weights)
    _, stored = match_model(config, weights)
    dtypes = {name: _target_dtype(name, weights.tensors[theirs].dtype, dtype) for name, theirs in stored.items()}
    sizes = {name: math.prod(weights.tensors[stored[name]].shape) * dtypes[name].itemsize for name in stored}
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        staging.chmod(0o755)
        shards = _plan_shards(sizes, max_shard_bytes)
        for file, names in shards.items():
            save_file(_read(weights, {stored[name]: name for name in names}, dtypes), staging / file, {"format": "pt"})
            (staging / file).chmod(0o644)
        if len(shards) > 1:
            home = {name: file for file, names in shards.items() for name in names}
            _write_json(staging / f"{_STEM}.safetensors.index.json", _index(home, sum(sizes.values())))
        _write_json(staging / "config.json", write_architecture(config))
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Converted(found, config, sum(sizes.values()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `swba-infer convert`."""
    parser.add_argument("source", help="a .pt file, a .safetensors file, or a folder of them")
    parser.add_argument("out", help="the folder to write; must not exist")
    parser.add_argument(
        "--key", help="the entry of a .pt file to take, dotted if nested (default: the EMA, else the generator)"
    )
    parser.add_argument("--dtype", choices=sorted(_DTYPES), help="what to store (default: as it is)")


def run(args: argparse.Namespace) -> int:
    """Convert and say what was written."""
    done = convert(args.source, args.out, key=args.key, dtype=_DTYPES[args.dtype] if args.dtype else None)
    size = done.config
    print(
        f"{args.out}: {size.num_layers} layers, {size.num_attention_heads} heads, {size.channels} latent channels, "
        f"{done.bytes / 1e9:.2f} GB" + (f", from {done.key!r}" if done.key else "")
    )
    return 0


def _open(place: Path, key: str | None) -> tuple[Weights, str]:
    if place.suffix in PICKLES:
        return open_pickle(place, key)
    if key is not None:
        raise ConfigError(f"key: expected none for safetensors, got {key!r}")
    return open_safetensors(place), ""


def _target_dtype(name: str, stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return stored if asked is None else parameter_dtype(name, asked)


def _plan_shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Return the tensors of each file, in the order of the model."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {f"{_STEM}.safetensors": groups[0]}
    return {f"{_STEM}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _read(weights: Weights, names: Mapping[str, str], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Read the tensors of one file, by stored name, under the model's names."""
    tensors: dict[str, Tensor] = {}
    for theirs, tensor in weights.read(names):
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"tensor {theirs!r}: expected finite values, got NaN or infinity")
        written = tensor.detach().to(dtypes[names[theirs]]).clone(memory_format=torch.contiguous_format)
        if written.dtype != tensor.dtype and not bool(torch.isfinite(written).all()):
            raise CheckpointError(f"tensor {theirs!r}: expected values within {written.dtype}, got larger ones")
        tensors[names[theirs]] = written
    return tensors


def _index(home: Mapping[str, str], total: int) -> dict[str, Any]:
    return {"metadata": {"total_size": total}, "weight_map": dict(home)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
