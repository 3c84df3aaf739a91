"""What the Hopper kernels serve: every function says, in words, what stands in the way, or None.

B batch or lanes, H heads, N tokens, D head dim.

Two questions, asked at two times. `build_obstacle` depends on the installation alone, so it is asked once, when an
implementation is chosen (inside a compiled graph: while it is traced). `obstacle` looks at one call's tensors,
addresses included, so it is asked by the custom op as it runs; no size becomes a guard of a compiled graph.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

HEAD_DIMS = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)
TOO_MANY_TOKENS = 1 << 24  # of twice as many, the fractions that the decode computes no longer fit 32 bits
CAPABILITY = (9, 0)

# Gluon is experimental and changes with every release: these were compiled ahead of time, 3.6 also ran.
OLDEST, NEWEST = (3, 6), (3, 9)

# The fewest tokens of a block for which "auto" takes these kernels, by head dim. A short block pads a tile, while the
# portable kernels pack several blocks into one. (Two kernels do not mind: the forward at head dim 64 without sinks,
# and the fused backward, whose tiles of keys meet ranges of queries.) On an H200 (bf16, blocks of 64 tokens), before
# tiles of a forward could straddle blocks (from 64 tokens on, not on a ring or with queries of their own for sinks;
# with sinks not measured again), other forwards ran at 293 TFLOP/s against 350 with head dim 64, at 390 against 378
# with 128, and the backward with 128 at 383 against 283. With head dim 64 and blocks of 8 to 48 tokens the fused
# backward ran at 338 to 356 against 252 to 267. Decode is bound by the bytes of the ring, whatever the block.
SMALLEST_BLOCK = {
    "forward": {64: 1, 128: 64},
    "forward with sinks": {64: 96, 128: 64},
    "prefill": {64: 96, 128: 64},
    "backward": {64: 64, 128: 64},
    "fused backward": {64: 1, 128: 64},
    "decode": {64: 1, 128: 1},
}


# The fewest programs, in times as many as a GPU runs at once, that add to dq in turn: those of the first wave start one
# after the other.
FEWEST_WAVES = 3


@cache
def build_obstacle() -> str | None:
    """Tell what keeps the installed Triton from building the Gluon sources."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    version = tuple(int(x) for x in triton.__version__.split(".")[:2])
    if not OLDEST <= version <= NEWEST:
        tried = " to ".join(".".join(map(str, x)) for x in (OLDEST, NEWEST))
        return f"Gluon changes between releases and was tried with triton {tried}, not with {triton.__version__}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "Gluon has no interpreter (TRITON_INTERPRET=1)"
    return None


def static_obstacle(dtype: torch.dtype, head_dim: int) -> str | None:
    """Tell what keeps these kernels from a dtype and head dim."""
    if dtype not in DTYPES:
        return f"{str(dtype).removeprefix('torch.')} (needs float16 or bfloat16)"
    if head_dim not in HEAD_DIMS:
        return f"head dim {head_dim} (needs 64 or 128)"
    return None


def obstacle(*tensors: Tensor) -> str | None:
    """Tell what keeps these kernels from reading `tensors`, each [B, H, N, D], by TMA."""
    found = static_obstacle(tensors[0].dtype, tensors[0].shape[-1])
    if found:
        return found
    for x in tensors:
        if x.shape[2] >= TOO_MANY_TOKENS:
            return f"{x.shape[2]} tokens or slots (need fewer than {TOO_MANY_TOKENS})"
        if x.data_ptr() % 16:
            return "a tensor whose first element is not aligned to 16 bytes"
        if not tma_strides(x):
            return f"strides {x.stride()} (need positive multiples of 8 elements, and 1 in the head dim)"
    return None


def tma_strides(x: Tensor) -> bool:
    """Tell whether the strides of x [B, H, N, D] fit a TMA descriptor; those of dimensions of size 1 do not matter."""
    *outer, inner = zip(x.shape, x.stride(), strict=True)
    return inner[1] == 1 and all(size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in outer)


def small_block(op: str, head_dim: int, block_size: int) -> str | None:
    """Tell why "auto" leaves blocks of `block_size` tokens to the portable kernels."""
    least = SMALLEST_BLOCK[op][head_dim]
    return f"blocks of {block_size} tokens (faster from {least})" if block_size < least else None


def sees_all(n: int, window: int, sink: int, q_sink: Tensor | None) -> bool:
    """Tell whether each of `n` tokens sees all up to the end of its block, and none of them by another query."""
    return q_sink is None and window + sink >= n


def kind_of_forward(n: int, window: int, sink: int, q_sink: Tensor | None) -> str:
    """Return the name that `SMALLEST_BLOCK` has for a forward: without sinks, or with some that count as such."""
    return "forward" if sink == 0 or sees_all(n, window, sink, q_sink) else "forward with sinks"


def waves_of_backward(q: Tensor, k: Tensor) -> float:
    """Return how many times as many programs of the fused backward a call with q, k [B, H, N, D] has as run at once."""
    from .launch import multiprocessors

    return -(-q.shape[2] // 128) * q.shape[0] * k.shape[1] / multiprocessors(q.device)


def kind_of_backward(q: Tensor, k: Tensor, deterministic: bool) -> str:
    """Return the name that `SMALLEST_BLOCK` has for a backward: of one fused kernel, or of several."""
    return "fused backward" if not deterministic or waves_of_backward(q, k) >= FEWEST_WAVES else "backward"
