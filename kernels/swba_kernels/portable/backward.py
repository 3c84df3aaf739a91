"""Gradients of attention over the block window: one kernel over key tiles, one over query tiles, no atomics.

B batch, H query heads, Hkv key/value heads, N tokens, D head dim; s scores, p probabilities, "_t" transposed tiles
(keys are rows, queries are columns).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forward import LOG2E, dense_rows, stride_unit, strides
from .ranges import block_end, cut_at_sink, key_phases, last_query, masked_key_tile, tile_rows
from .tiles import Tile, padded_head_dim, plan_tiles, tile_for


@triton.jit(do_not_specialize=["s_ob", "s_oh", "s_on", "s_gb", "s_gh", "s_gn", "heads", "n", "tiles"])
def _row_terms(
    p_out, p_grad, p_lse, p_terms, s_ob, s_oh, s_on, s_gb, s_gh, s_gn, heads, n, tiles,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Write what the gradient kernels need of each query row as 4 numbers: lse in base 2, sum(out * dout), 0, 0.

    Sixteen bytes a row are one aligned asynchronous copy, whatever row a tile starts at.
    """
    pid = tl.program_id(0)
    i_bh = pid // tiles
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    rows = pid % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    in_n = rows < n
    mask = in_n[:, None] & (d < HEAD_DIM)[None, :]
    wide = rows.to(tl.int64)[:, None] * UNIT
    out = tl.load(p_out + (i_b * s_ob + i_h * s_oh) * UNIT + wide * s_on + d[None, :], mask=mask, other=0.0)
    grad = tl.load(p_grad + (i_b * s_gb + i_h * s_gh) * UNIT + wide * s_gn + d[None, :], mask=mask, other=0.0)
    at = i_bh.to(tl.int64) * n + rows
    lse = tl.load(p_lse + at, mask=in_n, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    column = tl.arange(0, 4)[None, :]
    terms = tl.where(column == 0, (lse * 1.4426950408889634)[:, None], tl.where(column == 1, delta[:, None], 0.0))
    tl.store(p_terms + at[:, None] * 4 + column, terms, mask=in_n[:, None])


@triton.jit
def _load_terms(p_terms, at, mask, ROWS: tl.constexpr):
    """Load (lse2, delta) of ROWS query rows, zeros past the mask."""
    four = tl.load(p_terms + at[:, None] * 4 + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0.0)
    even, odd = tl.split(tl.reshape(four, [ROWS, 2, 2]))
    lse2, _ = tl.split(even)
    delta, _ = tl.split(odd)
    return lse2, delta


@triton.jit
def _fold_queries(q, grad, lse2, delta, k, v, dk, dv, visible, scale2, MASKED: tl.constexpr):
    """Add what one query tile contributes to dk and dv; rows past the end are zero everywhere and add nothing."""
    p_t = tl.exp2(tl.dot(k, q.T, input_precision="ieee") * scale2 - lse2[None, :])
    if MASKED:
        p_t = tl.where(visible, p_t, 0.0)
    dv = tl.dot(p_t.to(grad.dtype), grad, dv, input_precision="ieee")
    dp_t = tl.dot(v, grad.T, input_precision="ieee")
    ds_t = p_t * (dp_t - delta[None, :])
    dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "s_sb", "s_sh", "s_sn",
        "s_qb", "s_qh", "s_qn", "s_gb", "s_gh", "s_gn", "s_kb", "s_kh", "s_kn", "s_vb", "s_vh", "s_vn",
        "s_dkb", "s_dkh", "s_dkn", "s_dvb", "s_dvh", "s_dvn",
        "kv_heads", "n", "block_size", "window", "sink", "grid_start", "group", "per_group", "tiles",
    ]
)  # fmt: skip
def _dkv(
    p_q, p_q_sink, p_grad, p_k, p_v, p_terms, p_dk, p_dv,
    s_qb, s_qh, s_qn, s_sb, s_sh, s_sn, s_gb, s_gh, s_gn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn,
    s_dkb, s_dkh, s_dkn, s_dvb, s_dvh, s_dvn,
    scale, scale2, kv_heads, n, block_size, window, sink, grid_start, group, per_group, tiles,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr, HAS_Q_SINK: tl.constexpr,
):  # fmt: skip
    """Own one key tile of one kv head: for each of its query heads, walk the queries that see the tile.

    Queries which all keys of the tile share need no element mask. Early tiles, the sinks among them, are seen by most
    queries and go first. With q_sink no tile holds sinks and other keys, so each reads one of the two queries.
    """
    pid = tl.program_id(0)
    i_bh = pid // tiles
    i_b = (i_bh // kv_heads).to(tl.int64)
    i_h = (i_bh % kv_heads).to(tl.int64)
    if HAS_Q_SINK:
        first, last = cut_at_sink(pid % tiles, tiles - 1, n, sink, group, per_group, grid_start, BLOCK_N)
        of_sinks = first < sink
        p_q = tl.where(of_sinks, p_q_sink, p_q)
        s_qb = tl.where(of_sinks, s_sb, s_qb)
        s_qh = tl.where(of_sinks, s_sh, s_qh)
        s_qn = tl.where(of_sinks, s_sn, s_qn)
    else:
        first, last = tile_rows(pid % tiles, n, group, per_group, grid_start, BLOCK_N)
    if first >= last:
        return
    keys = first + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    in_d = d < HEAD_DIM
    key_mask = (keys < last)[:, None] & in_d[None, :]
    wide = keys.to(tl.int64)[:, None] * UNIT
    k = tl.load(p_k + (i_b * s_kb + i_h * s_kh) * UNIT + wide * s_kn + d[None, :], mask=key_mask, other=0.0)
    v = tl.load(p_v + (i_b * s_vb + i_h * s_vh) * UNIT + wide * s_vn + d[None, :], mask=key_mask, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    left_start = tl.maximum(first - (first - grid_start) % block_size, 0)
    all_start = tl.maximum(last - 1 - (last - 1 - grid_start) % block_size, 0)
    stop = tl.where(first < sink, n, last_query(last - 1, n, block_size, window, grid_start))
    shared = last_query(tl.maximum(first, sink), n, block_size, window, grid_start)
    all_stop = tl.where(last <= sink, n, shared)
    left_tiles = tl.cdiv(all_start - left_start, BLOCK_M)
    mid_start = left_start + left_tiles * BLOCK_M
    mid_tokens = tl.maximum(all_stop - mid_start, 0)
    mid_tiles = tl.where(all_stop == stop, tl.cdiv(mid_tokens, BLOCK_M), mid_tokens // BLOCK_M)
    right_start = mid_start + mid_tiles * BLOCK_M
    right_tiles = tl.cdiv(tl.maximum(stop - right_start, 0), BLOCK_M)

    s_qn = s_qn.to(tl.int64) * UNIT
    s_gn = s_gn.to(tl.int64) * UNIT
    at_q = columns[:, None] * s_qn + d[None, :]
    at_g = columns[:, None] * s_gn + d[None, :]
    for i_g in range(GROUP):
        i_head = i_h * GROUP + i_g
        p_head_q = p_q + (i_b * s_qb + i_head * s_qh) * UNIT
        p_head_g = p_grad + (i_b * s_gb + i_head * s_gh) * UNIT
        at_row = (i_bh.to(tl.int64) * GROUP + i_g) * n
        for j in tl.range(0, mid_tiles, num_stages=STAGES):
            start = mid_start + j * BLOCK_M
            in_n = columns < stop - start
            mask = in_n[:, None] & in_d[None, :]
            q = tl.load(p_head_q + start.to(tl.int64) * s_qn + at_q, mask=mask, other=0.0)
            lse2, delta = _load_terms(p_terms + (at_row + start) * 4, columns, in_n, BLOCK_M)
            grad = tl.load(p_head_g + start.to(tl.int64) * s_gn + at_g, mask=mask, other=0.0)
            dk, dv = _fold_queries(q, grad, lse2, delta, k, v, dk, dv, True, scale2, False)
        for j in tl.range(0, left_tiles + right_tiles, num_stages=1):
            start = tl.where(j < left_tiles, left_start + j * BLOCK_M, right_start + (j - left_tiles) * BLOCK_M)
            rows = start + columns
            in_n = rows < stop
            mask = in_n[:, None] & in_d[None, :]
            q = tl.load(p_head_q + start.to(tl.int64) * s_qn + at_q, mask=mask, other=0.0)
            lse2, delta = _load_terms(p_terms + (at_row + start) * 4, columns, in_n, BLOCK_M)
            grad = tl.load(p_head_g + start.to(tl.int64) * s_gn + at_g, mask=mask, other=0.0)
            end = block_end(rows, n, block_size, grid_start)[None, :]
            key = keys[:, None]
            visible = (key < end) & ((key >= end - window) | (key < sink))
            dk, dv = _fold_queries(q, grad, lse2, delta, k, v, dk, dv, visible, scale2, True)

    p_dk += (i_b * s_dkb + i_h * s_dkh) * UNIT + wide * s_dkn + d[None, :]
    p_dv += (i_b * s_dvb + i_h * s_dvh) * UNIT + wide * s_dvn + d[None, :]
    tl.store(p_dk, (dk * scale).to(p_dk.dtype.element_ty), mask=key_mask)
    tl.store(p_dv, dv.to(p_dv.dtype.element_ty), mask=key_mask)


@triton.jit
def _fold_keys(q, grad, lse2, delta, k, v, dq, visible, scale2, MASKED: tl.constexpr):
    """Add what one key tile contributes to dq."""
    p = tl.exp2(tl.dot(q, k.T, input_precision="ieee") * scale2 - lse2[:, None])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    ds = p * (tl.dot(grad, v.T, input_precision="ieee") - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(
    do_not_specialize=[
        "s_sb", "s_sh", "s_sn", "s_dsb", "s_dsh", "s_dsn",
        "s_qb", "s_qh", "s_qn", "s_gb", "s_gh", "s_gn", "s_kb", "s_kh", "s_kn", "s_vb", "s_vh", "s_vn",
        "s_dqb", "s_dqh", "s_dqn",
        "heads", "n", "block_size", "window", "sink", "grid_start", "group", "per_group", "tiles",
    ]
)  # fmt: skip
def _dq(
    p_q, p_q_sink, p_grad, p_k, p_v, p_terms, p_dq, p_dq_sink,
    s_qb, s_qh, s_qn, s_sb, s_sh, s_sn, s_gb, s_gh, s_gn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn,
    s_dqb, s_dqh, s_dqn, s_dsb, s_dsh, s_dsn,
    scale, scale2, heads, n, block_size, window, sink, grid_start, group, per_group, tiles,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr, HAS_Q_SINK: tl.constexpr,
):  # fmt: skip
    """Own one query tile of one head: full key tiles (no mask), then the edges (masked), as in the forward kernel.

    With q_sink there are twice as many programs: the second half owns rows of dq_sink, whose keys are the sinks. Their
    blocks end at `sink` at the latest and have no window.
    """
    pid = tl.program_id(0)
    low = 0
    limit = n
    if HAS_Q_SINK:
        half = tl.num_programs(0) // 2
        of_sinks = pid >= half
        pid = tl.where(of_sinks, pid - half, pid)
        p_q = tl.where(of_sinks, p_q_sink, p_q)
        s_qb = tl.where(of_sinks, s_sb, s_qb)
        s_qh = tl.where(of_sinks, s_sh, s_qh)
        s_qn = tl.where(of_sinks, s_sn, s_qn)
        p_dq = tl.where(of_sinks, p_dq_sink, p_dq)
        s_dqb = tl.where(of_sinks, s_dsb, s_dqb)
        s_dqh = tl.where(of_sinks, s_dsh, s_dqh)
        s_dqn = tl.where(of_sinks, s_dsn, s_dqn)
        limit = tl.where(of_sinks, tl.minimum(sink, n), n)
        window = tl.where(of_sinks, n, window)
        low = tl.where(of_sinks, 0, sink)
        sink = 0
    i_bh = pid // tiles
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    first, last = tile_rows(tiles - 1 - pid % tiles, n, group, per_group, grid_start, BLOCK_M)
    if first >= last:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_d = d < HEAD_DIM
    in_tile = rows < last
    row_mask = in_tile[:, None] & in_d[None, :]
    wide = rows.to(tl.int64)[:, None] * UNIT
    q = tl.load(p_q + (i_b * s_qb + i_h * s_qh) * UNIT + wide * s_qn + d[None, :], mask=row_mask, other=0.0)
    grad = tl.load(p_grad + (i_b * s_gb + i_h * s_gh) * UNIT + wide * s_gn + d[None, :], mask=row_mask, other=0.0)
    lse2, delta = _load_terms(p_terms + (i_bh.to(tl.int64) * n + first) * 4, tl.arange(0, BLOCK_M), in_tile, BLOCK_M)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    s_kn = s_kn.to(tl.int64) * UNIT
    s_vn = s_vn.to(tl.int64) * UNIT
    p_k += (i_b * s_kb + i_h // GROUP * s_kh) * UNIT
    p_v += (i_b * s_vb + i_h // GROUP * s_vh) * UNIT
    at_k = columns[:, None] * s_kn + d[None, :]
    at_v = columns[:, None] * s_vn + d[None, :]
    end_first = block_end(first, n, block_size, grid_start)
    end_last = block_end(last - 1, n, block_size, grid_start)
    if HAS_Q_SINK:
        end_first = tl.minimum(end_first, limit)
        end_last = tl.minimum(end_last, limit)
    sink_stop, sink_full, sink_tail, left_start, left_tiles, mid_start, mid_tiles, right_start, right_tiles = (
        key_phases(end_first, end_last, window, sink, BLOCK_N, low)
    )
    for j in tl.range(0, sink_full + mid_tiles, num_stages=STAGES):
        start = tl.where(j < sink_full, j * BLOCK_N, mid_start + (j - sink_full) * BLOCK_N).to(tl.int64)
        if HEAD_DIM == BLOCK_D:
            k = tl.load(p_k + start * s_kn + at_k)
            v = tl.load(p_v + start * s_vn + at_v)
        else:
            k = tl.load(p_k + start * s_kn + at_k, mask=in_d[None, :], other=0.0)
            v = tl.load(p_v + start * s_vn + at_v, mask=in_d[None, :], other=0.0)
        dq = _fold_keys(q, grad, lse2, delta, k, v, dq, True, scale2, False)
    row_end = block_end(rows, n, block_size, grid_start)
    if HAS_Q_SINK:
        row_end = tl.minimum(row_end, limit)
    for j in tl.range(0, sink_tail + left_tiles + right_tiles, num_stages=1):
        start, stop = masked_key_tile(
            j, end_last, sink_stop, sink_full, sink_tail, left_start, left_tiles, right_start, BLOCK_N
        )
        keys = start + columns
        mask = (keys < stop)[:, None] & in_d[None, :]
        k = tl.load(p_k + start.to(tl.int64) * s_kn + at_k, mask=mask, other=0.0)
        v = tl.load(p_v + start.to(tl.int64) * s_vn + at_v, mask=mask, other=0.0)
        key = keys[None, :]
        end = row_end[:, None]
        visible = (key < tl.minimum(end, stop)) & ((key >= end - window) | (key < sink))
        dq = _fold_keys(q, grad, lse2, delta, k, v, dq, visible, scale2, True)
    p_dq += (i_b * s_dqb + i_h * s_dqh) * UNIT + wide * s_dqn + d[None, :]
    tl.store(p_dq, (dq * scale).to(p_dq.dtype.element_ty), mask=row_mask)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    block_size: int,
    window: int,
    sink: int,
    grid_start: int,
    q_sink: Tensor | None = None,
    tile_dkv: Tile | None = None,
    tile_dq: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (dq, dk, dv, dq_sink) of the forward call that gave `out` and `lse`, bit for bit the same every time.

    Args:
        dout, q, out, q_sink: [B, H, N, D].
        k, v: [B, Hkv, N, D].
        lse: natural log-sum-exp, float32 [B, H, N].
        scale, block_size, window, sink, grid_start: as in the forward call.
        tile_dkv, tile_dq: replace the table's choices.

    Returns:
        Gradients with the dtypes and layouts of q, k, v and q_sink; None for the last without q_sink.
    """
    dout, q, k, v, out, lse = (
        dense_rows(dout),
        dense_rows(q),
        dense_rows(k),
        dense_rows(v),
        dense_rows(out),
        lse.contiguous(),
    )
    batch, heads, n, head_dim = q.shape
    kv_heads = k.shape[1]
    q_sink = None if q_sink is None else dense_rows(q_sink)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dq_sink = None if q_sink is None else torch.empty_like(q_sink)
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_(), dq_sink
    tile_dkv = tile_dkv or tile_for("dkv", q)
    tile_dq = tile_dq or tile_for("dq", q)
    unit = stride_unit(dout, q, q_sink, k, v, out, dq, dq_sink, dk, dv)
    block_d = padded_head_dim(head_dim)
    terms = torch.empty(*lse.shape, 4, dtype=torch.float32, device=q.device)
    row_tiles = triton.cdiv(n, 32)
    _row_terms[(row_tiles * batch * heads,)](
        out, dout, lse, terms, *strides(out, unit), *strides(dout, unit), heads, n, row_tiles,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=32, UNIT=unit, num_warps=4,
    )  # fmt: skip
    inputs = (q, q_sink, dout, k, v, terms)
    input_strides = tuple(s for x in inputs[:5] for s in strides(x, unit))
    pattern = (n, block_size, window, sink, grid_start)
    constants = {"GROUP": heads // kv_heads, "HEAD_DIM": head_dim, "BLOCK_D": block_d, "UNIT": unit}
    constants["HAS_Q_SINK"] = q_sink is not None
    plan = plan_tiles(n, block_size, window, grid_start, tile_dkv.block_n)
    tiles = plan.tiles + (q_sink is not None)
    _dkv[(tiles * batch * kv_heads,)](
        *inputs, dk, dv, *input_strides, *strides(dk, unit), *strides(dv, unit),
        scale, scale * LOG2E, kv_heads, *pattern, plan.group, plan.per_group, tiles, **constants,
        BLOCK_M=tile_dkv.block_m, BLOCK_N=tile_dkv.block_n, STAGES=tile_dkv.stages, num_warps=tile_dkv.warps,
    )  # fmt: skip
    plan = plan_tiles(n, block_size, window, grid_start, tile_dq.block_m)
    _dq[(plan.tiles * batch * heads * (1 if q_sink is None else 2),)](
        *inputs, dq, dq_sink, *input_strides, *strides(dq, unit), *strides(dq_sink, unit),
        scale, scale * LOG2E, heads, *pattern, plan.group, plan.per_group, plan.tiles, **constants,
        BLOCK_M=tile_dq.block_m, BLOCK_N=tile_dq.block_n, STAGES=tile_dq.stages, num_warps=tile_dq.warps,
    )  # fmt: skip
    return dq, dk, dv, dq_sink
