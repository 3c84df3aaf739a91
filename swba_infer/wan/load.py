"""From a checkpoint on the disk to a Wan transformer on the device, one tensor at a time."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..config import check_dtype
from ..device import pick_device
from ..errors import CheckpointError, ConfigError
from ..models.wan import WanTransformer, parameter_dtype
from ..models.wan_config import WanConfig
from .architecture import infer_architecture, is_wan, read_architecture, with_latent_size
from .names import match_names, stripped_names
from .weights import StoredTensor, Weights, open_safetensors


def load_wan(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    latent_size: tuple[int, int] | None = None,
    config: WanConfig | None = None,
    check_finite: bool = False,
) -> WanTransformer:
    """Build the Wan transformer of a checkpoint, in eval mode: all of its tensors, and nothing else.

    Everything that the headers tell is checked before any tensor is read. Tensors are memory-mapped and go to the
    device one by one; those that need neither another device nor another dtype stay mapped, so the file must stay.

    Args:
        path: a safetensors file, a folder of them (diffusers' or Wan's own names, sharded or not), or a folder of a
            whole diffusers pipeline, whose `transformer` is taken.
        device: default: cuda if there is one, else cpu.
        dtype: default: that of most of the stored numbers. Norms, modulation and the time embedding are float32
            where this is a half precision.
        latent_size: height and width of the latents; default 60 x 104, or 44 x 80 for 48 channels.
        config: default: from the config.json beside the tensors, else from their shapes.
        check_finite: reject NaN and infinity.

    Raises:
        ConfigError: there is no such checkpoint, or its config.json does not describe a text-to-video Wan.
        CheckpointError: a damaged or missing file; missing, extra or duplicate tensors; a shape that contradicts the
            config.
    """
    device = pick_device(device)
    if dtype is not None:
        check_dtype(dtype)
    model, stored, weights = check_wan(path, latent_size, config)
    dtype = dtype or common_dtype(weights)
    names = {theirs: ours for ours, theirs in stored.items()}
    parameters: dict[str, Tensor] = {}
    for theirs, tensor in weights.read(names):
        if check_finite and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"tensor {theirs!r}: expected finite values, got NaN or infinity")
        parameters[names[theirs]] = tensor.to(device).to(parameter_dtype(names[theirs], dtype))
    model.load_state_dict(parameters, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def check_wan(
    path: str | os.PathLike[str], latent_size: tuple[int, int] | None = None, config: WanConfig | None = None
) -> tuple[WanTransformer, dict[str, str], Weights]:
    """Check all that the headers of a checkpoint tell; raise what `load_wan` raises.

    Returns:
        The model on the meta device, the stored name of each of its parameters, and what is stored.
    """
    place = find_transformer(path)
    weights = open_safetensors(place)
    config = with_latent_size(config or describe(place, weights), latent_size)
    return *match_model(config, weights), weights


def find_transformer(path: str | os.PathLike[str]) -> Path:
    """Return the file or folder that holds the transformer; raise ConfigError if there is none."""
    found = Path(path)
    if not found.exists():
        raise ConfigError(f"model: expected a Wan checkpoint, got {str(path)!r}: no such file or folder")
    if (found / "model_index.json").is_file():
        found = found / "transformer"
        if not found.is_dir():
            raise ConfigError(f"model: expected the folder {found} in a diffusers pipeline, found none")
    return found


def describe(place: Path, weights: Weights) -> WanConfig:
    """Return the architecture of a checkpoint: from its config.json, or from its tensors where there is none.

    A folder's config.json must be a Wan's; beside a file that was named, one of another model does not count.
    """
    path = (place if place.is_dir() else place.parent) / "config.json"
    if path.is_file() and (place.is_dir() or is_wan(path)):
        return read_architecture(path)
    return infer_architecture({short: weights.tensors[name] for short, name in stripped_names(weights.tensors).items()})


def match_model(config: WanConfig, weights: Weights) -> tuple[WanTransformer, dict[str, str]]:
    """Return a model without memory, on the meta device, and the stored name of each of its parameters.

    Raises:
        CheckpointError: names or shapes of the checkpoint are not those of the model.
    """
    if config.num_layers > len(weights.tensors):
        raise CheckpointError(f"checkpoint: expected {config.num_layers} layers, got {len(weights.tensors)} tensors")
    try:
        with torch.device("meta"):
            model = WanTransformer(config)
    except (RuntimeError, OverflowError) as error:
        raise ConfigError(f"config: expected sizes that a tensor can have, got {config}") from error
    expected = model.state_dict()
    stored = match_names(expected, stripped_names(weights.tensors))
    check_shapes(expected, stored, weights.tensors)
    return model, stored


def check_shapes(
    expected: Mapping[str, Tensor], stored: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> None:
    """Raise CheckpointError if a stored tensor has not the shape that the config asks for."""
    for name, theirs in stored.items():
        if tensors[theirs].shape != tuple(expected[name].shape):
            raise CheckpointError(
                f"tensor {theirs!r}: expected {list(expected[name].shape)}, got {list(tensors[theirs].shape)}"
            )


def common_dtype(weights: Weights) -> torch.dtype:
    """Return the dtype of most of the stored numbers."""
    numbers: Counter[torch.dtype] = Counter()
    for stored in weights.tensors.values():
        numbers[stored.dtype] += math.prod(stored.shape)
    return numbers.most_common(1)[0][0]
