"""Forward attention over the block window, for training and for prefill on top of a ring's history.

B batch, H query heads, Hkv key/value heads, N tokens, D head dim, L ring lanes, S ring slots, M query rows of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ranges import block_end, key_phases, masked_key_tile, tile_rows
from .tiles import Tile, padded_head_dim, plan_tiles, tile_for

LOG2E = 1.4426950408889634


class Ring(NamedTuple):
    """The history of a prefill: k, v [L, Hkv, S, D], position int64 [B], lanes int64 [B] (None: row b reads lane b)."""

    k: Tensor
    v: Tensor
    position: Tensor
    lanes: Tensor | None = None


@triton.jit
def _attend(q, k, v, acc, top, total, visible, scale2, MASKED: tl.constexpr):
    """Fold one key tile into the online softmax; `top` holds raw scores, so that the scale fuses into exp2."""
    s = tl.dot(q, k.T, input_precision="ieee")
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    if MASKED:
        shift = tl.where(new_top == float("-inf"), 0.0, new_top) * scale2
    else:
        shift = new_top * scale2
    p = tl.exp2(s * scale2 - shift[:, None])
    fade = tl.exp2(top * scale2 - shift)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def _attend_ring(
    q, acc, top, total, p_k, p_v, s_kn, s_vn, first_tile, last_tile, sink_tiles, ring_sinks, oldest, position, row_end,
    scale2, window, sink, ring_window, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Fold key tiles [first_tile, last_tile) of a ring: first its sinks, then its window from token `oldest` on."""
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_d = d < HEAD_DIM
    for j in tl.range(first_tile, last_tile, num_stages=STAGES):
        in_sinks = j < sink_tiles
        start = tl.where(in_sinks, j * BLOCK_N, oldest + (j - sink_tiles) * BLOCK_N)
        count = tl.where(in_sinks, ring_sinks, position) - start
        past_sink = start - sink
        base = tl.where(past_sink < 0, past_sink, past_sink % ring_window).to(tl.int32) + columns
        slot = tl.where(base < 0, base + sink, sink + base % ring_window).to(tl.int64)
        in_ring = columns < count
        mask = in_ring[:, None] & in_d[None, :]
        k = tl.load(p_k + slot[:, None] * s_kn + d[None, :], mask=mask, other=0.0)
        v = tl.load(p_v + slot[:, None] * s_vn + d[None, :], mask=mask, other=0.0)
        age = tl.minimum(position - start, 1 << 30).to(tl.int32) - columns
        visible = in_ring[None, :] & ((age[None, :] <= window - row_end[:, None]) | (base < 0)[None, :])
        acc, top, total = _attend(q, k, v, acc, top, total, visible, scale2, True)
    return acc, top, total


