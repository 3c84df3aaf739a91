"""What the backward kernels share: pipeline stages, rows of numbers in shared memory, the way out of a tile."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .compat import box, cta_barrier, tma_load, tma_store, view
from .pipeline import next_stage
from .starts import await_start, pass_start

LN2 = gl.constexpr(0.6931471805599453)
ROW_COPIES = gl.constexpr(4)  # float32 numbers in the 16 bytes at whose multiples a TMA box may start


def row_box_layout() -> gl.NVMMASharedLayout:
    """Return the shared layout of a box [1, rows] of 32-bit numbers."""
    return gl.NVMMASharedLayout(0, 32, rank=2)


row_box = gluon.constexpr_function(row_box_layout)


@gluon.jit
def load_row_terms(desc, i_head, heads, row, full, buffer):
    """Copy the terms of the rows from `row` on, of head i_head of all `heads` of the batch, into a box [1, ROWS]."""
    copy = row % ROW_COPIES
    tma_load(desc, [copy * heads + i_head, row - copy], full, buffer)


@gluon.jit
def load_queries(desc, sink_desc, in_sinks, at, full, buffer, Q_SINK: gl.constexpr):
    """Copy a tile of queries into a buffer [ROWS, D]; with Q_SINK of those that read sinks, or those that do not."""
    tile = box(buffer, buffer.shape[0], buffer.shape[1])
    if Q_SINK:
        tma_load(sink_desc, at, full, tile, pred=in_sinks)
        tma_load(desc, at, full, tile, pred=in_sinks == 0)
    else:
        tma_load(desc, at, full, tile)


@gluon.jit
def row_terms(buffer, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Read one number per query from a box [1, ROWS]."""
    return view(buffer, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])).load(LAYOUT)


@gluon.jit
def clear_past(buffer, tile, n, ROWS: gl.constexpr, D: gl.constexpr):
    """Zero what a tile (start, stop, _) of ROWS rows holds past `stop`: a matmul would turn 0 x NaN into NaN.

    Rows past the end of the sequence are zero already. Every warpgroup that reads the tile calls this for itself; they
    write the same bits.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    start, stop, _ = tile
    if (start + ROWS > stop) & (stop < n):
        x = buffer.load(LAYOUT)
        inside = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT)) < stop
        buffer.store(gl.where(inside[:, None], x, gl.zeros([ROWS, D], x.dtype, LAYOUT)))
        fence_async_shared()
        cta_barrier()


@gluon.jit
def seen_buffer(WARPGROUPS: gl.constexpr):
    """Return room for which queries see each key: rows 2 w and 2 w + 1 for the 64 keys of warpgroup w.

    Edge tiles read the ranges from here: they are few, and else the ranges would sit in registers through the loop.
    """
    return gl.allocate_shared_memory(gl.int32, [2 * WARPGROUPS, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def keep_seen(seen_from, seen_to, seen_smem, WARPGROUP: gl.constexpr):
    """Put the ranges of a warpgroup's keys where `hide` reads them; return the two buffers."""
    from_smem = seen_smem.index(WARPGROUP * 2)
    to_smem = seen_smem.index(WARPGROUP * 2 + 1)
    from_smem.store(seen_from)
    to_smem.store(seen_to)
    return from_smem, to_smem


@gluon.jit
def hide(x, row, count_smem, seen):
    """Zero what belongs to a query that does not see the key.

    `row` is the first query of the tile, or -1 if all its queries see all keys. `seen` are buffers (from, to) of which
    queries see each key.
    """
    from_smem, to_smem = seen
    if row >= 0:
        seen_from = from_smem.load(gl.SliceLayout(1, x.type.layout))
        seen_to = to_smem.load(gl.SliceLayout(1, x.type.layout))
        queries = row + count_smem.load(gl.SliceLayout(0, x.type.layout))[None, :]
        x = gl.where((queries >= seen_from[:, None]) & (queries < seen_to[:, None]), x, 0.0)
    return x


@gluon.jit
def weigh(
    s_t, dp_t, row, terms, edges, scale2,
    BLOCK_M: gl.constexpr, AFTER: gl.constexpr, SLIDES: gl.constexpr,
):  # fmt: skip
    """Return P^T = exp2(S^T - lse) and dS^T = P^T (dP^T - delta).

    `edges` = (seen_from, seen_to, all_start, all_stop, latest): which queries see each key (numbers in registers, or
    buffers if tiles slide), which see all keys, where a last tile may start. s_t is in flight, with AFTER matmuls
    behind it: dp_t, and others that run beside this. Before those have ended nothing may be rounded to an operand of
    the next ones, or ptxas serialises them.
    """
    lse_smem, delta_smem, count_smem = terms
    seen_from, seen_to, all_start, all_stop, latest = edges
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    lse2 = row_terms(lse_smem, BLOCK_M, COLUMNS)
    s_t = warpgroup_mma_wait(AFTER, deps=(s_t,))
    p_t = gl.exp2(s_t * scale2 - lse2[None, :])
    delta = row_terms(delta_smem, BLOCK_M, COLUMNS)
    dp_t = warpgroup_mma_wait(AFTER - 1, deps=(dp_t,))
    slope = dp_t - delta[None, :]
    if (row < all_start) | (row + BLOCK_M > all_stop):
        if SLIDES:
            low = gl.maximum(seen_from.load(gl.SliceLayout(1, SCORES)), row)
            high = seen_to.load(gl.SliceLayout(1, SCORES))
            row = gl.minimum(row, latest)
        else:
            low = seen_from
            high = seen_to
        queries = row + count_smem.load(COLUMNS)[None, :]
        visible = (queries >= low[:, None]) & (queries < high[:, None])
        p_t = gl.where(visible, p_t, 0.0)
        slope = gl.where(visible, slope, 0.0)
    return p_t, p_t * slope


