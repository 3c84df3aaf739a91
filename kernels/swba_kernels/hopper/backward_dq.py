"""The gradients of queries: a tile of queries stays in shared memory while the keys that it sees pass by.

A consumer warpgroup owns 64 queries. The last matmul of a tile of keys runs beside the first two of the next tile.
"""

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

from .assembler import own_assembler
from .backward_ranges import block_end, key_tile, key_walk, key_walk_apart, pattern_of
from .backward_shared import LN2, clear_past, load_queries, store_tile
from .compat import box, tma_load
from .pipeline import counting, next_stage


@gluon.jit
def _query_tile(shape, pattern, WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, Q_SINK: gl.constexpr):
    """Return (whether keys are sinks, batch row, head, first query, its tiles of keys, their walk) of this program.

    With Q_SINK the queries that see other keys, those from `rest` on, go first.
    """
    heads, _, tiles, rest, rest_programs = shape
    ROWS: gl.constexpr = WARPGROUPS * 64
    pid = gl.program_id(0)
    if Q_SINK:
        in_sinks = pid >= rest_programs
        start = gl.where(in_sinks, 0, rest)
        pid -= gl.where(in_sinks, rest_programs, 0)
        tiles = gl.where(in_sinks, tiles, (pattern[0] - rest + ROWS - 1) // ROWS)
        i_bh = pid // tiles
        first = start + (tiles - 1 - pid % tiles) * ROWS
        count, walk = key_walk_apart(first, in_sinks, pattern, ROWS, BLOCK_N)
        return in_sinks, i_bh // heads, i_bh % heads, first, count, walk
    else:
        i_bh = pid // tiles
        first = (tiles - 1 - pid % tiles) * ROWS
        count, walk = key_walk(first, pattern, ROWS, BLOCK_N)
        return False, i_bh // heads, i_bh % heads, first, count, walk


@gluon.jit
def _produce(inputs, buffers, barriers, pattern, shape, Q_SINK: gl.constexpr):
    """Load the queries and the gradients of their outputs once, then every tile of keys and values."""
    q_desc, q_sink_desc, grad_desc, k_desc, v_desc = inputs
    q_smem, grad_smem, k_smem, v_smem, _ = buffers
    rows_full, full, empty = barriers
    group = shape[1]
    WARPGROUPS: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    in_sinks, i_b, i_h, first, count, walk = _query_tile(shape, pattern, WARPGROUPS, BLOCK_N, Q_SINK)
    mbarrier.expect(rows_full, 2 * WARPGROUPS * 64 * D * 2)
    for w in gl.static_range(WARPGROUPS):
        load_queries(q_desc, q_sink_desc, in_sinks, [i_b, i_h, first + w * 64, 0], rows_full, q_smem.index(w), Q_SINK)
        tma_load(grad_desc, [i_b, i_h, first + w * 64, 0], rows_full, box(grad_smem.index(w), 64, D))
    stage = 0
    phase = 1
    for j in range(count):
        start = key_tile(j, walk, BLOCK_N)[0]
        ready = full.index(stage)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(ready, 2 * BLOCK_N * D * 2)
        tma_load(k_desc, [i_b, i_h // group, start, 0], ready, box(k_smem.index(stage), BLOCK_N, D))
        tma_load(v_desc, [i_b, i_h // group, start, 0], ready, box(v_smem.index(stage), BLOCK_N, D))
        stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _slopes(s, dp, rows, tile, pattern, scale2, count_smem, SCORES: gl.constexpr, AFTER: gl.constexpr):
    """Return dS = P (dP - delta) of one tile.

    s is in flight, with AFTER matmuls behind it: dp, and one that may run beside this.
    """
    lse2, delta, row_end = rows
    start, stop, edge = tile
    _, _, window, sink, _ = pattern
    s = warpgroup_mma_wait(AFTER, deps=(s,))
    p = gl.exp2(s * scale2 - lse2[:, None])
    dp = warpgroup_mma_wait(AFTER - 1, deps=(dp,))
    slope = p * (dp - delta[:, None])
    if edge:
        keys = start + count_smem.load(gl.SliceLayout(0, SCORES))[None, :]
        in_window = (keys >= (row_end - window)[:, None]) | (keys < sink)
        slope = gl.where(in_window & (keys < gl.minimum(row_end, stop)[:, None]), slope, 0.0)
    return slope


@gluon.jit
def _consume(
    outputs, buffers, barriers, scale2, terms_stride, pattern, shape, Q_SINK: gl.constexpr, WARPGROUP: gl.constexpr
):
    """Fold tile after tile of keys into dq of 64 queries:

    S = Q K^T | dP = dO V^T | dQ += dS K of the tile before | P = exp2(S - lse) | dS = P (dP - delta)
    """
    dq_desc, dq_sink_desc, p_lse, p_delta = outputs
    q_smem, grad_smem, k_smem, v_smem, count_smem = buffers
    rows_full, full, empty = barriers
    n, _, _, _, _ = pattern
    heads = shape[0]
    DTYPE: gl.constexpr = q_smem.dtype
    WARPGROUPS: gl.constexpr = q_smem.shape[0]
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    in_sinks, i_b, i_h, first, count, walk = _query_tile(shape, pattern, WARPGROUPS, BLOCK_N, Q_SINK)
    if Q_SINK:
        pattern = pattern_of(in_sinks, pattern)
    row = first + WARPGROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    at = (i_b * heads + i_h).to(gl.int64) * terms_stride + row
    lse2 = gl.load(p_lse + at, mask=row < n, other=0.0)
    delta = gl.load(p_delta + at, mask=row < n, other=0.0)
    rows = (lse2, delta, block_end(row, pattern))
    q = q_smem.index(WARPGROUP)
    grad = grad_smem.index(WARPGROUP)
    dq = gl.zeros([64, D], gl.float32, SUMS)
    none = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    mbarrier.wait(rows_full, 0)

    tile = key_tile(0, walk, BLOCK_N)
    mbarrier.wait(full.index(0), 0)
    clear_past(k_smem.index(0), tile, n, BLOCK_N, D)
    s = warpgroup_mma(q, k_smem.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    dp = warpgroup_mma(grad, v_smem.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    slope = _slopes(s, dp, rows, tile, pattern, scale2, count_smem, SCORES, 1)
    ds = gl.convert_layout(slope.to(DTYPE), OPERAND, assert_trivial=True)
    stage = 0
    phase = 0
    for j in range(1, count):
        tile = key_tile(j, walk, BLOCK_N)
        before = stage
        stage, phase = next_stage(stage, phase, STAGES)
        k = k_smem.index(stage)
        mbarrier.wait(full.index(stage), phase)
        clear_past(k, tile, n, BLOCK_N, D)
        s = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
        dp = warpgroup_mma(grad, v_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        dq = warpgroup_mma(ds, k_smem.index(before), dq, is_async=True)
        slope = _slopes(s, dp, rows, tile, pattern, scale2, count_smem, SCORES, 2)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        mbarrier.arrive(empty.index(before), count=1)
        ds = gl.convert_layout(slope.to(DTYPE), OPERAND, assert_trivial=True)
    dq = warpgroup_mma(ds, k_smem.index(stage), dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    first += WARPGROUP * 64
    dq = (dq * (scale2 * LN2)).to(DTYPE)
    store_tile(dq_desc, dq_sink_desc, in_sinks, i_b, i_h, first, dq, q, Q_SINK)
    tma.store_wait(0)


@own_assembler
@gluon.jit(
    do_not_specialize=[
        "n", "terms_stride", "block_size", "window", "sink", "grid_start", "heads", "group", "tiles", "rest",
        "rest_programs",
    ]
)  # fmt: skip
def dq_kernel(
    q_desc, q_sink_desc, grad_desc, k_desc, v_desc, dq_desc, dq_sink_desc, p_lse, p_delta,
    scale2, n, terms_stride, block_size, window, sink, grid_start, heads, group, tiles, rest, rest_programs,
    WARPGROUPS: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    Q_SINK: gl.constexpr,
):  # fmt: skip
    """Own WARPGROUPS x 64 queries of one head. Late tiles, which see most, go first."""
    gl.static_assert(WARPGROUPS == 2, "consumers are spelled out below")
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [WARPGROUPS, 64, D], TILE)
    grad_smem = gl.allocate_shared_memory(q_desc.dtype, [WARPGROUPS, 64, D], TILE)
    k_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_N, D], TILE)
    v_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BLOCK_N, D], TILE)
    count_smem = counting(BLOCK_N)
    rows_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(rows_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    fence_async_shared()
    inputs = (q_desc, q_sink_desc, grad_desc, k_desc, v_desc)
    outputs = (dq_desc, dq_sink_desc, p_lse, p_delta)
    buffers = (q_smem, grad_smem, k_smem, v_smem, count_smem)
    barriers = (rows_full, full, empty)
    pattern = (n, block_size, window, sink, grid_start)
    shape = (heads, group, tiles, rest, rest_programs)
    gl.warp_specialize([
        (_consume, (outputs, buffers, barriers, scale2, terms_stride, pattern, shape, Q_SINK, 0)),
        (_consume, (outputs, buffers, barriers, scale2, terms_stride, pattern, shape, Q_SINK, 1)),
        (_produce, (inputs, buffers, barriers, pattern, shape, Q_SINK)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
