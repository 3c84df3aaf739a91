"""The gradients of keys and values: a tile of keys stays in shared memory while the queries that see it pass by.

A consumer warpgroup owns 64 keys. Scores are computed transposed (keys are rows), so that P^T and dS^T are in registers
where the next matmul wants its first operand. "_t" marks such tiles.
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
from .backward_ranges import latest_row, pattern_of, place_apart, queries_of, query_walk
from .backward_shared import (
    LN2,
    fold,
    keep_seen,
    load_queries,
    load_row_terms,
    operands,
    row_box,
    seen_buffer,
    slopes,
    slopes_beside,
    store_tile,
)
from .compat import box, tma_load
from .pipeline import counting, next_stage


@gluon.jit
def _key_tile(kv_heads, tiles, pattern, WARPGROUPS: gl.constexpr, Q_SINK: gl.constexpr):
    """Return (whether keys are sinks, pattern, batch row, kv head, first key) of this program; `tiles` of a head."""
    pid = gl.program_id(0)
    if Q_SINK:
        all_heads = gl.num_programs(0) // tiles
        in_sinks, i_b, i_h, first = place_apart(pid, kv_heads, all_heads, 1, pattern, WARPGROUPS * 64)
        return in_sinks, pattern_of(in_sinks, pattern), i_b, i_h, first
    else:
        i_kv = pid // tiles
        return False, pattern, i_kv // kv_heads, i_kv % kv_heads, pid % tiles * (WARPGROUPS * 64)


@gluon.jit
def _produce(inputs, buffers, barriers, pattern, shape, Q_SINK: gl.constexpr):
    """Load the keys and values once, then every tile of queries with its terms, head by head."""
    q_desc, q_sink_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc = inputs
    q_smem, grad_smem, k_smem, v_smem, lse_smem, delta_smem, _, _ = buffers
    keys_full, full, empty = barriers
    heads, group, tiles = shape
    WARPGROUPS: gl.constexpr = k_smem.shape[0]
    STAGES: gl.constexpr = q_smem.shape[0]
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    D: gl.constexpr = q_smem.shape[2]
    in_sinks, pattern, i_b, i_h, first = _key_tile(heads // group, tiles, pattern, WARPGROUPS, Q_SINK)
    start, stop, _, _ = query_walk(first, pattern, WARPGROUPS * 64)
    latest = latest_row(stop, pattern, BLOCK_M)
    all_heads = gl.num_programs(0) // tiles * group
    mbarrier.expect(keys_full, 2 * WARPGROUPS * 64 * D * 2)
    for w in gl.static_range(WARPGROUPS):
        tma_load(k_desc, [i_b, i_h, first + w * 64, 0], keys_full, box(k_smem.index(w), 64, D))
        tma_load(v_desc, [i_b, i_h, first + w * 64, 0], keys_full, box(v_smem.index(w), 64, D))
    stage = 0
    phase = 1
    for i_head in range(i_h * group, i_h * group + group):
        for walked in range(start, stop, BLOCK_M):
            row = gl.minimum(walked, latest)
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(ready, 2 * BLOCK_M * (D * 2 + 4))
            load_queries(q_desc, q_sink_desc, in_sinks, [i_b, i_head, row, 0], ready, q_smem.index(stage), Q_SINK)
            tma_load(grad_desc, [i_b, i_head, row, 0], ready, box(grad_smem.index(stage), BLOCK_M, D))
            load_row_terms(lse_desc, i_b * heads + i_head, all_heads, row, ready, lse_smem.index(stage))
            load_row_terms(delta_desc, i_b * heads + i_head, all_heads, row, ready, delta_smem.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _consume(outputs, buffers, barriers, scale2, pattern, shape, Q_SINK: gl.constexpr, WARPGROUP: gl.constexpr):
    """Fold tile after tile of queries into dk and dv of 64 keys:

    S^T = K Q^T | dP^T = V dO^T | P^T = exp2(S^T - lse) | dV += P^T dO | dS^T = P^T (dP^T - delta) | dK += dS^T Q

    Two warpgroups have registers to spare at head dim 64: dV and dK of a tile run beside S^T and dP^T of the next.
    """
    dk_desc, dv_desc, dk_sink_desc, dv_sink_desc = outputs
    q_smem, grad_smem, k_smem, v_smem, lse_smem, delta_smem, count_smem, seen_smem = buffers
    keys_full, full, empty = barriers
    heads, group, tiles = shape
    DTYPE: gl.constexpr = q_smem.dtype
    WARPGROUPS: gl.constexpr = k_smem.shape[0]
    STAGES: gl.constexpr = q_smem.shape[0]
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    D: gl.constexpr = q_smem.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    in_sinks, pattern, i_b, i_h, first = _key_tile(heads // group, tiles, pattern, WARPGROUPS, Q_SINK)
    start, stop, all_start, all_stop = query_walk(first, pattern, WARPGROUPS * 64)
    keys = first + WARPGROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    seen_from, seen_to = queries_of(keys, pattern)
    from_smem, to_smem = keep_seen(seen_from, seen_to, seen_smem, WARPGROUP)
    edges = (from_smem, to_smem, all_start, all_stop, latest_row(stop, pattern, BLOCK_M))
    count = group * ((stop - start + BLOCK_M - 1) // BLOCK_M)
    k = k_smem.index(WARPGROUP)
    v = v_smem.index(WARPGROUP)
    dk = gl.zeros([64, D], gl.float32, SUMS)
    dv = gl.zeros([64, D], gl.float32, SUMS)
    queries = (q_smem, grad_smem, lse_smem, delta_smem, count_smem)
    stage = 0
    phase = 0
    row = start
    mbarrier.wait(keys_full, 0)
    if D == 64:
        mbarrier.wait(full.index(0), 0)
        p_operand, ds_operand, _ds_t = operands(*slopes(k, v, queries, 0, row, edges, scale2, True), queries)
        for _ in range(count - 1):
            row += BLOCK_M
            row = gl.where(row < stop, row, start)
            p_operand, ds_operand, _ds_t, dk, dv, stage, phase = slopes_beside(
                k, v, queries, (full, empty), stage, phase, row, edges, scale2, p_operand, ds_operand, dk, dv,
                True, False, WARPGROUP,
            )  # fmt: skip
        dk, dv = fold(p_operand, ds_operand, queries, stage, dk, dv)
        dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    else:
        for _ in range(count):
            q = q_smem.index(stage)
            grad = grad_smem.index(stage)
            mbarrier.wait(full.index(stage), phase)
            p_t, ds_t = slopes(k, v, queries, stage, row, edges, scale2, True)
            dv = warpgroup_mma(gl.convert_layout(p_t.to(DTYPE), OPERAND, assert_trivial=True), grad, dv, is_async=True)
            dk = warpgroup_mma(gl.convert_layout(ds_t.to(DTYPE), OPERAND, assert_trivial=True), q, dk, is_async=True)
            dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, STAGES)
            row += BLOCK_M
            row = gl.where(row < stop, row, start)
    first += WARPGROUP * 64
    dk = (dk * (scale2 * LN2)).to(DTYPE)
    store_tile(dk_desc, dk_sink_desc, in_sinks, i_b, i_h, first, dk, k, Q_SINK)
    store_tile(dv_desc, dv_sink_desc, in_sinks, i_b, i_h, first, dv.to(DTYPE), v, Q_SINK)
    tma.store_wait(0)


@own_assembler
@gluon.jit(do_not_specialize=["n", "block_size", "window", "sink", "grid_start", "heads", "group", "tiles"])
def dkv_kernel(
    q_desc, q_sink_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc, dk_desc, dv_desc, dk_sink_desc, dv_sink_desc,
    scale2, n, block_size, window, sink, grid_start, heads, group, tiles,
    WARPGROUPS: gl.constexpr, BLOCK_M: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    Q_SINK: gl.constexpr,
):  # fmt: skip
    """Own WARPGROUPS x 64 keys of one kv head. Early tiles, the sinks among them, are seen by most and go first."""
    gl.static_assert(WARPGROUPS == 2, "consumers are spelled out below")
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [WARPGROUPS, 64, D], TILE)
    v_smem = gl.allocate_shared_memory(k_desc.dtype, [WARPGROUPS, 64, D], TILE)
    q_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_M, D], TILE)
    grad_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_M, D], TILE)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], row_box())
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], row_box())
    count_smem = counting(BLOCK_M)
    seen_smem = seen_buffer(WARPGROUPS)
    keys_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(keys_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WARPGROUPS)
    fence_async_shared()
    inputs = (q_desc, q_sink_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc)
    outputs = (dk_desc, dv_desc, dk_sink_desc, dv_sink_desc)
    buffers = (q_smem, grad_smem, k_smem, v_smem, lse_smem, delta_smem, count_smem, seen_smem)
    barriers = (keys_full, full, empty)
    pattern = (n, block_size, window, sink, grid_start)
    shape = (heads, group, tiles)
    gl.warp_specialize([
        (_consume, (outputs, buffers, barriers, scale2, pattern, shape, Q_SINK, 0)),
        (_consume, (outputs, buffers, barriers, scale2, pattern, shape, Q_SINK, 1)),
        (_produce, (inputs, buffers, barriers, pattern, shape, Q_SINK)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
