"""All three gradients in one pass, five matmuls a tile instead of seven, for head dim 128.

A tile of 128 keys stays in shared memory while the queries that see it pass by. A consumer warpgroup owns 64 keys; the
slopes dS of both meet in shared memory, from where each computes half the columns of dQ. One more warp loads, and two
others add dQ to a sum in global memory, each the half of one consumer: none waits for what the others wait for. "_t"
marks transposed tiles (keys are rows).

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
from .backward_loader import load, told_place
from .backward_order import add, by_thread, sum_box
from .backward_ranges import hide_others, pattern_of, queries_of
from .backward_shared import (
    hide,
    keep_seen,
    row_box,
    row_terms,
    seen_buffer,
    send_gradients,
)
from .notes import notes_of, told
from .pipeline import counting, next_stage
from .starts import await_start, close_starts, open_starts, pass_start


@gluon.jit
def _issue_dq(ds, k):
    """Start dQ = dS K for half the columns; ds holds dS transposed."""
    BLOCK_M: gl.constexpr = ds.shape[1]
    HALF: gl.constexpr = k.shape[1]
    none = gl.zeros([BLOCK_M, HALF], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16]))
    return warpgroup_mma(ds.permute((1, 0)), k, none, use_acc=False, is_async=True)


@gluon.jit
def _hand_over(dq, buffer, empty, phase):
    """Write 64 columns of dQ to where the warp that adds them reads them."""
    mbarrier.wait(empty, phase)
    buffer.store(by_thread(dq))


@gluon.jit
def _announce(full):
    """Tell that what this consumer wrote to shared memory is there for the tensor cores and the copy engine."""
    fence_async_shared()
    mbarrier.arrive(full, count=1)


@gluon.jit
def _consume(
    outputs, loaded, own, arrivals, barriers, notes, scale2, pattern, shape,
    IN_TURN: gl.constexpr, Q_SINK: gl.constexpr, WARPGROUP: gl.constexpr,
):  # fmt: skip
    """Fold tile after tile of queries into dk and dv of 64 keys, and compute half of what the tile of keys adds to dQ:

    dQ = dS K of two tiles before | S^T = K Q^T | dP^T = V dO^T | P^T = exp2(S^T - lse) | dV += P^T dO |
    dS^T = P^T (dP^T - delta) | dK += dS^T Q

    The two consumers do their exponentials by turns, so that those of one run beside the matmuls of the other. (Where
    sums are added IN_TURN it is faster to begin a turn when S is issued. It ends with the exponentials there, too: the
    assembler moves them in front of where it is passed on.) That takes half a tile between them, and each needs the
    other's dS: so dQ comes two tiles late, and slopes have three slots. The first two dQ are made of whatever shared
    memory held, and dropped.

    dV is issued before dP is waited for: else the assembler moves that wait above the exponentials, and the tensor
    cores have nothing of this warpgroup's to do meanwhile.
    """
    k_smem, v_smem, q_smem, grad_smem, lse_smem, delta_smem = loaded
    count_smem, seen_smem, marks, ds_smem, dq_smem = own
    keys_full, full, empty = arrivals
    ds_full, dq_full, dq_empty = barriers
    heads, group, kv_in_all, together = shape
    DTYPE: gl.constexpr = q_smem.dtype
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    SLOTS: gl.constexpr = ds_smem.shape[0]
    D: gl.constexpr = k_smem.shape[1]
    HALF: gl.constexpr = D // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2)
    mbarrier.wait(keys_full, 0)
    in_sinks, i_b, i_h, first = told_place(notes, 0)
    count = group * told(notes, 0, 0)
    keys = first + WARPGROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    seen_from, seen_to = queries_of(keys, pattern_of(in_sinks, pattern) if Q_SINK else pattern)
    if Q_SINK:
        seen_to = hide_others(keys, seen_from, seen_to, in_sinks, pattern)
    seen = keep_seen(seen_from, seen_to, seen_smem, WARPGROUP)
    k = k_smem.slice(WARPGROUP * 64, 64, dim=0)
    k_columns = k_smem.slice(WARPGROUP * HALF, HALF, dim=1)
    v = v_smem.index(WARPGROUP)
    way_out = dq_smem.index(WARPGROUP)
    dq_full = dq_full.index(WARPGROUP)
    dq_empty = dq_empty.index(WARPGROUP)
    dk = gl.zeros([64, D], gl.float32, SUMS)
    dv = gl.zeros([64, D], gl.float32, SUMS)
    none = gl.zeros([64, BLOCK_M], gl.float32, SCORES)
    slot = 0
    two_before = 1
    phase = 1  # of slot two_before; not filled yet, a wait passes
    open_starts(2, True, WARPGROUP)
    for i in range(count):
        stage = i & 1
        q = q_smem.index(stage)
        grad = grad_smem.index(stage)
        dq = _issue_dq(ds_smem.index(two_before), k_columns)
        mbarrier.wait(full.index(stage), (i >> 1) & 1)
        await_start(IN_TURN, WARPGROUP)
        s_t = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
        dq = warpgroup_mma_wait(1, deps=(dq,))
        _hand_over(dq, way_out, dq_empty, stage ^ 1)
        dp_t = warpgroup_mma(v, grad.permute((1, 0)), none, use_acc=False, is_async=True)
        _announce(dq_full)
        lse2 = row_terms(lse_smem.index(stage), BLOCK_M, COLUMNS)
        row = told(marks, stage, 0)
        await_start(not IN_TURN, WARPGROUP)
        s_t = warpgroup_mma_wait(1, deps=(s_t,))
        pass_start(2, IN_TURN, WARPGROUP)
        p_t = hide(gl.exp2(s_t * scale2 - lse2[None, :]), row, count_smem, seen)
        pass_start(2, not IN_TURN, WARPGROUP)
        dv = warpgroup_mma(gl.convert_layout(p_t.to(DTYPE), OPERAND, assert_trivial=True), grad, dv, is_async=True)
        dp_t = warpgroup_mma_wait(1, deps=(dp_t,))
        delta = row_terms(delta_smem.index(stage), BLOCK_M, COLUMNS)
        ds_t = (p_t * hide(dp_t - delta[None, :], row, count_smem, seen)).to(DTYPE)
        dk = warpgroup_mma(gl.convert_layout(ds_t, OPERAND, assert_trivial=True), q, dk, is_async=True)
        # Once the other consumer has written dS of the tile before, it is through with what is overwritten here, and
        # the next dQ may read that dS.
        one_before, next_phase = next_stage(two_before, phase, SLOTS)
        mbarrier.wait(ds_full.index(one_before), next_phase)
        ds_smem.index(slot).slice(WARPGROUP * 64, 64, dim=0).store(ds_t)
        _announce(ds_full.index(slot))
        dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
        mbarrier.arrive(empty.index(stage), count=1)
        slot = two_before  # of three slots, the next tile's is that of two tiles before
        two_before = one_before
        phase = next_phase
    close_starts(True, WARPGROUP)
    for i in range(2):  # a loop, since the body written out twice spills
        mbarrier.wait(ds_full.index(two_before), phase)
        dq = _issue_dq(ds_smem.index(two_before), k_columns)
        dq = warpgroup_mma_wait(0, deps=(dq,))
        _hand_over(dq, way_out, dq_empty, ((count + i) & 1) ^ 1)
        _announce(dq_full)
        two_before, phase = next_stage(two_before, phase, SLOTS)
    # Asked of the loader: through the loop the answers would sit in registers.
    in_sinks, i_b, i_h, first = told_place(notes, 0)
    first += WARPGROUP * 64
    # Both warpgroups are through with the stage of queries that came before the last one: its q and dout are free.
    spare = (q_smem if WARPGROUP == 0 else grad_smem).index(count & 1)
    send_gradients(outputs, in_sinks, i_b, i_h, first, dk, dv, scale2, spare, v, False, Q_SINK)
    tma.store_wait(0)


@own_assembler
@gluon.jit(
    do_not_specialize=["n", "block_size", "window", "sink", "grid_start", "heads", "group", "kv_in_all", "together"]
)
def fused_kernel(
    q_desc, q_sink_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc, sum_desc,
    dk_desc, dv_desc, dk_sink_desc, dv_sink_desc, p_turns, p_ticket,
    scale2, n, block_size, window, sink, grid_start, heads, group, kv_in_all, together,
    BLOCK_M: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SLOPE_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, TURN_ROWS: gl.constexpr, Q_SINK: gl.constexpr,
):  # fmt: skip
    """Own 128 keys of one kv head. Early tiles, the sinks among them, are seen by most and go first.

    In turn, a program waits for those that own earlier keys. So work is handed out by a counter, in that order: whoever
    is waited for has started, whatever the order in which the GPU starts programs.
    """
    gl.static_assert((TURN_ROWS == 0) | (TURN_ROWS == BLOCK_M), "each tile of queries has turns of its own")
    gl.static_assert((BLOCK_M == 64) & (D == 128), "a tile of dQ is two halves [64, 64]")
    gl.static_assert(STAGES == 2, "stages are told by the parity of a tile's number")
    gl.static_assert(SLOPE_STAGES == 3, "dS of this tile, of the one before, and of that which dQ is made of")
    BLOCK_N: gl.constexpr = 128
    IN_TURN: gl.constexpr = TURN_ROWS > 0
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [BLOCK_N, D], TILE)
    v_smem = gl.allocate_shared_memory(k_desc.dtype, [2, 64, D], TILE)
    q_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_M, D], TILE)
    grad_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK_M, D], TILE)
    ds_smem = gl.allocate_shared_memory(k_desc.dtype, [SLOPE_STAGES, BLOCK_N, BLOCK_M], TILE)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2, 64, 64], sum_box(2))
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], row_box())
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], row_box())
    count_smem = counting(BLOCK_M)
    notes = notes_of(1)
    marks = notes_of(STAGES, 1)
    seen_smem = seen_buffer(2)
    keys_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [SLOPE_STAGES, 1], BARRIER)
    dq_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    dq_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(keys_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
        mbarrier.init(dq_full.index(i), count=1)  # one for each consumer: as many as stages
        mbarrier.init(dq_empty.index(i), count=1)
    for i in gl.static_range(SLOPE_STAGES):
        mbarrier.init(ds_full.index(i), count=2)
    fence_async_shared()
    if TURN_ROWS:
        i_work = gl.atomic_add(p_ticket, 1)
    else:
        i_work = gl.program_id(0)
    inputs = (q_desc, q_sink_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc)
    loaded = (k_smem, v_smem, q_smem, grad_smem, lse_smem, delta_smem)
    outputs = (dk_desc, dv_desc, dk_sink_desc, dv_sink_desc)
    own = (count_smem, seen_smem, marks, ds_smem, dq_smem)
    arrivals = (keys_full, full, empty)
    barriers = (ds_full, dq_full, dq_empty)
    pattern = (n, block_size, window, sink, grid_start)
    shape = (heads, group, kv_in_all, together)
    gl.warp_specialize([
        (_consume, (outputs, loaded, own, arrivals, barriers, notes, scale2, pattern, shape, IN_TURN, Q_SINK, 0)),
        (_consume, (outputs, loaded, own, arrivals, barriers, notes, scale2, pattern, shape, IN_TURN, Q_SINK, 1)),
        (load, (inputs, loaded, arrivals, notes, marks, i_work, pattern, shape, IN_TURN, Q_SINK)),
        (add, (sum_desc, dq_smem, dq_full, dq_empty, p_turns, i_work, pattern, shape,
               BLOCK_M, BLOCK_N, IN_TURN, Q_SINK, 0)),
        (add, (sum_desc, dq_smem, dq_full, dq_empty, p_turns, i_work, pattern, shape,
               BLOCK_M, BLOCK_N, IN_TURN, Q_SINK, 1)),
    ], [4, 1, 1, 1], [REGISTERS, 24, 24, 24])  # fmt: skip
