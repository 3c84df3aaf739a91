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


class TorchDecode(NamedTuple):
    """Where cuDNN's attention, through torch, was measured faster than the kernel here for a full ring.

    Attributes:
        gpu: a part of the device name.
        head_dim: head dim.
        tiles: query tiles of 128 tokens, of all heads and rows, for each multiprocessor; at least.
        slots: slots of the ring; at least.
    """

    gpu: str
    head_dim: int
    tiles: float
    slots: int


# Each line is the smallest measured shape that cuDNN won (bf16, CUDA graph replay, cuDNN 9.19); of those it lost, the
# nearest have 1.2 tiles a multiprocessor with head dim 128 and 0.25 with head dim 64.
_TORCH_DECODE = (
    TorchDecode("NVIDIA H200", 128, 3.3, 32760),  # 12 heads, 4680 tokens: 1.87 ms against 1.97; 40 heads: 5.45, 6.69
    TorchDecode("NVIDIA H200", 64, 1.9, 4096),  # 8 rows, 16 heads, 256 tokens: 80 us against 93
)
_CUDNN = 91900  # the version that was measured; older ones are not used


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


def prefers_torch_decode(
    device: torch.device, dtype: torch.dtype, *, rows: int, heads: int, tokens: int, slots: int, head_dim: int,
    impl: str = "auto",
) -> bool:  # fmt: skip
    """Tell whether `window_decode_attention(..., full=True)` runs torch's cuDNN attention for these sizes.

    It does so only for as many key/value heads as query heads, without `lanes` and without `return_lse`.
    Callers that capture graphs ask, since a graph captured with full=True serves full rings only.
    """
    if impl != "auto" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if _resolve(impl, device.type, device.index, dtype, "decode") != "triton":
        return False
    name, multiprocessors, cudnn = _gpu(device.index)
    tiles = -(-tokens // 128) * heads * rows
    return cudnn >= _CUDNN and any(
        at.gpu in name and at.head_dim == head_dim and tiles >= at.tiles * multiprocessors and slots >= at.slots
        for at in _TORCH_DECODE
    )


def _gpu(index: int | None) -> tuple[str, int, int]:
    """Return the name and multiprocessors of a GPU, and the version of cuDNN, 0 if it is missing or turned off."""
    properties = torch.cuda.get_device_properties(index)
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.enabled else None
    return properties.name, properties.multi_processor_count, cudnn or 0


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
_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve(impl: str, x: Tensor, op: str) -> str:
    """Return the implementation that `op` runs on x [B, H, N, D]: the one asked for by name, or the chosen one.

    Raises:
        ValueError: `impl` is unknown or cannot run.
    """
    return _resolve(impl, x.device.type, x.device.index, x.dtype, op)
