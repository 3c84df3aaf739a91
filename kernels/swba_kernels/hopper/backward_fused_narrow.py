"""All three gradients in one pass, five matmuls a tile instead of seven, for head dim 64.

A tile of 128 keys stays in shared memory while the queries that see it pass by. A consumer warpgroup owns 64 keys; the
slopes dS of both go through a ring in shared memory to a third warpgroup, which computes dQ and adds it to a sum in
global memory. So the consumers never wait for each other. "_t" marks transposed tiles (keys are rows).

Query tiles lie on a fixed grid here, so that a tile of dQ is one place in memory.
"""

# ruff: noqa: RUF059 (tuples travel whole between the partitions; each names all that it gets)

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

from .backward_loader import load
from .backward_order import add, by_thread, sum_box
from .backward_ranges import hide_others, next_row, queries_of, walk_grid, work_of
from .backward_shared import LN2, hide, keep_seen, row_box, row_terms, seen_buffer, store_tile, store_tile_apart
from .pipeline import counting, next_stage


@gluon.jit
def _consume(
    outputs, loaded, own, arrivals, barriers, i_work, scale2, pattern, shape,
    DOWN: gl.constexpr, Q_SINK: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """Fold tile after tile of queries into dk and dv of 64 keys, and hand on dS:

    S^T = K Q^T | dP^T = V dO^T | P^T = exp2(S^T - lse) | dV += P^T dO | dS^T = P^T (dP^T - delta) | dK += dS^T Q

    dV and dK of a tile run beside S^T and dP^T of the next one.
    """
    dk_desc, dv_desc, dk_sink_desc, dv_sink_desc = outputs
    k_smem, v_smem, q_smem, grad_smem, lse_smem, delta_smem = loaded
    count_smem, seen_smem, ds_smem = own
    keys_full, full, empty = arrivals
    ds_full, ds_empty = barriers
    heads, group, kv_in_all, together = shape
    DTYPE: gl.constexpr = q_smem.dtype
    STAGES: gl.constexpr = q_smem.shape[0]
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    BLOCK_N: gl.constexpr = k_smem.shape[0]
    D: gl.constexpr = k_smem.shape[1]
    SLOPE_STAGES: gl.constexpr = ds_smem.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    in_sinks, part, i_b, i_h, first, i_sums = work_of(i_work, pattern, shape, BLOCK_N, Q_SINK)
    tiles, from_row, to_row, all_start, all_stop = walk_grid(first, part, BLOCK_M, BLOCK_N, DOWN)
    keys = first + WARPGROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    seen_from, seen_to = queries_of(keys, part)
    if Q_SINK:
        seen_to, all_start = hide_others(keys, seen_from, seen_to, all_start, first, in_sinks, pattern, BLOCK_N)
    from_smem, to_smem = keep_seen(seen_from, seen_to, seen_smem, WARPGROUP)
    edges = (from_smem, to_smem, all_start, all_stop)
    k = k_smem.slice(WARPGROUP * 64, 64, dim=0)
    v = v_smem.index(WARPGROUP)
    dk = gl.zeros([64, D], gl.float32, SUMS)
    dv = gl.zeros([64, D], gl.float32, SUMS)
    none = gl.zeros([64, BLOCK_M], gl.float32, SCORES)
    count = group * tiles
    stage = 0
    phase = 0
    slope_stage = 0
    slope_phase = 1
    row = from_row
    mbarrier.wait(keys_full, 0)
    mbarrier.wait(full.index(0), 0)
    s_t = warpgroup_mma(k, q_smem.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    dp_t = warpgroup_mma(v, grad_smem.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    lse2 = row_terms(lse_smem.index(0), BLOCK_M, COLUMNS)
    s_t = warpgroup_mma_wait(1, deps=(s_t,))
    p_t = hide(gl.exp2(s_t * scale2 - lse2[None, :]), row, count_smem, edges)
    p_operand = gl.convert_layout(p_t.to(DTYPE), OPERAND, assert_trivial=True)
    dv = warpgroup_mma(p_operand, grad_smem.index(0), dv, is_async=True)
    dp_t = warpgroup_mma_wait(1, deps=(dp_t,))
    delta = row_terms(delta_smem.index(0), BLOCK_M, COLUMNS)
    ds_t = (p_t * hide(dp_t - delta[None, :], row, count_smem, edges)).to(DTYPE)
    ds_smem.index(0).slice(WARPGROUP * 64, 64, dim=0).store(ds_t)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(0), count=1)
    dv = warpgroup_mma_wait(0, deps=(dv,))
    ds_operand = gl.convert_layout(ds_t, OPERAND, assert_trivial=True)
    for _ in range(count - 1):
        row = next_row(row, from_row, to_row, BLOCK_M, DOWN)
        before = stage
        stage, phase = next_stage(stage, phase, STAGES)
        slope_stage, slope_phase = next_stage(slope_stage, slope_phase, SLOPE_STAGES)
        grad = grad_smem.index(stage)
        mbarrier.wait(full.index(stage), phase)
        s_t = warpgroup_mma(k, q_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        dp_t = warpgroup_mma(v, grad.permute((1, 0)), none, use_acc=False, is_async=True)
        dk = warpgroup_mma(ds_operand, q_smem.index(before), dk, is_async=True)
        lse2 = row_terms(lse_smem.index(stage), BLOCK_M, COLUMNS)
        s_t = warpgroup_mma_wait(2, deps=(s_t,))
        p_t = hide(gl.exp2(s_t * scale2 - lse2[None, :]), row, count_smem, edges)
        p_operand = gl.convert_layout(p_t.to(DTYPE), OPERAND, assert_trivial=True)
        dv = warpgroup_mma(p_operand, grad, dv, is_async=True)
        dp_t, dk = warpgroup_mma_wait(1, deps=(dp_t, dk))
        mbarrier.arrive(empty.index(before), count=1)
        delta = row_terms(delta_smem.index(stage), BLOCK_M, COLUMNS)
        ds_t = (p_t * hide(dp_t - delta[None, :], row, count_smem, edges)).to(DTYPE)
        mbarrier.wait(ds_empty.index(slope_stage), slope_phase)
        ds_smem.index(slope_stage).slice(WARPGROUP * 64, 64, dim=0).store(ds_t)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(slope_stage), count=1)
        dv = warpgroup_mma_wait(0, deps=(dv,))
        ds_operand = gl.convert_layout(ds_t, OPERAND, assert_trivial=True)
    dk = warpgroup_mma(ds_operand, q_smem.index(stage), dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    first += WARPGROUP * 64
    if Q_SINK:
        store_tile_apart(dv_desc, dv_sink_desc, in_sinks, i_b, i_h, first, dv.to(DTYPE), v, D)
        tma.store_wait(0)
        store_tile_apart(dk_desc, dk_sink_desc, in_sinks, i_b, i_h, first, (dk * (scale2 * LN2)).to(DTYPE), v, D)
    else:
        store_tile(dv_desc, i_b, i_h, first, dv.to(DTYPE), v, D)
        tma.store_wait(0)
        store_tile(dk_desc, i_b, i_h, first, (dk * (scale2 * LN2)).to(DTYPE), v, D)
    tma.store_wait(0)


@gluon.jit
def _fold(k_smem, ds_smem, dq_smem, keys_full, ds_full, ds_empty, dq_full, dq_empty, i_work, pattern, shape,
    DOWN: gl.constexpr, Q_SINK: gl.constexpr,
):  # fmt: skip
    """Compute dQ = dS K of tile after tile and write it to where the adding warp reads it."""
    heads, group, kv_in_all, together = shape
    SLOPE_STAGES: gl.constexpr = ds_smem.shape[0]
    SUM_STAGES: gl.constexpr = dq_smem.shape[0]
    BLOCK_N: gl.constexpr = ds_smem.shape[1]
    BLOCK_M: gl.constexpr = ds_smem.shape[2]
    D: gl.constexpr = k_smem.shape[1]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    in_sinks, part, i_b, i_h, first, i_sums = work_of(i_work, pattern, shape, BLOCK_N, Q_SINK)
    tiles, _, _, _, _ = walk_grid(first, part, BLOCK_M, BLOCK_N, DOWN)
    none = gl.zeros([BLOCK_M, D], gl.float32, SUMS)
    stage = 0
    phase = 0
    sum_stage = 0
    sum_phase = 1
    mbarrier.wait(keys_full, 0)
    for _ in range(group * tiles):
        mbarrier.wait(ds_full.index(stage), phase)
        dq = warpgroup_mma(ds_smem.index(stage).permute((1, 0)), k_smem, none, use_acc=False, is_async=True)
        mbarrier.wait(dq_empty.index(sum_stage), sum_phase)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        mbarrier.arrive(ds_empty.index(stage), count=1)
        dq_smem.index(sum_stage).store(by_thread(dq))
        fence_async_shared()
        mbarrier.arrive(dq_full.index(sum_stage), count=1)
        stage, phase = next_stage(stage, phase, SLOPE_STAGES)
        sum_stage, sum_phase = next_stage(sum_stage, sum_phase, SUM_STAGES)


@gluon.jit(
    do_not_specialize=[
        "n", "block_size", "window", "sink", "grid_start", "heads", "group", "kv_in_all", "together",
    ]
)  # fmt: skip
def fused_narrow_kernel(
    q_desc, q_sink_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc, sum_desc,
    dk_desc, dv_desc, dk_sink_desc, dv_sink_desc, p_turns, p_ticket,
    scale2, n, block_size, window, sink, grid_start, heads, group, kv_in_all, together,
    BLOCK_M: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SLOPE_STAGES: gl.constexpr, SUM_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, SUM_REGISTERS: gl.constexpr,
    IN_TURN: gl.constexpr, DOWN: gl.constexpr, Q_SINK: gl.constexpr,
):  # fmt: skip
    """Own 128 keys of one kv head. Early tiles, the sinks among them, are seen by most and go first.

    In turn, a program waits for those that own earlier keys. So work is handed out by a counter, in that order: whoever
    is waited for has started, whatever the order in which the GPU starts programs.
    """
    BLOCK_N: gl.constexpr = 128
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [BLOCK_N, D], TILE)
    v_smem = gl.allocate_shared_memory(k_desc.dtype, [2, 64, D], TILE)
    q_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_M, D], TILE)
    grad_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_M, D], TILE)
    ds_smem = gl.allocate_shared_memory(k_desc.dtype, [SLOPE_STAGES, BLOCK_N, BLOCK_M], TILE)
    dq_smem = gl.allocate_shared_memory(gl.float32, [SUM_STAGES, BLOCK_M, D], sum_box(2))
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], row_box())
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], row_box())
    count_smem = counting(BLOCK_M)
    seen_smem = seen_buffer(2)
    keys_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [SLOPE_STAGES, 1], BARRIER)
    ds_empty = gl.allocate_shared_memory(gl.int64, [SLOPE_STAGES, 1], BARRIER)
    dq_full = gl.allocate_shared_memory(gl.int64, [SUM_STAGES, 1], BARRIER)
    dq_empty = gl.allocate_shared_memory(gl.int64, [SUM_STAGES, 1], BARRIER)
    mbarrier.init(keys_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(SLOPE_STAGES):
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=1)
    for i in gl.static_range(SUM_STAGES):
        mbarrier.init(dq_full.index(i), count=1)
        mbarrier.init(dq_empty.index(i), count=1)
    fence_async_shared()
    if IN_TURN:
        i_work = gl.atomic_add(p_ticket, 1)
    else:
        i_work = gl.program_id(0)
    inputs = (q_desc, q_sink_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc)
    loaded = (k_smem, v_smem, q_smem, grad_smem, lse_smem, delta_smem)
    outputs = (dk_desc, dv_desc, dk_sink_desc, dv_sink_desc)
    own = (count_smem, seen_smem, ds_smem)
    arrivals = (keys_full, full, empty)
    barriers = (ds_full, ds_empty)
    pattern = (n, block_size, window, sink, grid_start)
    shape = (heads, group, kv_in_all, together)
    gl.warp_specialize([
        (_consume, (outputs, loaded, own, arrivals, barriers, i_work, scale2, pattern, shape, DOWN, Q_SINK, 0)),
        (_consume, (outputs, loaded, own, arrivals, barriers, i_work, scale2, pattern, shape, DOWN, Q_SINK, 1)),
        (_fold, (k_smem, ds_smem, dq_smem, keys_full, ds_full, ds_empty, dq_full, dq_empty, i_work, pattern, shape,
                 DOWN, Q_SINK)),
        (load, (inputs, loaded, arrivals, i_work, pattern, shape, DOWN, Q_SINK)),
        (add, (sum_desc, dq_smem, dq_full, dq_empty, p_turns, i_work, pattern, shape,
               BLOCK_M, BLOCK_N, False, IN_TURN, DOWN, Q_SINK)),
    ], [4, 4, 1, 1], [REGISTERS, SUM_REGISTERS, 24, 24])  # fmt: skip
