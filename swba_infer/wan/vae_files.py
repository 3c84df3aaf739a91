"""Read diffusers' `AutoencoderKLWan` from its folder, strictly: diffusers itself only warns of what does not fit."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import read_tensors
from ..errors import CheckpointError, ConfigError
from .extra import require


def load_autoencoder(directory: str | os.PathLike[str], device: torch.device, dtype: torch.dtype) -> Any:
    """Build the autoencoder of a folder, or of its `vae` subfolder, straight on the device and in the dtype.

    Raises:
        ConfigError: no such folder, or a config that does not describe an `AutoencoderKLWan`.
        CheckpointError: damaged weights, or tensors that are missing, left over or of a wrong shape; names them.
    """
    folder = _folder(Path(directory))
    kind = require("diffusers").AutoencoderKLWan
    config = _read_config(folder / "config.json", kind)
    try:
        with torch.device("meta"):
            module = kind(**config)
    except (TypeError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
        raise ConfigError(f"{folder / 'config.json'}: expected sizes of an autoencoder, got {error}") from error
    tensors = _read_weights(folder)
    expected = module.state_dict()
    missing, extra = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or extra:
        raise CheckpointError(f"{folder}: missing tensors {missing[:5]}, extra tensors {extra[:5]}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{folder}: {name}: expected floating {list(expected[name].shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    placed = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
    module.load_state_dict(placed, strict=True, assign=True)
    return module


def _folder(path: Path) -> Path:
    for folder in (path / "vae", path):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(f"vae: expected a diffusers folder with vae/config.json or config.json, got {path}")


def _read_config(path: Path, kind: Any) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected a readable JSON file, got {error}") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name != kind.__name__:
        raise ConfigError(f"{path}: expected _class_name {kind.__name__!r}, got {name!r}")
    sizes = {key: value for key, value in config.items() if not key.startswith("_")}
    known = set(inspect.signature(kind.__init__).parameters) - {"self"}
    if set(sizes) - known:
        raise ConfigError(f"{path}: unknown keys {sorted(set(sizes) - known)}")
    return sizes


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: expected safetensors files, got none")
    for path in paths:
        found = read_tensors(path)
        twice = sorted(set(found) & set(tensors))
        if twice:
            raise CheckpointError(f"{path}: tensors {twice[:5]} are in another file of the folder, too")
        tensors.update(found)
    return tensors
