"""What the tensors of a Wan transformer are called: by diffusers, by Wan's own code, and inside training wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import CheckpointError

_BLOCK = re.compile(r"(blocks\.\d+)\.(.+)")

# Module paths, diffusers' on the left. Its norm2 is Wan's norm3: the one before cross-attention.
_OUTER = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "proj_out": "head.head",
}
_INNER = {
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    **{
        f"{ours}.{part}": f"{theirs}.{name}"
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for part, name in (
            ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"), ("norm_q", "norm_q"), ("norm_k", "norm_k")
        )
    },
}  # fmt: skip

_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
_HOLDERS = {"model", "net", "module", "generator", "transformer", "diffusion_model"}


def official_name(name: str) -> str:
    """Return what Wan's own code calls a tensor, given diffusers' name."""
    block = _BLOCK.fullmatch(name)
    if block is not None:
        return f"{block[1]}.{_official_path(block[2], _INNER, 'modulation')}"
    return _official_path(name, _OUTER, "head.modulation")


def strip_wrappers(name: str) -> str:
    """Remove what wrappers add to a tensor's name: `model._fsdp_wrapped_module.blocks.0...` to `blocks.0...`."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _HOLDERS:
        del parts[0]
    return ".".join(parts)


def stripped_names(names: Iterable[str]) -> dict[str, str]:
    """Return the stored name of each stripped one; raise CheckpointError where two become the same."""
    stored: dict[str, str] = {}
    for name in names:
        short = strip_wrappers(name)
        if short in stored:
            raise CheckpointError(f"checkpoint: tensors {stored[short]!r} and {name!r} are both {short!r}")
        stored[short] = name
    return stored


def match_names(expected: Iterable[str], stored: dict[str, str]) -> dict[str, str]:
    """Return the stored name of every expected tensor.

    Args:
        expected: names of the model, diffusers'.
        stored: what `stripped_names` returns; in diffusers' or Wan's own names, never both.

    Raises:
        CheckpointError: tensors are missing or left over; they are named as the checkpoint would name them.
    """
    ours = {name: name for name in expected}
    theirs = {name: official_name(name) for name in ours}
    wanted = max((ours, theirs), key=lambda names: len(set(names.values()) & set(stored)))
    missing = sorted(set(wanted.values()) - set(stored))
    extra = sorted(stored[name] for name in set(stored) - set(wanted.values()))
    if missing or extra:
        raise CheckpointError(f"checkpoint: missing tensors {_some(missing)}, extra tensors {_some(extra)}")
    return {name: stored[other] for name, other in wanted.items()}


def _official_path(name: str, paths: dict[str, str], modulation: str) -> str:
    if name == "scale_shift_table":
        return modulation
    path, _, kind = name.rpartition(".")
    return f"{paths.get(path, path)}.{kind}"


def _some(names: list[str]) -> str:
    return str(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
