"""The public functions: validate, choose an implementation, call the op.

B rows of the call, L ring lanes, H query heads, Hkv key/value heads, N new tokens, S ring slots, D head dim.
Every function takes tensors of any strides, so [B, N, H, D] tensors pass as `.transpose(1, 2)` without a copy
(the elements of a row should be adjacent; rings must have them adjacent).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops as ops
from .choice import MAX_HEAD_DIM, resolve
from .pattern import BlockWindow

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def block_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockWindow,
    *,
    q_sink: Tensor | None = None,
    sm_scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute softmax(q k^T * sm_scale) v over the keys that `pattern` lets each query see. Differentiable, once.

    Inputs are expected to be finite: the Triton kernels may process rows of neighbouring blocks in one tile, and a NaN
    in a key that one of them sees then reaches all of them (0 x NaN).

    Args:
        q: [B, H, N, D]; fp16, bf16, fp32 (or fp64 on a CPU); D a multiple of 8 up to 256.
        k, v: [B, Hkv, N, D], where Hkv divides H; query head h reads key/value head h // (H // Hkv).
        pattern: who sees whom, in tokens.
        q_sink: like q, takes the place of q in the scores of keys below `pattern.sink`, also of those that still lie in
            the window; both kinds of scores share one softmax. Queries rotated for another position let the sinks
            stay at a bounded relative distance. Differentiable.
        sm_scale: factor on the scores, 1/sqrt(D) by default.
        return_lse: also return the natural log-sum-exp of the scaled scores; no gradient flows through it.
        impl: "auto", or "hopper", "triton" or "sdpa", which run or raise.
        deterministic: False lets "hopper" add up dq in an order that differs from run to run (in float32), where that
            is faster; every other gradient is the same, bit for bit, from run to run. torch's own
            `use_deterministic_algorithms(True)` overrules False.

    Returns:
        out [B, H, N, D] with the dtype and layout of q; with `return_lse` also lse [B, H, N] in float32.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check_pattern(pattern)
    _check_qkv(q, k, v)
    _check_q_sink(q_sink, q, pattern.sink, "pattern.sink")
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic: expected a bool, got {type(deterministic).__name__}")
    name = resolve(impl, q, "forward")
    out, lse = torch.ops.swba.forward(
        q, k, v, q_sink, _scale(sm_scale, q),
        *pattern.sizes, name, return_lse, deterministic,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attention(q: Tensor, k: Tensor, v: Tensor, bs: int, ws: int, sm_scale: float) -> Tensor:
    """Compute sliding-window block attention with the signature of the project this one grew from.

    Under torch.compile `bs` and `ws` are Python ints like others: one that changes costs a recompilation, once, unless
    `dynamic=True`. `block_window_attention` with a `BlockWindow` does without.

    Args:
        q, k, v: [B, NH, N, DH]; N need not be a multiple of `bs`: a short last block sees the last ws * bs tokens.
        bs: tokens of a block.
        ws: blocks of the window; block i sees blocks i - ws + 1 .. i.
        sm_scale: factor on the scores.

    Returns:
        out [B, NH, N, DH]. Differentiable.
    """
    out = block_window_attention(q, k, v, BlockWindow.from_blocks(bs, ws), sm_scale=sm_scale)
    assert isinstance(out, Tensor)
    return out


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockWindow,
    k_ring: Tensor,
    v_ring: Tensor,
    position: Tensor,
    *,
    q_sink: Tensor | None = None,
    lanes: Tensor | None = None,
    sm_scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from new tokens to themselves and to the history in a ring, which is only read.

    Token i of row b has absolute position position[b] + i. The block grid starts at the call's own first token;
    window and sinks count in absolute positions.

    Args:
        q: [B, H, N, D], any N >= 1.
        k, v: [B, Hkv, N, D], the call's own keys and values.
        pattern: who sees whom.
        k_ring, v_ring: [L, Hkv, S, D] with S >= pattern.sink + pattern.window, as `ring_write` with the pattern's
            sink filled them.
        position: int64 [B], tokens of each row's history.
        q_sink: as in `block_window_attention`; sinks count from the start of the stream.
        lanes: int64 [B], the ring lane of each row; None where row b reads lane b.
        sm_scale, return_lse, impl: as in `block_window_attention`.

    Returns:
        As `block_window_attention`; not differentiable. A row's bits depend on its own numbers, on the GPU, and on the
        shapes but for the number of rows, where that is at most the rings' number of lanes.

    Raises:
        TypeError, ValueError: an argument is not as described. Values on a GPU (position, lanes) are not checked.
    """
    _check_pattern(pattern)
    _check_qkv(q, k, v)
    _check_q_sink(q_sink, q, pattern.sink, "pattern.sink")
    _check_rings(k_ring, v_ring, q, k.shape[1])
    _check_rows("position", position, q)
    _check_lanes(lanes, q, k_ring)
    if k_ring.shape[2] < pattern.sink + pattern.window:
        raise ValueError(
            f"k_ring: expected at least sink + window = {pattern.sink + pattern.window} slots, got {k_ring.shape[2]}"
        )
    name = resolve(impl, q, "prefill")
    out, lse = torch.ops.swba.prefill(
        q.detach(), k.detach(), v.detach(), _detached(q_sink), k_ring.detach(), v_ring.detach(), position, lanes,
        _scale(sm_scale, q), *pattern.sizes, name, return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def window_decode_attention(
    q: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    valid: Tensor,
    *,
    q_sink: Tensor | None = None,
    sink: int = 0,
    lanes: Tensor | None = None,
    sm_scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every query of a block to the first valid[b] slots of its ring lane.

    Args:
        q: [B, H, N, D] with N <= S.
        k_ring, v_ring: [L, Hkv, S, D].
        valid: int64 [B] from 1 to S, read on the device.
        q_sink: like q, takes the place of q in the scores of the first `sink` slots; see `block_window_attention`.
        sink: number of leading slots that q_sink reads, from 1 to S with q_sink and 0 without.
        lanes: int64 [B], the ring lane of each row; None where row b reads lane b.
        sm_scale, return_lse, impl: as in `block_window_attention`.

    Returns:
        As `block_window_attention`; not differentiable.

    Raises:
        TypeError, ValueError: an argument is not as described. Values on a GPU (valid, lanes) are not checked.
    """
    _check_tensor("q", q)
    _check_rings(k_ring, v_ring, q, None)
    _check_int("sink", sink)
    _check_q_sink(q_sink, q, sink, "sink")
    if not 0 <= sink <= (0 if q_sink is None else k_ring.shape[2]):
        expected = "0 without q_sink" if q_sink is None else f"from 1 to {k_ring.shape[2]} (the slots of the ring)"
        raise ValueError(f"sink: expected {expected}, got {sink}")
    _check_rows("valid", valid, q)
    _check_lanes(lanes, q, k_ring)
    if q.shape[2] > k_ring.shape[2]:
        raise ValueError(f"q: expected at most {k_ring.shape[2]} tokens (the slots of the ring), got {q.shape[2]}")
    name = resolve(impl, q, "decode")
    out, lse = torch.ops.swba.decode(
        q.detach(), k_ring.detach(), v_ring.detach(), _detached(q_sink), valid, lanes, sink, _scale(sm_scale, q),
        name, return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def ring_write(
    k_ring: Tensor,
    v_ring: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    *,
    sink: int = 0,
    lanes: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Write new keys and values into their ring slots, in place.

    The token at absolute position p = position[b] + i goes to slot p if p < sink,
    else to slot sink + (p - sink) % (S - sink).
    Of a call longer than S - sink only the tokens that survive it are written, so each slot is written once.

    Args:
        k_ring, v_ring: [L, Hkv, S, D].
        k, v: [B, Hkv, N, D].
        position: int64 [B], tokens of each row before the call.
        sink: leading slots that are kept for ever, less than S.
        lanes: int64 [B] without repeats, the ring lane of each row; None where row b writes lane b.
        impl: "auto", or "hopper" (the same copy as "triton"), "triton" or "sdpa", which run or raise.

    Raises:
        TypeError, ValueError: an argument is not as described. Values on a GPU (position, lanes) are not checked.
    """
    _check_tensor("k", k)
    _check_same("v", v, "k", k)
    _check_rings(k_ring, v_ring, k, k.shape[1])
    _check_rows("position", position, k)
    _check_lanes(lanes, k, k_ring)
    _check_int("sink", sink)
    if not 0 <= sink < k_ring.shape[2]:
        raise ValueError(f"sink: expected 0 <= sink < {k_ring.shape[2]} (the slots of the ring), got {sink}")
    if k_ring.requires_grad or v_ring.requires_grad:
        raise ValueError("k_ring, v_ring: expected tensors that do not require grad, they are written in place")
    name = resolve(impl, k, "ring_write")
    torch.ops.swba.ring_write(k_ring, v_ring, k.detach(), v.detach(), position, lanes, sink, name)


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions [B, H, N, D], got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: expected a tensor on cpu or cuda, got {x.device}")
    if x.shape[0] < 1 or x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f"{name}: expected at least one row, head and token, got shape {tuple(x.shape)}")
    if x.shape[3] < 8 or x.shape[3] > MAX_HEAD_DIM or x.shape[3] % 8 != 0:
        raise ValueError(f"{name}: expected a head dim that is a multiple of 8 up to {MAX_HEAD_DIM}, got {x.shape[3]}")


def _check_like(name: str, x: Tensor, other: str, y: Tensor) -> None:
    _check_tensor(name, x)
    if x.dtype != y.dtype:
        raise ValueError(f"{name}: expected the dtype of {other} ({y.dtype}), got {x.dtype}")
    if x.device != y.device:
        raise ValueError(f"{name}: expected the device of {other} ({y.device}), got {x.device}")
    if x.shape[3] != y.shape[3]:
        raise ValueError(f"{name}: expected the head dim of {other} ({y.shape[3]}), got {x.shape[3]}")


def _check_same(name: str, x: Tensor, other: str, y: Tensor) -> None:
    _check_like(name, x, other, y)
    if x.shape != y.shape:
        raise ValueError(f"{name}: expected the shape of {other} {tuple(y.shape)}, got {tuple(x.shape)}")


def _check_q_sink(q_sink: Tensor | None, q: Tensor, sink: int, where: str) -> None:
    if q_sink is None:
        return
    _check_same("q_sink", q_sink, "q", q)
    if sink < 1:
        raise ValueError(f"q_sink: expected None where {where} is {sink}, got a tensor")


def _check_heads(name: str, x: Tensor, q: Tensor) -> None:
    if q.shape[1] % x.shape[1] != 0:
        raise ValueError(f"{name}: expected heads that divide the {q.shape[1]} heads of q, got {x.shape[1]}")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    _check_tensor("q", q)
    _check_like("k", k, "q", q)
    _check_heads("k", k, q)
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"k: expected {q.shape[0]} rows of {q.shape[2]} tokens as in q, got {k.shape[0]} of {k.shape[2]}"
        )
    _check_same("v", v, "k", k)


