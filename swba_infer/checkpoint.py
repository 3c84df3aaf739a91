"""Model directories: `config.json` beside `model-0000x-of-0000y.safetensors`, read strictly and written atomically.

safetensors itself accepts duplicate keys, NaN and leftovers, so names, shapes, dtypes and (on request) finiteness are
checked here. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .config import StreamConfig
from .errors import CheckpointError, ConfigError
from .files import replacing

FORMAT = 1
PRETRAINED = Path(__file__).parent / "pretrained"

_REQUIRED = {"format", "architecture", "dtype", "model", "stream", "sampler"}
_OPTIONAL = {"actions", "fps"}
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedModel(NamedTuple):
    """What `load_model` returns: the module in eval mode, its pattern, and the checked `config.json`."""

    model: torch.nn.Module
    stream: StreamConfig
    config: dict[str, Any]


class RecordedContext(NamedTuple):
    """Frames, uint8 [F, H, W, 3], and the action before each, int64 [F]."""

    frames: torch.Tensor
    actions: torch.Tensor


def resolve_directory(name_or_dir: str | os.PathLike[str]) -> Path:
    """Return the directory of a shipped model's name ("freedoom") or of a path; raise ConfigError if there is none."""
    path = Path(name_or_dir)
    if (path / "config.json").is_file():
        return path
    shipped = PRETRAINED / str(name_or_dir)
    if path.name == str(name_or_dir) and (shipped / "config.json").is_file():
        return shipped
    names = sorted(p.parent.name for p in PRETRAINED.glob("*/config.json"))
    shipped_names = f"one of the shipped models {names}" if names else "a shipped model (there are none)"
    raise ConfigError(f"model: expected a directory with a config.json or {shipped_names}, got {str(name_or_dir)!r}")