@gluon.jit
def _issue_scores(k, v, queries, stage):
    """Start S^T = K Q^T and dP^T = V dO^T for the tile of queries in a stage."""
    q_smem, grad_smem, _, _, _ = queries
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    none = gl.zeros([64, BLOCK_M], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16]))
    s_t = warpgroup_mma(k, q_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
    dp_t = warpgroup_mma(v, grad_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
    return s_t, dp_t


@gluon.jit
def _terms_of(queries, stage):
    _, _, lse_smem, delta_smem, count_smem = queries
    return lse_smem.index(stage), delta_smem.index(stage), count_smem


@gluon.jit
def operands(p_t, ds_t, queries):
    """Return P^T and dS^T, rounded, as operands of the matmuls with dout and q, and dS^T itself."""
    q_smem, _, _, _, _ = queries
    OPERAND: gl.constexpr = gl.DotOperandLayout(
        0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, q_smem.shape[2], 16]), 2
    )
    p_t = p_t.to(q_smem.dtype)
    ds_t = ds_t.to(q_smem.dtype)
    p_operand = gl.convert_layout(p_t, OPERAND, assert_trivial=True)
    return p_operand, gl.convert_layout(ds_t, OPERAND, assert_trivial=True), ds_t


@gluon.jit
def slopes(k, v, queries, stage, row, edges, scale2, SLIDES: gl.constexpr):
    """Return (P^T, dS^T), as `weigh`, of the tile of queries in a stage: nothing else runs beside.

    `queries` are the stages of q, dout and both row terms, and the buffer that counts.
    """
    s_t, dp_t = _issue_scores(k, v, queries, stage)
    return weigh(s_t, dp_t, row, _terms_of(queries, stage), edges, scale2, queries[0].shape[1], 1, SLIDES)


@gluon.jit
def fold(p_operand, ds_operand, queries, stage, dk, dv):
    """Start dV += P^T dO and dK += dS^T Q for the tile of queries in a stage."""
    q_smem, grad_smem, _, _, _ = queries
    dv = warpgroup_mma(p_operand, grad_smem.index(stage), dv, is_async=True)
    return warpgroup_mma(ds_operand, q_smem.index(stage), dk, is_async=True), dv


@gluon.jit
def slopes_beside(
    k, v, queries, barriers, stage, phase, row, edges, scale2, p_operand, ds_operand, dk, dv,
    SLIDES: gl.constexpr, TURNS: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """Step to the next stage and return the `operands` of its `slopes`, dk, dv, and that stage with its phase.

    Beside it the tile in the stage before is folded into dk and dv, and the stage given back. With TURNS,
    a consumer starts its matmuls when those of the other have ended.
    """
    full, empty = barriers
    before = stage
    stage, phase = next_stage(stage, phase, queries[0].shape[0])
    mbarrier.wait(full.index(stage), phase)
    await_start(TURNS, WARPGROUP)
    s_t, dp_t = _issue_scores(k, v, queries, stage)
    dk, dv = fold(p_operand, ds_operand, queries, before, dk, dv)
    p_t, ds_t = weigh(s_t, dp_t, row, _terms_of(queries, stage), edges, scale2, queries[0].shape[1], 3, SLIDES)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    pass_start(2, TURNS, WARPGROUP)
    mbarrier.arrive(empty.index(before), count=1)
    p_operand, ds_operand, ds_t = operands(p_t, ds_t, queries)
    return p_operand, ds_operand, ds_t, dk, dv, stage, phase


@gluon.jit
def _store_rows(desc, i_b, i_h, row, x, buffer):
    cta_barrier()
    buffer.store(x)
    fence_async_shared()
    cta_barrier()
    tma_store(desc, [i_b, i_h, row, 0], box(buffer, 64, buffer.shape[1]))


@gluon.jit
def store_tile(desc, sink_desc, in_sinks, i_b, i_h, row, x, buffer, Q_SINK: gl.constexpr):
    """Start to send 64 rows to global memory by a buffer that no other warpgroup reads; rows past the end are cut.

    With Q_SINK sinks go by a descriptor that ends where they end: for others own the rows behind.
    """
    if Q_SINK:
        if in_sinks:
            _store_rows(sink_desc, i_b, i_h, row, x, buffer)
        else:
            _store_rows(desc, i_b, i_h, row, x, buffer)
    else:
        _store_rows(desc, i_b, i_h, row, x, buffer)


@gluon.jit
def send_gradients(
    outputs, in_sinks, i_b, i_h, row, dk, dv, scale2, dk_buffer, dv_buffer, ONE_BUFFER: gl.constexpr,
    Q_SINK: gl.constexpr,
):  # fmt: skip
    """Start to send dv and then dk, times the scale, of 64 keys to global memory, one after the other by ONE_BUFFER."""
    dk_desc, dv_desc, dk_sink_desc, dv_sink_desc = outputs
    DTYPE: gl.constexpr = dv_buffer.dtype
    store_tile(dv_desc, dv_sink_desc, in_sinks, i_b, i_h, row, dv.to(DTYPE), dv_buffer, Q_SINK)
    if ONE_BUFFER:
        tma.store_wait(0)
    dk = (dk * (scale2 * LN2)).to(DTYPE)
    store_tile(dk_desc, dk_sink_desc, in_sinks, i_b, i_h, row, dk, dk_buffer, Q_SINK)