@triton.jit(
    do_not_specialize=[
        "s_sb", "s_sh", "s_sn",
        "s_qb", "s_qh", "s_qn", "s_kb", "s_kh", "s_kn", "s_vb", "s_vh", "s_vn", "s_ob", "s_oh", "s_on",
        "s_rkl", "s_rkh", "s_rkn", "s_rvl", "s_rvh", "s_rvn",
        "heads", "n", "block_size", "window", "sink", "grid_start", "group", "per_group", "tiles", "ring_window",
    ]
)  # fmt: skip
def _forward(
    p_q, p_q_sink, p_k, p_v, p_out, p_lse, p_ring_k, p_ring_v, p_position, p_lanes,
    s_qb, s_qh, s_qn, s_sb, s_sh, s_sn, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_ob, s_oh, s_on,
    s_rkl, s_rkh, s_rkn, s_rvl, s_rvh, s_rvn,
    scale2, heads, n, block_size, window, sink, grid_start, group, per_group, tiles, ring_window,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr, HAS_RING: tl.constexpr, HAS_LANES: tl.constexpr,
    HAS_Q_SINK: tl.constexpr,
):  # fmt: skip
    """Own one query tile of one head: ring history (masked), then full key tiles (no mask), then the edges (masked).

    With q_sink the sinks come first, those of the ring and then the call's own; q is loaded after them and meets the
    rest. Strides count UNIT elements, which tells the compiler that rows are aligned. Late tiles, which see most, go
    first.
    """
    pid = tl.program_id(0)
    i_tile = tiles - 1 - pid % tiles
    i_bh = pid // tiles
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    first, last = tile_rows(i_tile, n, group, per_group, grid_start, BLOCK_M)
    if first >= last:
        return
    rows = first + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_d = d < HEAD_DIM
    in_tile = rows < last
    row_end = block_end(rows, n, block_size, grid_start)
    end_first = block_end(first, n, block_size, grid_start)
    end_last = block_end(last - 1, n, block_size, grid_start)

    s_kn = s_kn.to(tl.int64) * UNIT
    s_vn = s_vn.to(tl.int64) * UNIT
    p_q += i_b * s_qb * UNIT + i_h * s_qh * UNIT
    p_k += i_b * s_kb * UNIT + i_h // GROUP * s_kh * UNIT
    p_v += i_b * s_vb * UNIT + i_h // GROUP * s_vh * UNIT
    at_q = rows.to(tl.int64)[:, None] * (s_qn.to(tl.int64) * UNIT) + d[None, :]
    mask_q = in_tile[:, None] & in_d[None, :]
    at_k = columns[:, None] * s_kn + d[None, :]
    at_v = columns[:, None] * s_vn + d[None, :]
    if HAS_Q_SINK:
        p_q_sink += i_b * s_sb * UNIT + i_h * s_sh * UNIT
        at_q_sink = rows.to(tl.int64)[:, None] * (s_sn.to(tl.int64) * UNIT) + d[None, :]
        q = tl.load(p_q_sink + at_q_sink, mask=mask_q, other=0.0)
    else:
        q = tl.load(p_q + at_q, mask=mask_q, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    if HAS_RING:
        position = tl.load(p_position + i_b)
        lane = i_b
        if HAS_LANES:
            lane = tl.load(p_lanes + i_b)
        p_ring_k += lane * s_rkl * UNIT + i_h // GROUP * s_rkh * UNIT
        p_ring_v += lane * s_rvl * UNIT + i_h // GROUP * s_rvh * UNIT
        s_rkn = s_rkn.to(tl.int64) * UNIT
        s_rvn = s_rvn.to(tl.int64) * UNIT
        oldest = tl.maximum(position + end_first - window, 0)
        ring_sinks = tl.minimum(tl.minimum(sink, oldest), position)
        if HAS_Q_SINK:
            ring_sinks = tl.minimum(sink, position)
            oldest = tl.maximum(oldest, ring_sinks)
        sink_tiles = tl.cdiv(ring_sinks, BLOCK_N)
        ring_tiles = sink_tiles + tl.cdiv(tl.maximum(position - oldest, 0), BLOCK_N)
        first_tile = 0
        if HAS_Q_SINK:
            first_tile = sink_tiles.to(tl.int32)
            acc, top, total = _attend_ring(
                q, acc, top, total, p_ring_k, p_ring_v, s_rkn, s_rvn, 0, first_tile, sink_tiles, ring_sinks, oldest,
                position, row_end, scale2, window, sink, ring_window, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES,
            )  # fmt: skip

    own_sink = sink
    if HAS_RING:
        own_sink = tl.maximum(sink - position, 0).to(tl.int32)
    low = 0
    if HAS_Q_SINK:
        low = tl.minimum(own_sink, end_last)
        for j in tl.range(0, tl.cdiv(low, BLOCK_N), num_stages=STAGES):
            start = tl.cast(j * BLOCK_N, tl.int64)
            keys = j * BLOCK_N + columns
            mask = (keys < low)[:, None] & in_d[None, :]
            k = tl.load(p_k + start * s_kn + at_k, mask=mask, other=0.0)
            v = tl.load(p_v + start * s_vn + at_v, mask=mask, other=0.0)
            visible = keys[None, :] < tl.minimum(row_end, low)[:, None]
            acc, top, total = _attend(q, k, v, acc, top, total, visible, scale2, True)
        own_sink = 0
        q = tl.load(p_q + at_q, mask=mask_q, other=0.0)
    if HAS_RING:
        acc, top, total = _attend_ring(
            q, acc, top, total, p_ring_k, p_ring_v, s_rkn, s_rvn, first_tile, ring_tiles.to(tl.int32), sink_tiles,
            ring_sinks, oldest, position, row_end, scale2, window, sink, ring_window, HEAD_DIM, BLOCK_D, BLOCK_N,
            STAGES,
        )  # fmt: skip

    sink_stop, sink_full, sink_tail, left_start, left_tiles, mid_start, mid_tiles, right_start, right_tiles = (
        key_phases(end_first, end_last, window, own_sink, BLOCK_N, low)
    )
    for j in tl.range(0, sink_full + mid_tiles, num_stages=STAGES):
        start = tl.where(j < sink_full, j * BLOCK_N, mid_start + (j - sink_full) * BLOCK_N).to(tl.int64)
        if HEAD_DIM == BLOCK_D:
            k = tl.load(p_k + start * s_kn + at_k)
            v = tl.load(p_v + start * s_vn + at_v)
        else:
            k = tl.load(p_k + start * s_kn + at_k, mask=in_d[None, :], other=0.0)
            v = tl.load(p_v + start * s_vn + at_v, mask=in_d[None, :], other=0.0)
        acc, top, total = _attend(q, k, v, acc, top, total, True, scale2, False)
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
        visible = (key < tl.minimum(end, stop)) & ((key >= end - window) | (key < own_sink))
        acc, top, total = _attend(q, k, v, acc, top, total, visible, scale2, True)

    total = tl.where(in_tile, total, 1.0)
    lse = (top * scale2 + tl.log2(total)) * 0.6931471805599453
    tl.store(p_lse + i_bh.to(tl.int64) * n + rows, lse, mask=in_tile)
    p_out += i_b * s_ob * UNIT + i_h * s_oh * UNIT
    at_out = rows.to(tl.int64)[:, None] * (s_on.to(tl.int64) * UNIT) + d[None, :]
    out = (acc / total[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_out + at_out, out, mask=mask_q)


def dense_rows(x: Tensor) -> Tensor:
    """Return x itself when the elements of a row are adjacent, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def stride_unit(*tensors: Tensor | None) -> int:
    """Return 8 when all strides but the last are multiples of 8 elements, else 1."""
    return 8 if all(s % 8 == 0 for x in tensors if x is not None for s in x.stride()[:-1]) else 1


def strides(x: Tensor | None, unit: int) -> tuple[int | None, ...]:
    """Return the strides of x [B, H, N, D] but the last, in units of `unit` elements; None for each without x."""
    return (None,) * 3 if x is None else tuple(s // unit for s in x.stride()[:-1])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    block_size: int,
    window: int,
    sink: int,
    grid_start: int,
    q_sink: Tensor | None = None,
    ring: Ring | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from each token to its block window, and to the history in `ring` if there is one.

    q_sink [B, H, N, D] takes the place of q in the scores of keys below `sink`.

    Args:
        q: [B, H, N, D], the call's own tokens.
        k, v: [B, Hkv, N, D].
        scale: factor on the scores.
        block_size, window, sink: the pattern, in tokens; sinks count from the start of the stream.
        grid_start: start of the block grid relative to the call's first token, at most 0.
        ring: history of each row.
        tile: replaces the table's choice.

    Returns:
        out [B, H, N, D] with the dtype and layout of q; natural log-sum-exp, float32 [B, H, N].
    """
    if q_sink is not None:
        q_sink = dense_rows(q_sink if scale >= 0 else -q_sink)
    if scale < 0:
        q, scale = -q, -scale
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    batch, heads, n, head_dim = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    tile = tile or tile_for("forward", q)
    plan = plan_tiles(n, block_size, window, grid_start, tile.block_m)
    ring_k, ring_v = (k, v) if ring is None else (dense_rows(ring.k), dense_rows(ring.v))
    unit = stride_unit(q, q_sink, k, v, out, ring_k, ring_v)
    _forward[(plan.tiles * batch * heads,)](
        q, q_sink, k, v, out, lse, ring_k, ring_v,
        None if ring is None else ring.position,
        None if ring is None else ring.lanes,
        *strides(q, unit), *strides(q_sink, unit), *strides(k, unit), *strides(v, unit), *strides(out, unit),
        *strides(ring_k, unit), *strides(ring_v, unit),
        max(scale * LOG2E, 1e-30),
        heads, n, block_size, window, sink, grid_start, plan.group, plan.per_group, plan.tiles,
        1 if ring is None else ring_k.shape[2] - sink,
        GROUP=heads // k.shape[1], HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, STAGES=tile.stages, UNIT=unit,
        HAS_RING=ring is not None, HAS_LANES=ring is not None and ring.lanes is not None,
        HAS_Q_SINK=q_sink is not None,
        num_warps=tile.warps,
    )  # fmt: skip
    return out, lse
