"""Decode for blocks that fill the GPU: persistent CTAs, each a producer and several consumers, walk a table of parts.

B rows of the call, L ring lanes, H query heads, Hkv key/value heads, N queries, S ring slots, D head dim,
W consumer warpgroups, R rounds of the table, P CTAs.

Key tiles are counted back from the end of the filled slots [0, valid): tile t holds the slots from valid - (t + 1) BN
up to valid - t BN. So no slot past `valid` is ever read, and the slots that the last tile holds below zero are filled
with zeros by the copy engine; that tile alone needs its scores masked.

Where sinks are read by queries of their own (Q_SINK), an item is two runs of tiles: sinks, counted back from their end,
then the other slots, whose last tile may reach into the sinks. Each run has its queries and masks its first tile.
"""

# ruff: noqa: RUF059, SIM102 (each function names all of a tuple that it gets; constants have an `if` of their own)

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
from .compat import allow_dependents, await_prerequisites, box, tma_load, tma_store
from .decode_plan import key_tiles_of_part, runs_of_part
from .pipeline import next_stage, overlaps
from .softmax import first_weights, hide_first, next_weights, rescale, row_state
from .starts import await_start, close_starts, open_starts, pass_start
from .weights import add_values, as_operand

# Of an item in the table: row, head, first query, low and high end of its part of the keys, unit, items of this CTA.
FIELDS = gl.constexpr(8)


@gluon.jit
def _item(table, sizes, i_round, BN: gl.constexpr, HAS_LANES: gl.constexpr, Q_SINK: gl.constexpr):
    """Read one item of this CTA: row, ring lane, head, first query, unit, run of sink tiles, run of other tiles.

    The part of the keys is a fraction of the ring's capacity, applied to what is filled. A run is (tiles, first slot,
    how far that lies behind the lowest slot that counts). The first slot is that of the part's last tile, with which
    the loop begins; the latter number is negative if the tile is the ragged one.
    """
    heads, group, n, slots, sink, slot_tiles, rounds, stride_valid, stride_lanes = sizes
    p_items, p_valid, p_lanes = table
    p_item = p_items + (i_round * gl.num_programs(0) + gl.program_id(0)) * FIELDS
    i_b = gl.load(p_item)
    i_h = gl.load(p_item + 1)
    i_n = gl.load(p_item + 2)
    low = gl.load(p_item + 3)
    high = gl.load(p_item + 4)
    unit = gl.load(p_item + 5)
    valid = gl.minimum(gl.load(p_valid + i_b.to(gl.int64) * stride_valid), slots).to(gl.int32)
    if HAS_LANES:
        lane = gl.load(p_lanes + i_b.to(gl.int64) * stride_lanes).to(gl.int32)
    else:
        lane = i_b
    if Q_SINK:
        of_sinks, others = runs_of_part(low, high, valid, sink, slot_tiles, BN)
        return i_b, lane, i_h, i_n, unit, of_sinks, others
    else:
        first, last = key_tiles_of_part(low, high, valid, slot_tiles, BN)
        slot = valid - last * BN
        return i_b, lane, i_h, i_n, unit, (0, 0, 0), (last - first, slot, slot)


@gluon.jit
def _copy_queries(desc, i_b, i_h, i_n, queries, q_stage, q_phase, W: gl.constexpr, Q_STAGES: gl.constexpr):
    """Copy the W * 64 query rows from i_n on."""
    q_smem, out_smem, q_full, q_empty = queries
    D: gl.constexpr = q_smem.shape[2]
    full = q_full.index(q_stage)
    mbarrier.wait(q_empty.index(q_stage), q_phase)
    mbarrier.expect(full, W * 64 * D * 2)
    for w in gl.static_range(W):
        tma_load(desc, [i_b, i_h, i_n + w * 64, 0], full, box(q_smem.index(q_stage * W + w), 64, D))
    return next_stage(q_stage, q_phase, Q_STAGES)


