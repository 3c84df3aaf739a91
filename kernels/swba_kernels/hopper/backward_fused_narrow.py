"""All three gradients in one pass, five matmuls a tile instead of seven, for head dim 64.

A tile of 128 keys stays in shared memory while the queries that see it pass by. A consumer warpgroup owns 64 keys; the
slopes dS of both go through a ring in shared memory to a third warpgroup, which computes dQ and adds it to a sum in
global memory. So the consumers need nothing of each other; where sums are added in turn, they start by turns. When a
tile of keys is through, the CTA goes on with another one, whose first matmuls have been loaded for. "_t" marks
transposed tiles (keys are rows).

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

from .assembler import own_assembler
from .backward_loader import load_pieces, told_place, told_walk, told_work
from .backward_order import await_turn, by_thread, pass_turn, sum_box
from .backward_ranges import (
    all_start_without_others,
    first_tile,
    hide_others,
    next_row,
    number_of,
    pattern_of,
    queries_of,
    walk_grid,
    work_of,
)
from .backward_shared import fold, operands, row_box, send_gradients, slopes, slopes_beside
from .compat import cta_barrier, tma_add, tma_store, view
from .notes import notes_of, told
from .pipeline import counting, next_stage
from .starts import close_starts, open_starts


@gluon.jit
def _hand_on(ds_t, ds_smem, barriers, stage, phase, WARPGROUP: gl.constexpr):
    """Leave the slopes of 64 keys for the warpgroup that makes dQ of them; return the next stage and its phase."""
    ds_full, ds_empty = barriers
    mbarrier.wait(ds_empty.index(stage), phase)
    ds_smem.index(stage).slice(WARPGROUP * 64, 64, dim=0).store(ds_t)
    fence_async_shared()
    mbarrier.arrive(ds_full.index(stage), count=1)
    return next_stage(stage, phase, ds_smem.shape[0])


@gluon.jit
def _consume(
    outputs, loaded, own, arrivals, barriers, notes, scale2, pattern, shape,
    IN_TURN: gl.constexpr, Q_SINK: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """Fold tile after tile of queries into dk and dv of 64 keys, and hand on dS:

    S^T = K Q^T | dP^T = V dO^T | P^T = exp2(S^T - lse) | dV += P^T dO | dS^T = P^T (dP^T - delta) | dK += dS^T Q

    dV and dK of a tile run beside S^T and dP^T of the next one. Where sums are added IN_TURN, a consumer starts
    these when the matmuls of the other have ended.
    """
    k_smem, v_smem, q_smem, grad_smem, lse_smem, delta_smem = loaded
    count_smem, ds_smem = own
    keys_full, keys_empty, full, empty = arrivals
    heads, group, kv_in_all, together = shape
    KEY_STAGES: gl.constexpr = k_smem.shape[0]
    STAGES: gl.constexpr = q_smem.shape[0]
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    BLOCK_N: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    queries = (q_smem, grad_smem, lse_smem, delta_smem, count_smem)
    stage = 0
    phase = 0
    slope_stage = 0
    slope_phase = 1
    key_stage = 0
    key_phase = 0
    mbarrier.wait(keys_full.index(0), 0)
    more = told(notes, 0, 0) > 0
    open_starts(2, IN_TURN, WARPGROUP)
    while more:
        in_sinks, i_b, i_h, first = told_place(notes, key_stage)
        tiles, from_row, to_row, all_start, all_stop = told_walk(notes, key_stage)
        keys = first + WARPGROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
        seen_from, seen_to = queries_of(keys, pattern_of(in_sinks, pattern) if Q_SINK else pattern)
        if Q_SINK:
            seen_to = hide_others(keys, seen_from, seen_to, in_sinks, pattern)
            all_start = all_start_without_others(all_start, first, in_sinks, pattern, BLOCK_N)
        edges = (seen_from, seen_to, all_start, all_stop, 0)
        k = k_smem.index(key_stage).slice(WARPGROUP * 64, 64, dim=0)
        v = v_smem.index(key_stage * 2 + WARPGROUP)
        dk = gl.zeros([64, D], gl.float32, SUMS)
        dv = gl.zeros([64, D], gl.float32, SUMS)
        row = from_row
        mbarrier.wait(full.index(stage), phase)
        p_operand, ds_operand, ds_t = operands(*slopes(k, v, queries, stage, row, edges, scale2, False), queries)
        slope_stage, slope_phase = _hand_on(ds_t, ds_smem, barriers, slope_stage, slope_phase, WARPGROUP)
        for _ in range(group * tiles - 1):
            row = next_row(row, from_row, to_row, BLOCK_M, IN_TURN)
            p_operand, ds_operand, ds_t, dk, dv, stage, phase = slopes_beside(
                k, v, queries, (full, empty), stage, phase, row, edges, scale2, p_operand, ds_operand, dk, dv,
                False, IN_TURN, WARPGROUP,
            )  # fmt: skip
            slope_stage, slope_phase = _hand_on(ds_t, ds_smem, barriers, slope_stage, slope_phase, WARPGROUP)
        dk, dv = fold(p_operand, ds_operand, queries, stage, dk, dv)
        dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
        # Asked again: through the loop the answers would sit in registers.
        in_sinks, i_b, i_h, first = told_place(notes, key_stage)
        v = v_smem.index(key_stage * 2 + WARPGROUP)
        send_gradients(outputs, in_sinks, i_b, i_h, first + WARPGROUP * 64, dk, dv, scale2, v, v, True, Q_SINK)
        tma.store_wait(0)
        mbarrier.arrive(keys_empty.index(key_stage), count=1)
        key_stage, key_phase = next_stage(key_stage, key_phase, KEY_STAGES)
        mbarrier.wait(keys_full.index(key_stage), key_phase)
        more = told(notes, key_stage, 0) > 0
    close_starts(IN_TURN, WARPGROUP)


@gluon.jit
def _fold_and_add(
    sum_desc, k_smem, ds_smem, dq_smem, key_barriers, barriers, p_turns, notes, pattern, shape,
    TURN_ROWS: gl.constexpr, Q_SINK: gl.constexpr,
):  # fmt: skip
    """Compute dQ = dS K of tile after tile and add it to the sums in global memory.

    In turn, a counter serves TURN_ROWS queries, and the first tile of keys that meets a tile of them writes instead of
    adding. A turn is passed on one tile late, when what was added has arrived. dQ goes out by two buffers.
    """
    IN_TURN: gl.constexpr = TURN_ROWS > 0
    ds_full, ds_empty = barriers
    keys_full, keys_empty = key_barriers
    heads, group, kv_in_all, together = shape
    n, _, _, _, _ = pattern
    KEY_STAGES: gl.constexpr = k_smem.shape[0]
    SLOPE_STAGES: gl.constexpr = ds_smem.shape[0]
    BLOCK_N: gl.constexpr = ds_smem.shape[1]
    BLOCK_M: gl.constexpr = ds_smem.shape[2]
    D: gl.constexpr = k_smem.shape[2]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    none = gl.zeros([BLOCK_M, D], gl.float32, SUMS)
    buffer = 0
    stage = 0
    phase = 0
    key_stage = 0
    key_phase = 0
    mbarrier.wait(keys_full.index(0), 0)
    more = told(notes, 0, 0) > 0
    while more:
        i_work = told_work(notes, key_stage)
        in_sinks, part, i_b, i_h, first, i_sums = work_of(i_work, pattern, shape, BLOCK_N, Q_SINK)
        tiles, from_row, to_row, _, _ = walk_grid(first, part, BLOCK_M, BLOCK_N, IN_TURN)
        k = k_smem.index(key_stage)
        i_head = i_h * group
        row = from_row
        if TURN_ROWS:
            tile, origin = number_of(first, in_sinks, pattern, BLOCK_N, Q_SINK)
            p_turn = p_turns  # of the turn that this program has: none yet
            ended = False
        for _ in range(group * tiles):
            mbarrier.wait(ds_full.index(stage), phase)
            dq = warpgroup_mma(ds_smem.index(stage).permute((1, 0)), k, none, use_acc=False, is_async=True)
            dq = warpgroup_mma_wait(0, deps=(dq,))
            mbarrier.arrive(ds_empty.index(stage), count=1)
            stage, phase = next_stage(stage, phase, SLOPE_STAGES)
            tma.store_wait(1)
            cta_barrier()
            dq_smem.index(buffer).store(by_thread(dq))
            fence_async_shared()
            cta_barrier()
            at = [i_sums, i_head, row, 0]
            way_out = view(dq_smem.index(buffer), [1, 1, BLOCK_M, 64], sum_box(4))
            buffer ^= 1
            if TURN_ROWS:
                if ended:
                    pass_turn(p_turn, tile + 1, 0)
                if (row == from_row) | ((row + BLOCK_M) % TURN_ROWS == 0):
                    counters = (n + TURN_ROWS - 1) // TURN_ROWS
                    p_turn = p_turns + (i_sums * heads + i_head) * counters + row // TURN_ROWS
                    await_turn(p_turn, tile)
                if first_tile(row, origin, part, BLOCK_N) == tile:
                    tma_store(sum_desc, at, way_out)
                else:
                    tma_add(sum_desc, at, way_out)
                ended = (row == to_row) | (row % TURN_ROWS == 0)
            else:
                tma_add(sum_desc, at, way_out)
            i_head += (row == to_row).to(gl.int32)
            row = next_row(row, from_row, to_row, BLOCK_M, IN_TURN)
        if TURN_ROWS:
            pass_turn(p_turn, tile + 1, 0)
        mbarrier.arrive(keys_empty.index(key_stage), count=1)
        key_stage, key_phase = next_stage(key_stage, key_phase, KEY_STAGES)
        mbarrier.wait(keys_full.index(key_stage), key_phase)
        more = told(notes, key_stage, 0) > 0
    tma.store_wait(0)


@own_assembler
@gluon.jit(
    do_not_specialize=[
        "n", "block_size", "window", "sink", "grid_start", "heads", "group", "kv_in_all", "together", "all_work",
    ]
)  # fmt: skip
def fused_narrow_kernel(
    q_desc, q_sink_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc, sum_desc,
    dk_desc, dv_desc, dk_sink_desc, dv_sink_desc, p_turns, p_ticket,
    scale2, n, block_size, window, sink, grid_start, heads, group, kv_in_all, together, all_work,
    BLOCK_M: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SLOPE_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, SUM_REGISTERS: gl.constexpr,
    TURN_ROWS: gl.constexpr, Q_SINK: gl.constexpr,
):  # fmt: skip
    """Own 128 keys of one kv head, and then others. Early tiles, the sinks among them, are seen by most and go first.

    Work is handed out by a counter, in that order, since a program that adds in turn waits for those that own earlier
    keys: whoever is waited for has started, or will when it has done what is earlier still.
    """
    BLOCK_N: gl.constexpr = 128
    IN_TURN: gl.constexpr = TURN_ROWS > 0
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [2, BLOCK_N, D], TILE)
    v_smem = gl.allocate_shared_memory(k_desc.dtype, [4, 64, D], TILE)
    q_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_M, D], TILE)
    grad_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_M, D], TILE)
    ds_smem = gl.allocate_shared_memory(k_desc.dtype, [SLOPE_STAGES, BLOCK_N, BLOCK_M], TILE)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2, 64, 64], sum_box(2))
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], row_box())
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], row_box())
    count_smem = counting(BLOCK_M)
    notes = notes_of(2)
    keys_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    keys_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [SLOPE_STAGES, 1], BARRIER)
    ds_empty = gl.allocate_shared_memory(gl.int64, [SLOPE_STAGES, 1], BARRIER)
    for i in gl.static_range(2):
        mbarrier.init(keys_full.index(i), count=1)
        mbarrier.init(keys_empty.index(i), count=3)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(SLOPE_STAGES):
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_empty.index(i), count=1)
    fence_async_shared()
    inputs = (q_desc, q_sink_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc)
    loaded = (k_smem, v_smem, q_smem, grad_smem, lse_smem, delta_smem)
    outputs = (dk_desc, dv_desc, dk_sink_desc, dv_sink_desc)
    own = (count_smem, ds_smem)
    arrivals = (keys_full, keys_empty, full, empty)
    barriers = (ds_full, ds_empty)
    pattern = (n, block_size, window, sink, grid_start)
    shape = (heads, group, kv_in_all, together)
    gl.warp_specialize([
        (_consume, (outputs, loaded, own, arrivals, barriers, notes, scale2, pattern, shape, IN_TURN, Q_SINK, 0)),
        (_consume, (outputs, loaded, own, arrivals, barriers, notes, scale2, pattern, shape, IN_TURN, Q_SINK, 1)),
        (_fold_and_add, (sum_desc, k_smem, ds_smem, dq_smem, (keys_full, keys_empty), barriers, p_turns, notes,
                         pattern, shape, TURN_ROWS, Q_SINK)),
        (load_pieces, (inputs, loaded, arrivals, notes, p_ticket, all_work, pattern, shape, IN_TURN, Q_SINK)),
    ], [4, 4, 1], [REGISTERS, SUM_REGISTERS, 24])  # fmt: skip