def save_model(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    max_shard_bytes: int = 15_500_000,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model directory that appears under its name only when complete.

    Args:
        directory: created; if it exists, `overwrite` must be set, and files that are not the model's own are kept.
        config: `architecture`, `model`, `stream`, `sampler` and optionally `actions` (names) and `fps`; `format` and
            `dtype` are filled in. All of it is plain JSON.
        state_dict: every floating tensor in one dtype (float32, bfloat16 or float16).
        max_shard_bytes: size limit of one shard's tensors in bytes; a larger tensor gets a shard of its own.

    Raises:
        ConfigError: an unknown or missing key, mixed or unsupported dtypes, an existing directory.
    """
    target = Path(directory)
    if target.exists() and not overwrite:
        raise ConfigError(f"directory: expected a new path, got the existing {target}")
    config = {**config, "format": FORMAT, "dtype": _common_dtype(state_dict.values())}
    _check_config(config, "config")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        staging.chmod(0o755)
        shards = _split(state_dict, max_shard_bytes)
        for i, shard in enumerate(shards, start=1):
            path = staging / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, path, metadata={"format": "pt"})
            path.chmod(0o644)
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _swap_in(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check `config.json`; raise ConfigError on unknown, missing or duplicate keys."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError, _DuplicateKey) as error:
        raise ConfigError(f"{path}: expected a readable JSON file, got {error}") from error
    _check_config(config, str(path))
    return config


def load_model(
    directory: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    check_finite: bool = False,
) -> LoadedModel:
    """Build the model a directory describes and load its weights, all of them and nothing else.

    Args:
        directory: as written by `save_model`.
        dtype: of the loaded weights; default: as stored.
        check_finite: reject NaN and infinity.

    Raises:
        ConfigError: a config key that is unknown, missing or of a wrong value.
        CheckpointError: a damaged or missing shard; missing, extra or duplicate tensors; a wrong shape or dtype.
    """
    config = read_config(directory)
    stream = parse_part(StreamConfig, config, "stream")
    model = _build(config)
    tensors = read_shards(directory)
    _check_tensors(tensors, model.state_dict(), _DTYPES[config["dtype"]], check_finite)
    model.load_state_dict(tensors, strict=True)
    model.to(device=device, dtype=dtype or _DTYPES[config["dtype"]])
    model.requires_grad_(False)
    return LoadedModel(model.eval(), stream, config)


def load_context(name_or_dir: str | os.PathLike[str]) -> RecordedContext:
    """Read the recorded frames that ship with a model: something for a stream to start from."""
    path = resolve_directory(name_or_dir) / "context.safetensors"
    if not path.is_file():
        raise ConfigError(f"context: expected recorded frames in {path}, which this model does not have")
    tensors = read_tensors(path)
    if set(tensors) != {"frames", "actions"}:
        raise CheckpointError(f"{path}: expected the tensors frames and actions, got {sorted(tensors)}")
    return RecordedContext(tensors["frames"], tensors["actions"])


def save_context(directory: str | os.PathLike[str], frames: torch.Tensor, actions: torch.Tensor) -> None:
    """Write the recorded frames, uint8 [F, H, W, 3], and their actions, int64 [F], that `load_context` reads."""
    with replacing(Path(directory) / "context.safetensors") as path:
        save_file({"frames": frames.contiguous(), "actions": actions.contiguous()}, str(path))


def read_shards(directory: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read every shard of a directory to CPU; raise CheckpointError naming the file that is missing or damaged."""
    tensors: dict[str, torch.Tensor] = {}
    source: dict[str, str] = {}
    for path in _shard_paths(Path(directory)):
        for name, tensor in read_tensors(path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is already in {source[name]}")
            tensors[name], source[name] = tensor, path.name
    return tensors


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read one safetensors file to CPU after checking its header; raise CheckpointError naming the file."""
    read_header(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected a readable safetensors file, got {error!r}") from error


def read_header(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Return what a safetensors file says of each tensor: `dtype`, `shape` and `data_offsets`.

    Raises:
        CheckpointError: the file is missing, truncated or damaged, or names a tensor twice.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(f"{path}: truncated: {size} bytes are too few for its header")
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        end = max((spec["data_offsets"][1] for spec in header.values()), default=0)
        if size != 8 + length + end:
            raise CheckpointError(f"{path}: expected {8 + length + end} bytes, got {size}: truncated or damaged")
        return {name: {key: spec[key] for key in ("dtype", "shape", "data_offsets")} for name, spec in header.items()}
    except _DuplicateKey as error:
        raise CheckpointError(f"{path}: tensor {error} appears twice in the header") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: expected a readable safetensors file, got {error!r}") from error


def parse_part(kind: Any, config: Mapping[str, Any], name: str) -> Any:
    """Build the config dataclass `kind` from `config[name]`; raise ConfigError if it does not describe one."""
    values = config[name]
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}: expected a JSON object, got {values!r}")
    try:
        return kind.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error


class _DuplicateKey(Exception):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateKey(repr(key))
        result[key] = value
    return result


def _check_config(config: Any, where: str) -> None:
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {type(config).__name__}")
    unknown, missing = sorted(set(config) - _REQUIRED - _OPTIONAL), sorted(_REQUIRED - set(config))
    if unknown or missing:
        raise ConfigError(f"{where}: unknown keys {unknown}, missing keys {missing}")
    if config["format"] != FORMAT:
        raise ConfigError(f"{where}: expected format {FORMAT}, got {config['format']!r}")
    if config["architecture"] != "video_dit":
        raise ConfigError(f"{where}: expected architecture 'video_dit', got {config['architecture']!r}")
    if not isinstance(config["dtype"], str) or config["dtype"] not in _DTYPES:
        raise ConfigError(f"{where}: expected dtype to be one of {sorted(_DTYPES)}, got {config['dtype']!r}")
    actions, fps = config.get("actions", []), config.get("fps", 1)
    if not isinstance(actions, list) or not all(isinstance(name, str) for name in actions):
        raise ConfigError(f"{where}: expected actions to be a list of names, got {actions!r}")
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < float("inf"):
        raise ConfigError(f"{where}: expected a finite fps above 0, got {fps!r}")


def _build(config: dict[str, Any]) -> torch.nn.Module:
    from .models.video_dit import VideoDiT, VideoDiTConfig

    with torch.random.fork_rng(devices=[]):
        return VideoDiT(parse_part(VideoDiTConfig, config, "model"))


def _check_tensors(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], dtype: torch.dtype, check_finite: bool
) -> None:
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        raise CheckpointError(f"checkpoint: missing tensors {_some(missing)}, extra tensors {_some(extra)}")
    for name, tensor in tensors.items():
        want = expected[name]
        want_dtype = dtype if want.is_floating_point() else want.dtype
        if tensor.shape != want.shape or tensor.dtype != want_dtype:
            raise CheckpointError(
                f"tensor {name!r}: expected {want_dtype} {list(want.shape)}, got {tensor.dtype} {list(tensor.shape)}"
            )
        if check_finite and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"tensor {name!r}: expected finite values, got NaN or infinity")


def _some(names: list[str]) -> str:
    return str(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _common_dtype(tensors: Iterable[torch.Tensor]) -> str:
    found = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
    if len(found) != 1 or not found <= set(_DTYPES):
        raise ConfigError(f"state_dict: expected one floating dtype of {sorted(_DTYPES)}, got {sorted(found)}")
    return found.pop()


def _split(state_dict: Mapping[str, torch.Tensor], limit: int) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for name, tensor in state_dict.items():
        if shards[-1] and used + tensor.nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = tensor.detach().to("cpu", copy=True).contiguous()
        used += tensor.nbytes
    return shards


def _shard_paths(directory: Path) -> list[Path]:
    found = {path.name: _SHARD.fullmatch(path.name) for path in directory.glob("model*.safetensors")}
    counts = {int(match[2]) for match in found.values() if match}
    strange = sorted(name for name, match in found.items() if not match)
    if strange or len(counts) != 1:
        raise CheckpointError(
            f"{directory}: expected one set of model-0000x-of-0000y.safetensors, got {sorted(found) or 'none'}"
        )
    total = counts.pop()
    paths = [directory / f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    missing = [path.name for path in paths if path.name not in found]
    if missing or len(found) != total:
        raise CheckpointError(f"{directory}: missing shards {missing} of {total}, got {sorted(found)}")
    return paths


def _swap_in(staging: Path, target: Path) -> None:
    """Rename staging to target, carrying over what else an older target holds (a model card, context frames)."""
    if not target.exists():
        staging.rename(target)
        return
    for path in target.iterdir():
        if path.name != "config.json" and not _SHARD.fullmatch(path.name):
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, staging / path.name)
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old / target.name)
    staging.rename(target)
    shutil.rmtree(old)
