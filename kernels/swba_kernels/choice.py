"""Which implementation runs, and why.

The choice is made in two steps. What depends on the device, the dtype and the installation is decided here; it holds
for all calls, so a compiled graph may keep it as a constant. On Hopper the answer of "auto" is `HOPPER_OR_TRITON`:
whether a call's head dim, strides, addresses and block size suit the Hopper kernels is decided by the custom op as it
runs, where they are plain numbers. Asked here, sizes would become guards of compiled graphs, and addresses could not be
asked at all.
"""

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
_NAMES = ("auto", "hopper", "triton", "sdpa")
HOPPER_OR_TRITON = "hopper-or-triton"


class Choice(NamedTuple):
    """An implementation ("hopper", "triton" or "sdpa") and the reason it was chosen."""

    name: str
    reason: str


def choose_impl(device: torch.device | str, dtype: torch.dtype, head_dim: int, op: str) -> Choice:
    """Return what `impl="auto"` runs for a device, dtype and head dim; logged once at DEBUG per decision.

    Args:
        head_dim: a multiple of 8 up to 256.
        op: "forward" (and its gradient), "prefill", "decode" or "ring_write".

    Where the answer is "hopper", a call with strides or addresses that TMA cannot read, or with blocks too small to be
    faster there, still runs the portable kernels ("triton").
    """
    if head_dim < 8 or head_dim > MAX_HEAD_DIM or head_dim % 8 != 0:
        raise ValueError(f"head_dim: expected a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}")
    if op not in _OPS:
        raise ValueError(f"op: expected one of {', '.join(_OPS)}, got {op!r}")
    where = torch.device(device)
    choice = _choose(where.type, where.index, dtype, op)
    if choice.name != HOPPER_OR_TRITON:
        return choice
    from .hopper.supports import static_obstacle

    obstacle = static_obstacle(dtype, head_dim)
    if obstacle:
        return Choice("triton", f"Triton kernels serve {torch.cuda.get_device_name(where.index)}; Hopper's: {obstacle}")
    return Choice("hopper", choice.reason)


@cache
def _choose(device: str, index: int | None, dtype: torch.dtype, op: str) -> Choice:
    triton = _triton_obstacle(device, index, dtype)
    if device == "cpu":
        choice = Choice("sdpa", "tensors on a CPU")
    elif triton:
        choice = Choice("sdpa", f"no Triton kernels here: {triton}")
    elif op == "ring_write":
        choice = Choice("triton", f"a copy; Triton kernels serve {torch.cuda.get_device_name(index)}")
    else:
        hopper, gpu = _hopper_obstacle(device, index, dtype), torch.cuda.get_device_name(index)
        if hopper:
            choice = Choice("triton", f"Triton kernels serve {gpu}; Hopper's do not: {hopper}")
        else:
            choice = Choice(HOPPER_OR_TRITON, f"Hopper kernels serve {gpu}")
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


def _hopper_obstacle(device: str, index: int | None, dtype: torch.dtype) -> str | None:
    """Tell what keeps the Hopper kernels from running on any tensors of a dtype, None if nothing does."""
    if device != "cuda":
        return f"tensors on a {device.upper()}"
    obstacle = _triton_obstacle(device, index, dtype)
    if obstacle:
        return obstacle
    from .hopper.supports import CAPABILITY, DTYPES, build_obstacle

    capability = torch.cuda.get_device_capability(index)
    if capability != CAPABILITY:
        return "compute capability {}.{} is not 9.0".format(*capability)
    return build_obstacle() if dtype in DTYPES else f"{str(dtype).removeprefix('torch.')} (needs float16 or bfloat16)"


def _resolve(impl: str, device: str, index: int | None, dtype: torch.dtype, op: str) -> str:
    if impl == "auto":
        return _choose(device, index, dtype, op).name
    if impl not in _NAMES:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, _NAMES))}, got {impl!r}")
    obstacle = {"hopper": _hopper_obstacle, "triton": _triton_obstacle}.get(impl, lambda *_: None)(device, index, dtype)
    if obstacle:
        raise ValueError(_cannot_run(impl, obstacle))
    return "triton" if (impl, op) == ("hopper", "ring_write") else impl


# What torch.compiler.assume_constant_result sets; calling it here would import the whole compiler (a second).
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(impl: str, x: Tensor, op: str) -> str:
    """Return what `op` runs on x [B, H, N, D]: the implementation asked for by name, or the chosen one.

    "auto" may resolve to `HOPPER_OR_TRITON`. The ring write of "hopper" is the portable one, which is a mere copy.

    Raises:
        ValueError: `impl` is unknown or cannot run.
    """
    return _resolve(impl, x.device.type, x.device.index, x.dtype, op)


def check_served(impl: str, x: Tensor, op: str) -> None:
    """Raise ValueError unless `impl` can serve the device, dtype and head dim of x [B, H, N, D]."""
    if resolve(impl, x, op) == "hopper":
        from .hopper.supports import static_obstacle

        obstacle = static_obstacle(x.dtype, x.shape[-1])
        if obstacle:
            raise ValueError(_cannot_run(impl, obstacle))


def _cannot_run(impl: str, obstacle: str) -> str:
    return f"impl: expected an implementation that can run here, got {impl!r}: {obstacle}"
