"""Which Wan transformer a checkpoint holds: from its config.json, or from the shapes of its tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..models.wan_config import WanConfig
from .names import official_name
from .weights import StoredTensor

DIFFUSERS_CLASS = "WanTransformer3DModel"
OFFICIAL_CLASSES = ("WanModel", "CausalWanModel")

# Keys of config.json: what WanConfig calls them, or the value they must have for this model.
_DIFFUSERS = {
    "num_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "attention_head_dim": "attention_head_dim",
    "ffn_dim": "ffn_dim",
    "in_channels": "channels",
    "text_dim": "text_dim",
    "freq_dim": "freq_dim",
    "cross_attn_norm": "cross_attn_norm",
    "eps": "eps",
}
_OFFICIAL = {
    "num_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "ffn_dim": "ffn_dim",
    "in_dim": "channels",
    "text_dim": "text_dim",
    "text_len": "text_len",
    "freq_dim": "freq_dim",
    "cross_attn_norm": "cross_attn_norm",
    "eps": "eps",
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "qk_norm": (True, "rms_norm_across_heads"),
    "image_dim": (None,),
    "added_kv_proj_dim": (None,),
    "pos_embed_seq_len": (None,),
    "model_type": ("t2v", "ti2v"),
}
# Read and checked elsewhere, or of no meaning to a stream that brings its own window and positions.
_OTHER = {
    "patch_size",
    "out_channels",
    "out_dim",
    "dim",
    "rope_max_seq_len",
    "window_size",
    "local_attn_size",
    "sink_size",
}
_HEAD_DIM = 128


def is_wan(path: Path) -> bool:
    """Say whether a config.json calls itself one of a Wan transformer."""
    return _read_json(path).get("_class_name") in (DIFFUSERS_CLASS, *OFFICIAL_CLASSES)


def read_architecture(path: Path) -> WanConfig:
    """Return what a config.json says.

    Raises:
        ConfigError: the file is not readable, of another model, or has a key that is unknown or of a wrong value.
    """
    values = _read_json(path)
    kind = values.get("_class_name")
    if kind not in (DIFFUSERS_CLASS, *OFFICIAL_CLASSES):
        raise ConfigError(f"{path}: expected a {DIFFUSERS_CLASS} or {' or '.join(OFFICIAL_CLASSES)}, got {kind!r}")
    try:
        return _parse(values, _DIFFUSERS if kind == DIFFUSERS_CLASS else _OFFICIAL)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def write_architecture(config: WanConfig) -> dict[str, Any]:
    """Return the config.json of a WanTransformer3DModel, as diffusers reads it."""
    sizes = {theirs: getattr(config, ours) for theirs, ours in _DIFFUSERS.items()}
    return {
        "_class_name": DIFFUSERS_CLASS,
        **sizes,
        "out_channels": config.channels,
        "patch_size": [1, config.patch, config.patch],
        "qk_norm": "rms_norm_across_heads",
    }


def infer_architecture(tensors: Mapping[str, StoredTensor]) -> WanConfig:
    """Return the sizes that the shapes show; heads have 128 channels, as in every published Wan.

    Args:
        tensors: by name, without the prefixes of wrappers.

    Raises:
        CheckpointError: a tensor that every Wan transformer has is missing or of another rank.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        stored = tensors.get(name) or tensors.get(official_name(name))
        if stored is None or len(stored.shape) != rank:
            got = "none" if stored is None else str(list(stored.shape))
            raise CheckpointError(f"checkpoint: expected a Wan transformer with {name!r} of rank {rank}, got {got}")
        return stored.shape

    dim, channels, _, patch, _ = shape("patch_embedding.weight", 5)
    if dim % _HEAD_DIM:
        raise CheckpointError(
            f"tensor 'patch_embedding.weight': expected a width that is a multiple of {_HEAD_DIM}, got {dim}; "
            "other head sizes need a config.json beside the file"
        )
    blocks = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    if len(blocks) != max(blocks, default=0) + 1:
        raise CheckpointError(f"checkpoint: expected blocks 0, 1, 2, ..., got {sorted(blocks)[:50]}")
    norm = {"blocks.0.norm2.weight", official_name("blocks.0.norm2.weight")}
    return _sized(
        num_layers=len(blocks),
        num_attention_heads=dim // _HEAD_DIM,
        attention_head_dim=_HEAD_DIM,
        ffn_dim=shape("blocks.0.ffn.net.0.proj.weight", 2)[0],
        channels=channels,
        patch=patch,
        text_dim=shape("condition_embedder.text_embedder.linear_1.weight", 2)[1],
        freq_dim=shape("condition_embedder.time_embedder.linear_1.weight", 2)[1],
        cross_attn_norm=bool(norm & set(tensors)),
    )


def with_latent_size(config: WanConfig, size: tuple[int, int] | None) -> WanConfig:
    """Return the config for latents of a height and width; None keeps its own."""
    return config if size is None else replace(config, latent_height=size[0], latent_width=size[1])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected a readable JSON file, got {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _parse(values: Mapping[str, Any], names: Mapping[str, str]) -> WanConfig:
    unknown = sorted(key for key in values if key[:1] != "_" and key not in {*names, *_FIXED, *_OTHER})
    if unknown:
        raise ConfigError(f"config: expected only keys of a Wan text-to-video transformer, got {unknown}")
    for key, allowed in _FIXED.items():
        if values.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{key}: expected {' or '.join(map(repr, allowed))}, got {values[key]!r}")
    sizes = {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
    missing = sorted(theirs for theirs, ours in names.items() if ours in _NEEDED and theirs not in values)
    if missing:
        raise ConfigError(f"config: expected the keys {sorted(names)}, {missing} missing")
    patch = values.get("patch_size", (1, 2, 2))
    if not isinstance(patch, (list, tuple)) or len(patch) != 3 or patch[0] != 1 or patch[1] != patch[2]:
        raise ConfigError(f"patch_size: expected [1, p, p], got {patch!r}")
    channels = sizes["channels"]
    for key in ("out_channels", "out_dim"):
        if values.get(key) not in (None, channels):
            raise ConfigError(f"{key}: expected {channels}, as many as come in (text-to-video), got {values[key]!r}")
    if "dim" in values and "num_heads" in values:
        dim, heads = values["dim"], values["num_heads"]
        if not isinstance(dim, int) or not isinstance(heads, int) or heads < 1 or dim % heads:
            raise ConfigError(f"dim: expected a multiple of num_heads {heads!r}, got {dim!r}")
        sizes["attention_head_dim"] = dim // heads
    return _sized(patch=patch[1], **sizes)


_NEEDED = {"num_layers", "num_attention_heads", "ffn_dim", "channels"}


def _sized(channels: int, **sizes: Any) -> WanConfig:
    """Build a config whose latents have the size that goes with the VAE of that many channels."""
    if channels == 48:
        sizes = {"latent_height": 44, "latent_width": 80, **sizes}
    return WanConfig(channels=channels, **sizes)
