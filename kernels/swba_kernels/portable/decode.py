"""Decode: the queries of one block against the first `valid` slots of a ring, split over keys.

B rows of the call, L ring lanes, H query heads, Hkv key/value heads, G = H / Hkv, N queries, S ring slots, D head dim,
R = G * N query rows of one key/value head.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode_plan import DecodeTile, decode_splits, decode_tile, shared_bytes
from .forward import LOG2E, dense_rows
from .tiles import padded_head_dim


@triton.jit
def _accumulate(q, k, v, m, l, acc, scale, keep, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        s = tl.where(keep[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    alpha = tl.exp2(m - m_new)
    p = tl.exp2(s * scale - m_new[:, None])
    l_new = l * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, l_new, acc


@triton.jit(do_not_specialize=["batch", "group", "n", "capacity", "tiles", "splits", "sink", "sink_splits"])
def _decode_kernel(
    p_q,
    p_q_sink,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_part,
    p_part_lse,
    p_valid,
    p_lanes,
    scale,
    batch,
    kv_heads,
    group,
    n,
    capacity,
    tiles,
    splits,
    sink,
    sink_splits,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_sb,
    stride_sh,
    stride_sn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_on,
    stride_valid,
    stride_lanes,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL_STAGES: tl.constexpr,
    HAS_LANES: tl.constexpr,
    HAS_Q_SINK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Own BLOCK_M query rows of one (row, key/value head, split); loop over the split's key tiles.

    The G query heads of a key/value head see the same keys, so their rows are packed into the same tiles.
    A lane is cut into equal runs of whole key tiles from its own valid length alone. Only the last tile is masked;
    it is a loop of at most one turn, so that it loads through shared memory and needs no more registers.
    With q_sink the first `sink_splits` runs cut the sinks and the others what follows: no run meets both queries.
    """
    pid = tl.program_id(0)
    i_tile = pid % tiles
    pid = pid // tiles
    i_split = pid % splits
    pid = pid // splits
    i_h = pid % kv_heads
    i_b = pid // kv_heads

    valid = tl.minimum(tl.load(p_valid + i_b.to(tl.int64) * stride_valid), capacity).to(tl.int32)
    if HAS_LANES:
        lane = tl.load(p_lanes + i_b.to(tl.int64) * stride_lanes)
    else:
        lane = i_b.to(tl.int64)
    if HAS_Q_SINK:
        of_sinks = i_split < sink_splits
        p_q = tl.where(of_sinks, p_q_sink, p_q)
        stride_qb = tl.where(of_sinks, stride_sb, stride_qb)
        stride_qh = tl.where(of_sinks, stride_sh, stride_qh)
        stride_qn = tl.where(of_sinks, stride_sn, stride_qn)
        cut = tl.minimum(sink, valid)
        start = tl.where(of_sinks, 0, cut)
        stop = tl.where(of_sinks, cut, valid)
        runs = tl.where(of_sinks, sink_splits, splits - sink_splits)
        chunk = tl.cdiv(tl.cdiv(stop - start, runs), BLOCK_N) * BLOCK_N
        lo = start + tl.where(of_sinks, i_split, i_split - sink_splits) * chunk
        hi = tl.minimum(lo + chunk, stop)
    else:
        chunk = tl.cdiv(tl.cdiv(valid, splits), BLOCK_N) * BLOCK_N
        lo = i_split * chunk
        hi = tl.minimum(lo + chunk, valid)

    rows = group * n
    i_r = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_r = i_r < rows
    i_g = i_h * group + i_r // n
    i_n = i_r % n
    row = i_b.to(tl.int64) * (kv_heads * group) * n + i_g.to(tl.int64) * n + i_n
    if SPLIT:
        row += i_split.to(tl.int64) * batch * (kv_heads * group) * n

    if lo >= hi:
        tl.store(p_part_lse + row, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=in_r)
    else:
        i_d = tl.arange(0, BLOCK_D)
        in_d = i_d < D
        q_row = i_b.to(tl.int64) * stride_qb + i_g.to(tl.int64) * stride_qh + i_n.to(tl.int64) * stride_qn
        if BLOCK_D == D:
            q = tl.load(p_q + q_row[:, None] + i_d[None, :], mask=in_r[:, None], other=0.0)
        else:
            q = tl.load(p_q + q_row[:, None] + i_d[None, :], mask=in_r[:, None] & in_d[None, :], other=0.0)
        # The loop takes the row maximum before it scales, which needs scale > 0: negating q is exact, 1e-30 acts as 0.
        q = tl.where(scale < 0, -q, q)
        scale = tl.maximum(tl.abs(scale), 1e-30)

        i_k = tl.arange(0, BLOCK_N)
        base_k = p_k + lane * stride_kb + i_h.to(tl.int64) * stride_kh + lo.to(tl.int64) * stride_kn
        base_v = p_v + lane * stride_vb + i_h.to(tl.int64) * stride_vh + lo.to(tl.int64) * stride_vn
        off_k = i_k.to(tl.int64)[:, None] * stride_kn + i_d[None, :]
        off_v = i_k.to(tl.int64)[:, None] * stride_vn + i_d[None, :]
        step_k = tl.full([], BLOCK_N, tl.int64) * stride_kn
        step_v = tl.full([], BLOCK_N, tl.int64) * stride_vn

        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        full = lo + (hi - lo) // BLOCK_N * BLOCK_N
        for _ in range(lo, full, BLOCK_N):
            if BLOCK_D == D:
                k = tl.load(base_k + off_k)
                v = tl.load(base_v + off_v)
            else:
                k = tl.load(base_k + off_k, mask=in_d[None, :], other=0.0)
                v = tl.load(base_v + off_v, mask=in_d[None, :], other=0.0)
            m, l, acc = _accumulate(q, k, v, m, l, acc, scale, i_k, False, PRECISION)
            base_k += step_k
            base_v += step_v
        for start in tl.range(full, hi, BLOCK_N, num_stages=TAIL_STAGES):
            keep = i_k < hi - start
            keep_nd = keep[:, None] & in_d[None, :]
            k = tl.load(base_k + off_k, mask=keep_nd, other=0.0)
            v = tl.load(base_v + off_v, mask=keep_nd, other=0.0)
            m, l, acc = _accumulate(q, k, v, m, l, acc, scale, keep, True, PRECISION)

        acc = acc / l[:, None]
        lse = m + tl.log2(l)
        if SPLIT:
            tl.store(p_part_lse + row, lse, mask=in_r)
            tl.store(p_part + row[:, None] * D + i_d[None, :], acc, mask=in_r[:, None] & in_d[None, :])
        else:
            o_row = i_b.to(tl.int64) * stride_ob + i_g.to(tl.int64) * stride_oh + i_n.to(tl.int64) * stride_on
            tl.store(p_lse + row, lse * 0.6931471805599453, mask=in_r)
            out = acc.to(p_out.dtype.element_ty)
            tl.store(p_out + o_row[:, None] + i_d[None, :], out, mask=in_r[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=["rows", "heads", "n", "splits"])
def _combine_kernel(
    p_part,
    p_part_lse,
    p_out,
    p_lse,
    rows,
    heads,
    n,
    splits,
    stride_ob,
    stride_oh,
    stride_on,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Own BLOCK_R output rows; merge their splits in increasing order. A split without keys has lse = -inf."""
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_r = i_r < rows
    i_d = tl.arange(0, BLOCK_D)
    keep = in_r[:, None] & (i_d < D)[None, :]
    stride_s = rows.to(tl.int64)

    m = tl.load(p_part_lse + i_r, mask=in_r, other=0.0)
    for i_s in range(1, splits):
        m = tl.maximum(m, tl.load(p_part_lse + i_s * stride_s + i_r, mask=in_r, other=0.0))
    l = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i_s in range(splits):
        row = i_s * stride_s + i_r
        lse = tl.load(p_part_lse + row, mask=in_r, other=0.0)
        weight = tl.exp2(lse - m)
        seen = lse > float("-inf")
        part = tl.load(p_part + row[:, None] * D + i_d[None, :], mask=keep & seen[:, None], other=0.0)
        l += weight
        acc += weight[:, None] * part

    i_n = i_r % n
    i_h = i_r // n % heads
    i_b = i_r // n // heads
    tl.store(p_lse + i_r, (m + tl.log2(l)) * 0.6931471805599453, mask=in_r)
    o_row = i_b * stride_ob + i_h * stride_oh + i_n * stride_on
    tl.store(p_out + o_row[:, None] + i_d[None, :], (acc / l[:, None]).to(p_out.dtype.element_ty), mask=keep)


def decode(
    q: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    valid: Tensor,
    lanes: Tensor | None,
    *,
    scale: float,
    q_sink: Tensor | None = None,
    sink: int = 0,
    tile: DecodeTile | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from every query of row b to slots [0, valid[b]) of ring lane lanes[b].

    Args:
        q: [B, H, N, D].
        k_ring, v_ring: [L, Hkv, S, D].
        valid: [B] int64, from 1 to S.
        lanes: [B] int64, or None where row b reads lane b.
        scale: factor on the scores.
        q_sink: [B, H, N, D], takes the place of q in the scores of the first `sink` slots.
        sink: slots that q_sink reads.
        tile, splits: overrides for tuning; with q_sink `splits` runs cut the window, and others the sinks.

    Returns:
        out [B, H, N, D] with the layout of q and the natural log-sum-exp [B, H, N] in float32.
    """
    batch, heads, n, d = q.shape
    kv_heads, capacity = k_ring.shape[1], k_ring.shape[2]
    q, k_ring, v_ring = dense_rows(q), dense_rows(k_ring), dense_rows(v_ring)
    q_sink = None if q_sink is None else dense_rows(q_sink)
    group = heads // kv_heads
    block_d = padded_head_dim(d)
    sms, shared_memory = _gpu(q.device)
    if tile is None:
        tile = decode_tile(group * n, block_d, q.element_size(), shared_memory)
    tiles = triton.cdiv(group * n, tile.block_m)
    if splits is None:
        key_tiles = triton.cdiv(capacity, tile.block_n)
        resident = max(1, min(shared_memory // shared_bytes(tile, block_d, q.element_size()), 8 // tile.warps))
        lanes_held = k_ring.shape[0]
        partial_bytes = lanes_held * heads * n * d * 4
        splits = decode_splits(tiles * kv_heads * lanes_held, key_tiles, sms, resident, partial_bytes)
    sink_splits = None if q_sink is None else -(-sink * splits // max(capacity - sink, sink))
    splits += sink_splits or 0

    out = torch.empty_like(q)
    lse = torch.empty((batch, heads, n), dtype=torch.float32, device=q.device)
    part, part_lse = out, lse
    if splits > 1:
        part = torch.empty((splits, batch, heads, n, d), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, batch, heads, n), dtype=torch.float32, device=q.device)
    _decode_kernel[(tiles * splits * kv_heads * batch,)](
        q,
        q_sink,
        k_ring,
        v_ring,
        out,
        lse,
        part,
        part_lse,
        valid,
        valid if lanes is None else lanes,
        scale * LOG2E,
        batch,
        kv_heads,
        group,
        n,
        capacity,
        tiles,
        splits,
        None if q_sink is None else sink,
        sink_splits,
        *q.stride()[:3],
        *((None,) * 3 if q_sink is None else q_sink.stride()[:3]),
        *k_ring.stride()[:3],
        *v_ring.stride()[:3],
        *out.stride()[:3],
        valid.stride(0),
        0 if lanes is None else lanes.stride(0),
        D=d,
        BLOCK_D=block_d,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        SPLIT=splits > 1,
        TAIL_STAGES=2,
        HAS_LANES=lanes is not None,
        HAS_Q_SINK=q_sink is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        rows = batch * heads * n
        block_r = max(1, 1024 // block_d)
        _combine_kernel[(triton.cdiv(rows, block_r),)](
            part,
            part_lse,
            out,
            lse,
            rows,
            heads,
            n,
            splits,
            *out.stride()[:3],
            D=d,
            BLOCK_D=block_d,
            BLOCK_R=block_r,
            num_warps=4,
        )
    return out, lse


@lru_cache
def _gpu(device: torch.device) -> tuple[int, int]:
    """Return the multiprocessors of a GPU and its shared memory per block in bytes; an H200's for the interpreter."""
    if device.type != "cuda":
        return 132, 232448
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin
