"""The portable forward and backward kernels as ahead-of-time cases."""

from __future__ import annotations

import re

from aot import Case, matches

from swba_kernels.portable import backward, forward
from swba_kernels.portable.tiles import Tile, padded_head_dim

_NUMBERS = "(n|heads|kv_heads|block_size|window|sink|grid_start|group|per_group|tiles|ring_window)"

_OF_Q_SINK = "p_d?q_sink|s_d?s[bhn]"


def _types(kernel, dtype: str, **special: str) -> dict[str, str]:
    names = kernel.arg_names
    types = matches(names, "p_.*", f"*{dtype}") | matches(names, "s_[a-z]+", "i32")
    types |= matches(names, _NUMBERS, "i32")
    types |= matches(names, "scale2?", "fp32") | matches(names, "p_(lse|terms)", "*fp32")
    return types | special


def _constants(head_dim: int, tile: Tile, group: int) -> dict[str, object]:
    return {
        "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": padded_head_dim(head_dim), "UNIT": 8,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.stages,
    }  # fmt: skip


def without(types: dict[str, str], pattern: str) -> dict[str, None]:
    """Take the arguments whose names match `pattern` out of `types` and return them as constants that are None."""
    names = [x for x in types if re.fullmatch(pattern, x)]
    for name in names:
        del types[name]
    return dict.fromkeys(names)


def forward_case(
    head_dim: int, dtype: str, tile: Tile, ring: bool = False, group: int = 1, q_sink: bool = False
) -> Case:
    """Return the forward kernel, on top of a ring with lanes if `ring`, with a second query if `q_sink`."""
    types = _types(forward._forward, dtype, p_position="*i64", p_lanes="*i64")
    constants = _constants(head_dim, tile, group) | {"HAS_RING": ring, "HAS_LANES": ring, "HAS_Q_SINK": q_sink}
    if not ring:
        constants |= without(types, "p_(position|lanes)")
    if not q_sink:
        constants |= without(types, _OF_Q_SINK)
    name = f"forward D{head_dim} {dtype} {tuple(tile)} ring={ring} q_sink={q_sink}"
    return Case(name, forward._forward, types, constants, tile.warps, tile.stages)


def gradient_case(kernel: str, head_dim: int, dtype: str, tile: Tile, group: int = 1, q_sink: bool = False) -> Case:
    """Return the "dkv" or the "dq" kernel, with a second query if `q_sink`."""
    function = {"dkv": backward._dkv, "dq": backward._dq}[kernel]
    types = _types(function, dtype)
    constants = _constants(head_dim, tile, group) | {"HAS_Q_SINK": q_sink}
    if not q_sink:
        constants |= without(types, _OF_Q_SINK)
    name = f"{kernel} D{head_dim} {dtype} {tuple(tile)} q_sink={q_sink}"
    return Case(name, function, types, constants, tile.warps, tile.stages)


def row_terms_case(head_dim: int, dtype: str) -> Case:
    """Return the kernel in front of both gradient kernels."""
    constants = _constants(head_dim, Tile(32, 32, 4, 1), 1)
    constants = {x: constants[x] for x in ("HEAD_DIM", "BLOCK_D", "BLOCK_M", "UNIT")}
    return Case(f"row_terms D{head_dim} {dtype}", backward._row_terms, _types(backward._row_terms, dtype), constants)
