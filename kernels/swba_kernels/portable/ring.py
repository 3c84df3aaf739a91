"""Ring write: the keys and values of new tokens into their slots, wrap-around included, in one launch.

B rows of the call, L ring lanes, Hkv key/value heads, N new tokens, S ring slots, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .tiles import padded_head_dim


@triton.jit(do_not_specialize=["n", "tiles", "sink", "window"])
def _ring_write_kernel(
    p_k_ring,
    p_v_ring,
    p_k,
    p_v,
    p_position,
    p_lanes,
    kv_heads,
    n,
    tiles,
    sink,
    window,
    stride_rkb,
    stride_rkh,
    stride_rkn,
    stride_rkd,
    stride_rvb,
    stride_rvh,
    stride_rvn,
    stride_rvd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_position,
    stride_lanes,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LANES: tl.constexpr,
):
    """Own BLOCK_N new tokens of one (row, key/value head); no two programs write the same slot.

    Tokens that a later one of the same call would overwrite are skipped.
    """
    pid = tl.program_id(0)
    i_tile = pid % tiles
    i_h = (pid // tiles % kv_heads).to(tl.int64)
    i_b = (pid // tiles // kv_heads).to(tl.int64)
    position = tl.load(p_position + i_b * stride_position)
    lane = i_b
    if HAS_LANES:
        lane = tl.load(p_lanes + i_b * stride_lanes)

    i_n = (i_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    token = position + i_n
    slot = tl.where(token < sink, token, sink + (token - sink) % window)
    survives = (i_n < n) & ((token < sink) | (i_n >= n - window))
    i_d = tl.arange(0, BLOCK_D).to(tl.int64)
    keep = survives[:, None] & (i_d < D)[None, :]

    source_k = p_k + i_b * stride_kb + i_h * stride_kh
    source_v = p_v + i_b * stride_vb + i_h * stride_vh
    ring_k = p_k_ring + lane * stride_rkb + i_h * stride_rkh
    ring_v = p_v_ring + lane * stride_rvb + i_h * stride_rvh
    k = tl.load(source_k + i_n[:, None] * stride_kn + i_d[None, :] * stride_kd, mask=keep)
    v = tl.load(source_v + i_n[:, None] * stride_vn + i_d[None, :] * stride_vd, mask=keep)
    tl.store(ring_k + slot[:, None] * stride_rkn + i_d[None, :] * stride_rkd, k, mask=keep)
    tl.store(ring_v + slot[:, None] * stride_rvn + i_d[None, :] * stride_rvd, v, mask=keep)


def ring_write(
    k_ring: Tensor, v_ring: Tensor, k: Tensor, v: Tensor, position: Tensor, lanes: Tensor | None, *, sink: int
) -> None:
    """Write token position[b] + i of row b into its slot of ring lane lanes[b], for each token that survives the call.

    Args:
        k_ring, v_ring: [L, Hkv, S, D], written in place.
        k, v: [B, Hkv, N, D].
        position: [B] int64, tokens before the call.
        lanes: [B] int64 without repeats, or None where row b writes lane b.
        sink: slots that are written once; the other S - sink form the ring.
    """
    batch, kv_heads, n, d = k.shape
    block_d = padded_head_dim(d)
    block_n = max(8, 2048 // block_d)
    tiles = triton.cdiv(n, block_n)
    _ring_write_kernel[(tiles * kv_heads * batch,)](
        k_ring,
        v_ring,
        k,
        v,
        position,
        position if lanes is None else lanes,
        kv_heads,
        n,
        tiles,
        sink,
        k_ring.shape[2] - sink,
        *k_ring.stride(),
        *v_ring.stride(),
        *k.stride(),
        *v.stride(),
        position.stride(0),
        0 if lanes is None else lanes.stride(0),
        D=d,
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        HAS_LANES=lanes is not None,
        num_warps=4,
    )