def _check_rings(k_ring: Tensor, v_ring: Tensor, x: Tensor, kv_heads: int | None) -> None:
    _check_like("k_ring", k_ring, "q" if kv_heads is None else "k", x)
    _check_same("v_ring", v_ring, "k_ring", k_ring)
    if kv_heads is None:
        _check_heads("k_ring", k_ring, x)
    elif k_ring.shape[1] != kv_heads:
        raise ValueError(f"k_ring: expected the {kv_heads} heads of k, got {k_ring.shape[1]}")
    if k_ring.stride(3) != 1 or v_ring.stride(3) != 1:
        raise ValueError("k_ring, v_ring: expected adjacent elements along the head dim (stride 1)")


def _check_rows(name: str, x: Tensor, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected an int64 tensor, got {type(x).__name__}")
    if x.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64, got {x.dtype}")
    if x.dim() != 1 or x.shape[0] != q.shape[0]:
        raise ValueError(f"{name}: expected shape ({q.shape[0]},), one number a row, got {tuple(x.shape)}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected a tensor on {q.device}, got {x.device}")


def _check_lanes(lanes: Tensor | None, q: Tensor, k_ring: Tensor) -> None:
    if lanes is not None:
        _check_rows("lanes", lanes, q)
    elif k_ring.shape[0] < q.shape[0]:
        raise ValueError(f"k_ring: expected at least {q.shape[0]} lanes (lanes=None), got {k_ring.shape[0]}")


def _check_pattern(pattern: BlockWindow) -> None:
    if not isinstance(pattern, BlockWindow):
        raise TypeError(f"pattern: expected a BlockWindow, got {type(pattern).__name__}")


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _scale(sm_scale: float | None, q: Tensor) -> float:
    if sm_scale is None:
        return q.shape[3] ** -0.5
    if isinstance(sm_scale, bool) or not isinstance(sm_scale, (int, float)):
        raise TypeError(f"sm_scale: expected a float, got {type(sm_scale).__name__}")
    if not math.isfinite(sm_scale):
        raise ValueError(f"sm_scale: expected a finite number, got {sm_scale}")
    return float(sm_scale)