@gluon.jit
def _copy_keys(k_desc, v_desc, lane, i_kv, run, keys, stage, phase):
    """Copy the key and value tiles of a run."""
    k_smem, v_smem, k_bars, v_bars = keys
    k_full, k_empty = k_bars
    v_full, v_empty = v_bars
    STAGES: gl.constexpr = k_smem.shape[0]
    BN: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    tiles, slot, _ = run
    for _ in range(tiles):
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_full.index(stage), BN * D * 2)
        tma_load(k_desc, [lane, i_kv, slot, 0], k_full.index(stage), box(k_smem.index(stage), BN, D))
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_full.index(stage), BN * D * 2)
        tma_load(v_desc, [lane, i_kv, slot, 0], v_full.index(stage), box(v_smem.index(stage), BN, D))
        slot += BN
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _producer(
    inputs, table, sizes, queries, keys,
    W: gl.constexpr, BN: gl.constexpr, HAS_LANES: gl.constexpr, Q_SINK: gl.constexpr,
):  # fmt: skip
    """Copy each item's queries, then its key and value tiles in the order in which the consumers take them."""
    q_desc, q_sink_desc, k_desc, v_desc = inputs
    heads, group, n, slots, sink, slot_tiles, rounds, stride_valid, stride_lanes = sizes
    Q_STAGES: gl.constexpr = 2 if Q_SINK else 1
    stage = 0
    phase = 1
    q_stage = 0
    q_phase = 1
    for i_round in range(rounds):
        i_b, lane, i_h, i_n, unit, of_sinks, others = _item(table, sizes, i_round, BN, HAS_LANES, Q_SINK)
        if Q_SINK:
            if of_sinks[0] > 0:
                q_stage, q_phase = _copy_queries(q_sink_desc, i_b, i_h, i_n, queries, q_stage, q_phase, W, Q_STAGES)
            stage, phase = _copy_keys(k_desc, v_desc, lane, i_h // group, of_sinks, keys, stage, phase)
        if others[0] > 0:
            q_stage, q_phase = _copy_queries(q_desc, i_b, i_h, i_n, queries, q_stage, q_phase, W, Q_STAGES)
        stage, phase = _copy_keys(k_desc, v_desc, lane, i_h // group, others, keys, stage, phase)


@gluon.jit
def _scores(q, k, ZERO_LAYOUT: gl.constexpr, BN: gl.constexpr):
    """Issue S = Q K^T."""
    zero = gl.zeros([64, BN], gl.float32, ZERO_LAYOUT)
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _next_tile(
    q, run, acc, p, top, total, keys, stage, phase, scale2,
    W: gl.constexpr, BEGINS: gl.constexpr, TURNS: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """Fold in one more tile, which may begin a run.

    The matmul O += P V of the tile before it (in `stage`) is issued behind its scores. It runs beside their softmax if
    it `overlaps`.
    """
    k_smem, v_smem, k_bars, v_bars = keys
    k_full, k_empty = k_bars
    v_full, v_empty = v_bars
    BN: gl.constexpr = k_smem.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OVERLAP: gl.constexpr = overlaps(W)
    v_stage = stage
    v_phase = phase
    stage, phase = next_stage(stage, phase, k_smem.shape[0])
    mbarrier.wait(k_full.index(stage), phase)
    await_start(TURNS, ME)
    s = _scores(q, k_smem.index(stage), SCORES, BN)
    mbarrier.wait(v_full.index(v_stage), v_phase)
    acc = add_values(p, v_smem.index(v_stage), acc)
    pass_start(W, TURNS, ME)
    if OVERLAP:
        s = warpgroup_mma_wait(1, deps=(s,))
    else:
        s, acc = warpgroup_mma_wait(0, deps=(s, acc))
        mbarrier.arrive(v_empty.index(v_stage), count=1)
    mbarrier.arrive(k_empty.index(stage), count=1)
    if BEGINS:
        s = hide_first(s, run[2])
    p, top, total, fade = next_weights(s, top, total, scale2, q.dtype)
    if OVERLAP:
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(v_stage), count=1)
        p = as_operand(p, q.dtype, k_smem.shape[2])
    acc = rescale(acc, fade)
    return acc, p, top, total, stage, phase


@gluon.jit
def _first_run(of_sinks, others):
    """Return the first run that has tiles."""
    ahead = of_sinks[0] > 0
    tiles = gl.where(ahead, of_sinks[0], others[0])
    return tiles, gl.where(ahead, of_sinks[1], others[1]), gl.where(ahead, of_sinks[2], others[2])


@gluon.jit
def _attend(
    q, q_read, queries, q_stage, q_phase, keys, stage, phase, of_sinks, others, scale2,
    W: gl.constexpr, TURNS: gl.constexpr, ME: gl.constexpr, Q_SINK: gl.constexpr,
):  # fmt: skip
    """Run over the key tiles of an item: return the accumulator, the softmax's top and total, stages and phases.

    `q` are the queries of its first run; `q_read` takes note when they are no longer needed.
    """
    q_smem, out_smem, q_full, q_empty = queries
    k_smem, v_smem, k_bars, v_bars = keys
    k_full, k_empty = k_bars
    v_full, v_empty = v_bars
    STAGES: gl.constexpr = k_smem.shape[0]
    BN: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    Q_STAGES: gl.constexpr = q_smem.shape[0] // W
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    if Q_SINK:
        run = _first_run(of_sinks, others)
    else:
        run = others
    mbarrier.wait(k_full.index(stage), phase)
    await_start(TURNS, ME)
    s = _scores(q, k_smem.index(stage), SCORES, BN)
    pass_start(W, TURNS, ME)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    p, top, total = first_weights(hide_first(s, run[2]), scale2, q.dtype)
    if overlaps(W):
        p = as_operand(p, q.dtype, k_smem.shape[2])
    acc = gl.zeros([64, D], gl.float32, ACC)
    for _ in range(1, run[0]):
        acc, p, top, total, stage, phase = _next_tile(
            q, run, acc, p, top, total, keys, stage, phase, scale2, W, False, TURNS, ME
        )
    mbarrier.arrive(q_read, count=1)
    if Q_SINK:
        if (of_sinks[0] > 0) & (others[0] > 0):
            mbarrier.wait(q_full.index(q_stage), q_phase)
            q_others = q_smem.index(q_stage * W + ME)
            acc, p, top, total, stage, phase = _next_tile(
                q_others, others, acc, p, top, total, keys, stage, phase, scale2, W, True, TURNS, ME
            )
            for _ in range(1, others[0]):
                acc, p, top, total, stage, phase = _next_tile(
                    q_others, others, acc, p, top, total, keys, stage, phase, scale2, W, False, TURNS, ME
                )
            mbarrier.arrive(q_empty.index(q_stage), count=1)
            q_stage, q_phase = next_stage(q_stage, q_phase, Q_STAGES)
    mbarrier.wait(v_full.index(stage), phase)
    acc = add_values(p, v_smem.index(stage), acc)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(stage), count=1)
    stage, phase = next_stage(stage, phase, STAGES)
    return acc, top, total, stage, phase, q_stage, q_phase


@gluon.jit
def _pass_on(keys, stage, phase, tiles, W: gl.constexpr, TURNS: gl.constexpr, ME: gl.constexpr):
    """Give a run's tiles back unread: this consumer's rows lie past the last query."""
    k_smem, v_smem, k_bars, v_bars = keys
    STAGES: gl.constexpr = k_smem.shape[0]
    k_full, k_empty = k_bars
    v_full, v_empty = v_bars
    for _ in range(tiles):
        mbarrier.wait(k_full.index(stage), phase)
        await_start(TURNS, ME)
        pass_start(W, TURNS, ME)
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.wait(v_full.index(stage), phase)
        mbarrier.arrive(v_empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _consumer(
    results, table, sizes, scale2, queries, keys,
    W: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, TURNS: gl.constexpr, HAS_LANES: gl.constexpr,
    Q_SINK: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """Own 64 query rows of each item. A whole item goes to the output, a part of one to the workspace."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    heads, group, n, slots, sink, slot_tiles, rounds, stride_valid, stride_lanes = sizes
    out_desc, p_lse, p_part, p_part_lse = results
    q_smem, out_smem, q_full, q_empty = queries
    Q_STAGES: gl.constexpr = q_smem.shape[0] // W
    staged = out_smem.index(ME)
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, ACC))
    stage = 0
    phase = 0
    q_stage = 0
    q_phase = 0
    open_starts(W, TURNS, ME)
    for i_round in range(rounds):
        i_b, lane, i_h, i_n, unit, of_sinks, others = _item(table, sizes, i_round, BN, HAS_LANES, Q_SINK)
        i_n += ME * 64
        unit_rows = (unit + ME).to(gl.int64) * 64
        if of_sinks[0] + others[0] == 0:
            if unit >= 0:
                gl.store(p_part_lse + unit_rows + rows, gl.full([64], float("-inf"), gl.float32, rows.type.layout))
        else:
            mbarrier.wait(q_full.index(q_stage), q_phase)
            q = q_smem.index(q_stage * W + ME)
            q_read = q_empty.index(q_stage)
            q_stage, q_phase = next_stage(q_stage, q_phase, Q_STAGES)
            if i_n >= n:
                mbarrier.arrive(q_read, count=1)
                if Q_SINK:
                    stage, phase = _pass_on(keys, stage, phase, of_sinks[0], W, TURNS, ME)
                    if (of_sinks[0] > 0) & (others[0] > 0):
                        mbarrier.wait(q_full.index(q_stage), q_phase)
                        mbarrier.arrive(q_empty.index(q_stage), count=1)
                        q_stage, q_phase = next_stage(q_stage, q_phase, Q_STAGES)
                stage, phase = _pass_on(keys, stage, phase, others[0], W, TURNS, ME)
            else:
                acc, top, total, stage, phase, q_stage, q_phase = _attend(
                    q, q_read, queries, q_stage, q_phase, keys, stage, phase, of_sinks, others, scale2,
                    W, TURNS, ME, Q_SINK,
                )  # fmt: skip
                if i_round == rounds - 1:  # not earlier: CTAs of the merge would crowd the first idle multiprocessors
                    allow_dependents()
                top, total = row_state(top, total, gl.SliceLayout(1, ACC))
                lse = top + gl.log2(total)
                acc = acc * (1.0 / total)[:, None]
                if unit < 0:
                    p_row = p_lse + (i_b * heads + i_h).to(gl.int64) * n + i_n
                    gl.store(p_row + rows, lse * 0.6931471805599453, mask=rows + i_n < n)
                    tma.store_wait(0)
                    staged.store(acc.to(staged.dtype))
                    fence_async_shared()
                    tma_store(out_desc, [i_b, i_h, i_n, 0], box(staged, 64, D))
                else:
                    gl.store(p_part_lse + unit_rows + rows, lse)
                    columns = gl.arange(0, D, layout=gl.SliceLayout(0, ACC))
                    gl.store(p_part + unit_rows * D + (rows[:, None] * D + columns[None, :]), acc)
    close_starts(TURNS, ME)
    tma.store_wait(0)


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Return COUNT mbarriers that a copy completes (full) and as many that ARRIVALS consumers complete (empty)."""
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=ARRIVALS)
    return full, empty


@own_assembler
@gluon.jit(
    do_not_specialize=[
        "heads", "group", "n", "slots", "sink", "slot_tiles", "stride_valid", "stride_lanes",
    ],
    do_not_specialize_on_alignment=["p_valid", "p_lanes"],
)  # fmt: skip
def decode_persistent(
    q_desc, q_sink_desc, k_desc, v_desc, out_desc, p_lse, p_part, p_part_lse, p_items, p_valid, p_lanes,
    heads, group, n, slots, sink, slot_tiles, stride_valid, stride_lanes, scale2,
    W: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    REGISTERS: gl.constexpr, HAS_LANES: gl.constexpr, Q_SINK: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Set up the shared buffers, then split into the producer and W consumers of 64 query rows each.

    The items of this CTA are the first ones of column `program_id` of the table [R, P].
    """
    TILES: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    Q_STAGES: gl.constexpr = 2 if Q_SINK else 1
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [Q_STAGES * W, 64, D], TILES)
    k_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BN, D], TILES)
    v_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, BN, D], TILES)
    out_smem = gl.allocate_shared_memory(q_desc.dtype, [W, 64, D], TILES)
    q_full, q_empty = _barriers(Q_STAGES, W)
    keys = (k_smem, v_smem, _barriers(STAGES, W), _barriers(STAGES, W))
    fence_async_shared()
    rounds = gl.load(p_items + gl.program_id(0) * FIELDS + 6)  # the table is older than the kernels before this one
    await_prerequisites()
    inputs = (q_desc, q_sink_desc, k_desc, v_desc)
    sizes = (heads, group, n, slots, sink, slot_tiles, rounds, stride_valid, stride_lanes)
    table = (p_items, p_valid, p_lanes)
    queries = (q_smem, out_smem, q_full, q_empty)
    results = (out_desc, p_lse, p_part, p_part_lse)
    # The partitions are spelled out because Gluon takes no list that is built, and no tuple that holds a constexpr.
    # fmt: off
    if W == 2:
        gl.warp_specialize([
            (_consumer, (results, table, sizes, scale2, queries, keys, W, BN, D, TURNS, HAS_LANES, Q_SINK, 0)),
            (_consumer, (results, table, sizes, scale2, queries, keys, W, BN, D, TURNS, HAS_LANES, Q_SINK, 1)),
            (_producer, (inputs, table, sizes, queries, keys, W, BN, HAS_LANES, Q_SINK)),
        ], [4, 1], [REGISTERS, 24])
    elif W == 3:
        gl.warp_specialize([
            (_consumer, (results, table, sizes, scale2, queries, keys, W, BN, D, TURNS, HAS_LANES, Q_SINK, 0)),
            (_consumer, (results, table, sizes, scale2, queries, keys, W, BN, D, TURNS, HAS_LANES, Q_SINK, 1)),
            (_consumer, (results, table, sizes, scale2, queries, keys, W, BN, D, TURNS, HAS_LANES, Q_SINK, 2)),
            (_producer, (inputs, table, sizes, queries, keys, W, BN, HAS_LANES, Q_SINK)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])
    else:
        gl.warp_specialize([
            (_consumer, (results, table, sizes, scale2, queries, keys, W, BN, D, TURNS, HAS_LANES, Q_SINK, 0)),
            (_consumer, (results, table, sizes, scale2, queries, keys, W, BN, D, TURNS, HAS_LANES, Q_SINK, 1)),
            (_consumer, (results, table, sizes, scale2, queries, keys, W, BN, D, TURNS, HAS_LANES, Q_SINK, 2)),
            (_consumer, (results, table, sizes, scale2, queries, keys, W, BN, D, TURNS, HAS_LANES, Q_SINK, 3)),
            (_producer, (inputs, table, sizes, queries, keys, W, BN, HAS_LANES, Q_SINK)),
        ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24])
    # fmt: on
