"""Which implementation runs, and why."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_LOG = logging.getLogger("swba_kernels")
MAX_HEAD_DIM = 256
_OPS = ("forward", "prefill", "decode", "ring_write")

# GPUs (a part of the device name) on which torch's own attention is faster for a full ring, as measured: name ->
# smallest number of query tokens from which it is used.
_TORCH_DECODE: dict[str, int] = {}


class Choice(NamedTuple):
    """An implementation ("triton" or "sdpa") and the reason it was chosen."""

    name: str
    reason: str


def choose_impl(device: torch.device | str, dtype: torch.dtype, head_dim: int, op: str) -> Choice:
    """Return what `impl="auto"` runs for a device, dtype and head dim; logged once at DEBUG per decision.

    Args:
        head_dim: a multiple of 8 up to 256; both implementations serve them all.
        op: "forward" (and its gradient), "prefill", "decode" or "ring_write".
    """
    if head_dim < 8 or head_dim > MAX_HEAD_DIM or head_dim % 8 != 0:
        raise ValueError(f"head_dim: expected a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}")
    if op not in _OPS:
        raise ValueError(f"op: expected one of {', '.join(_OPS)}, got {op!r}")
    where = torch.device(device)
    return _choose(where.type, where.index, dtype, op)


@cache
def _choose(device: str, index: int | None, dtype: torch.dtype, op: str) -> Choice:
    obstacle = _triton_obstacle(device, index, dtype)
    if device == "cpu":
        choice = Choice("sdpa", "tensors on a CPU")
    elif obstacle:
        choice = Choice("sdpa", f"no Triton kernels here: {obstacle}")
    else:
        choice = Choice("triton", f"Triton kernels serve {torch.cuda.get_device_name(index)}")
    _LOG.debug("%s on %s, %s: %s (%s)", op, device, dtype, choice.name, choice.reason)
    return choice


def _triton_obstacle(device: str, index: int | None, dtype: torch.dtype) -> str | None:
    """Tell what keeps the Triton kernels from running, None if nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "tensors on a CPU (needs TRITON_INTERPRET=1)"
    if dtype == torch.float64:
        return "float64"
    if device == "cuda":
        if torch.version.hip:
            return "a ROCm device"
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            return f"compute capability {major}.{minor} is below 8.0"
    return None


def _prefers_torch(index: int | None, tokens: int) -> bool:
    """Tell whether torch's own attention was measured faster for a full ring on this GPU."""
    name = torch.cuda.get_device_name(index)
    return any(part in name and tokens >= least for part, least in _TORCH_DECODE.items())


def _resolve(impl: str, device: str, index: int | None, dtype: torch.dtype, op: str) -> str:
    if impl == "auto":
        return _choose(device, index, dtype, op).name
    if impl not in ("triton", "sdpa"):
        raise ValueError(f"impl: expected 'auto', 'triton' or 'sdpa', got {impl!r}")
    obstacle = _triton_obstacle(device, index, dtype) if impl == "triton" else None
    if obstacle:
        raise ValueError(f"impl: expected an implementation that can run here, got 'triton': {obstacle}")
    return impl


# What torch.compiler.assume_constant_result sets; calling it here would import the whole compiler (a second).
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(impl: str, x: Tensor, op: str, *, full: bool = False) -> str:
    """Return the implementation that `op` runs on x [B, H, N, D]: the one asked for by name, or the chosen one.

    Raises:
        ValueError: `impl` is unknown or cannot run.
    """
    name = _resolve(impl, x.device.type, x.device.index, x.dtype, op)
    if full and impl == "auto" and name == "triton" and _TORCH_DECODE and _prefers_torch(x.device.index, x.shape[2]):
        return "sdpa"
    return name
