"""Forward attention over the block window on Hopper, for training and for prefill on top of a ring's history.

One CTA is a producer (one warp's worth of work: it copies tiles by TMA) and GROUPS consumers (warpgroups of 4 warps, 64
query rows each, that share the key tiles). CTAs are persistent and walk the work items of forward_plan.py.

B batch, H query heads, Hkv key/value heads, N tokens, D head dim, L ring lanes, S ring slots.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..portable.forward import LOG2E, Ring
from .compat import box, cta_barrier, named_arrive, named_sync, tma_load, tma_store
from .forward_plan import item_of, own_keys, place_of, plan_forward, ring_keys, rounds_of, rows_of
from .launch import descriptor, multiprocessors
from .softmax import first_weights, next_weights, rescale

TURN = gl.constexpr(12)  # hardware barriers TURN + i: consumer i may start its matmuls


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    """Step through a ring of buffers; the phase flips whenever it wraps."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _item(i, shape, plan, ROWS: gl.constexpr):
    """Return (row of the batch, head, first query row, end of its block) of this CTA's i-th work item."""
    heads, kv_heads, batch_heads, n, block_size, window, sink, grid_start, slots = shape
    blocks, per_block, last_tiles, heavy, light = plan
    item = item_of(i, gl.program_id(0), gl.num_programs(0))
    head, block, tile = place_of(item, batch_heads, blocks, per_block, last_tiles, heavy, light)
    first, end = rows_of(block, tile, n, block_size, grid_start, ROWS)
    return head // heads, head % heads, first, end


@gluon.jit
def _rounds(shape, plan):
    """Return the number of this CTA's work items."""
    heads, kv_heads, batch_heads, n, block_size, window, sink, grid_start, slots = shape
    blocks, per_block, last_tiles, heavy, light = plan
    return rounds_of(batch_heads * (heavy + light), gl.program_id(0), gl.num_programs(0))


@gluon.jit
def _keys(i_b, end, p_position, shape, RING: gl.constexpr):
    """Return what a block sees: own keys [first, end) and [0, sinks), slots [start, start + count) and [0, low)."""
    heads, kv_heads, batch_heads, n, block_size, window, sink, grid_start, slots = shape
    if RING:
        position = gl.load(p_position + i_b)
        start, count, low = ring_keys(position, end, window, sink, slots)
        first, sinks = own_keys(end, window, max(sink - position, 0).to(gl.int32))
        return first, sinks, start.to(gl.int32), count.to(gl.int32), low.to(gl.int32)
    else:
        first, sinks = own_keys(end, window, sink)
        return first, sinks, 0, 0, 0


@gluon.jit
def _load_keys(k_desc, v_desc, i_b, i_h, start, count, buffers, bars, stage, phase):
    """Copy the keys and values [start, start + count), last tile first.

    That first one is the ragged one. It ends where the keys end and overlaps the second (or reaches below `start`).
    """
    q_smem, k_smem, v_smem, out_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    STAGES: gl.constexpr = k_smem.shape[0]
    COLUMNS: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    tiles = (count + COLUMNS - 1) // COLUMNS
    row = start + count - COLUMNS
    for j in range(tiles):
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_full.index(stage), COLUMNS * D * 2)
        tma_load(k_desc, [i_b, i_h, row, 0], k_full.index(stage), box(k_smem.index(stage), COLUMNS, D))
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_full.index(stage), COLUMNS * D * 2)
        tma_load(v_desc, [i_b, i_h, row, 0], v_full.index(stage), box(v_smem.index(stage), COLUMNS, D))
        row = start + (tiles - 2 - j) * COLUMNS
        stage, phase = _advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _producer(inputs, buffers, bars, work, SINKS: gl.constexpr, RING: gl.constexpr, LANES: gl.constexpr):
    """Copy, for each work item, its query tile and then its key and value tiles in the order the consumers take them."""
    q_desc, k_desc, v_desc, ring_k_desc, ring_v_desc = inputs
    q_smem, k_smem, v_smem, out_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    p_position, p_lanes, shape, plan = work
    heads, kv_heads, batch_heads, n, block_size, window, sink, grid_start, slots = shape
    GROUPS: gl.constexpr = out_smem.shape[0]
    D: gl.constexpr = out_smem.shape[2]
    stage = 0
    phase = 1
    q_stage = 0
    q_phase = 1
    for i in range(_rounds(shape, plan)):
        i_b, i_h, first_row, end = _item(i, shape, plan, GROUPS * 64)
        first, sinks, start, count, low = _keys(i_b, end, p_position, shape, RING)
        mbarrier.wait(q_empty.index(q_stage), q_phase)
        mbarrier.expect(q_full.index(q_stage), GROUPS * 64 * D * 2)
        for g in gl.static_range(GROUPS):
            q_box = box(q_smem.index(q_stage * GROUPS + g), 64, D)
            tma_load(q_desc, [i_b, i_h, first_row + g * 64, 0], q_full.index(q_stage), q_box)
        q_stage, q_phase = _advance(q_stage, q_phase, q_full.shape[0])
        i_kv = i_h // (heads // kv_heads)
        stage, phase = _load_keys(k_desc, v_desc, i_b, i_kv, first, end - first, buffers, bars, stage, phase)
        if SINKS:
            stage, phase = _load_keys(k_desc, v_desc, i_b, i_kv, 0, sinks, buffers, bars, stage, phase)
        if RING:
            lane = i_b
            if LANES:
                lane = gl.load(p_lanes + i_b).to(gl.int32)
            stage, phase = _load_keys(ring_k_desc, ring_v_desc, lane, i_kv, start, count, buffers, bars, stage, phase)
            stage, phase = _load_keys(ring_k_desc, ring_v_desc, lane, i_kv, 0, low, buffers, bars, stage, phase)


@gluon.jit
def _clear_rows(v, rows):
    """Zero the first `rows` rows of a value tile: its keys are fewer than a tile, and 0 * NaN would be NaN.

    Every consumer does it for itself. They write the same, and none gives the buffer back before it is done.
    """
    D: gl.constexpr = v.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    for c in gl.static_range(v.shape[0] // 16):
        if c * 16 < rows:
            part = v.slice(c * 16, 16)
            keep = c * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, LAYOUT)) >= rows
            x = part.load(LAYOUT)
            part.store(gl.where(keep[:, None], x, gl.zeros_like(x)))
    fence_async_shared()
    cta_barrier()


@gluon.jit
def _hide(s, count):
    """Mask the columns of a ragged tile that its `count` keys do not reach; return also how many these are."""
    COLUMNS: gl.constexpr = s.shape[1]
    hidden = (count + COLUMNS - 1) // COLUMNS * COLUMNS - count
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, s.type.layout))
    return gl.where((column >= hidden)[None, :], s, float("-inf")), hidden


@gluon.jit
def _issue_scores(q, k):
    """Start S = Q K^T for 64 rows and one key tile."""
    COLUMNS: gl.constexpr = k.shape[0]
    zero = gl.zeros([64, COLUMNS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16]))
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _first_tile(q, count, scale2, buffers, bars, stage, phase, TURNS: gl.constexpr, GROUP: gl.constexpr):
    """Start an item: the weights of its first tile, a ragged one."""
    q_smem, k_smem, v_smem, out_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    mbarrier.wait(k_full.index(stage), phase)
    if TURNS:
        named_sync(TURN + GROUP, 256)
    s = _issue_scores(q, k_smem.index(stage))
    if TURNS:
        named_arrive(TURN + (GROUP + 1) % out_smem.shape[0], 256)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    s, hidden = _hide(s, count)
    if count < k_smem.shape[1]:
        mbarrier.wait(v_full.index(stage), phase)
        _clear_rows(v_smem.index(stage), hidden)
    return first_weights(s, scale2)


@gluon.jit
def _next_tile(
    q, count, scale2, acc, p, top, total, buffers, bars, stage, phase,
    RAGGED: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Issue the scores of one more tile, then the matmul of the tile before it (in `stage`), whose weights are p."""
    q_smem, k_smem, v_smem, out_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    last = stage
    last_phase = phase
    stage, phase = _advance(stage, phase, k_smem.shape[0])
    mbarrier.wait(k_full.index(stage), phase)
    if TURNS:
        named_sync(TURN + GROUP, 256)
    s = _issue_scores(q, k_smem.index(stage))
    mbarrier.wait(v_full.index(last), last_phase)
    acc = warpgroup_mma(p, v_smem.index(last), acc, is_async=True)
    if TURNS:
        named_arrive(TURN + (GROUP + 1) % out_smem.shape[0], 256)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    if RAGGED:
        s, hidden = _hide(s, count)
    weights, top, total, fade = next_weights(s, top, total, scale2)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(last), count=1)
    acc = rescale(acc, fade)
    p = gl.convert_layout(weights.to(p.dtype), p.type.layout, assert_trivial=True)
    if RAGGED:
        if count < k_smem.shape[1]:
            mbarrier.wait(v_full.index(stage), phase)
            _clear_rows(v_smem.index(stage), hidden)
    return acc, p, top, total, stage, phase


@gluon.jit
def _attend(
    q, counts, scale2, buffers, bars, q_stage, stage, phase,
    SEGMENTS: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Attend from 64 query rows to the tiles of all segments: return (sum of weighted values, top, total)."""
    q_smem, k_smem, v_smem, out_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    own, sinks, ring, low = counts
    COLUMNS: gl.constexpr = k_smem.shape[1]
    D: gl.constexpr = k_smem.shape[2]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    acc = gl.zeros([64, D], gl.float32, ACC)
    weights, top, total = _first_tile(q, own, scale2, buffers, bars, stage, phase, TURNS, GROUP)
    p = gl.convert_layout(weights.to(q.dtype), gl.DotOperandLayout(0, ACC, 2), assert_trivial=True)
    for _ in range((own - 1) // COLUMNS):
        acc, p, top, total, stage, phase = _next_tile(
            q, own, scale2, acc, p, top, total, buffers, bars, stage, phase, False, TURNS, GROUP
        )
    for i in range(1, SEGMENTS):
        count = sinks if i == 1 else (ring if i == 2 else low)
        if count > 0:
            acc, p, top, total, stage, phase = _next_tile(
                q, count, scale2, acc, p, top, total, buffers, bars, stage, phase, True, TURNS, GROUP
            )
        for _ in range((count + COLUMNS - 1) // COLUMNS - 1):
            acc, p, top, total, stage, phase = _next_tile(
                q, count, scale2, acc, p, top, total, buffers, bars, stage, phase, False, TURNS, GROUP
            )
    mbarrier.arrive(q_empty.index(q_stage), count=1)
    mbarrier.wait(v_full.index(stage), phase)
    acc = warpgroup_mma(p, v_smem.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(stage), count=1)
    stage, phase = _advance(stage, phase, k_smem.shape[0])
    return acc, top, total, stage, phase


@gluon.jit
def _sit_out(counts, buffers, bars, q_stage, stage, phase, TURNS: gl.constexpr, GROUP: gl.constexpr):
    """Give every tile of an item back unread: the item has no rows for this consumer."""
    q_smem, k_smem, v_smem, out_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    own, sinks, ring, low = counts
    COLUMNS: gl.constexpr = k_smem.shape[1]
    mbarrier.arrive(q_empty.index(q_stage), count=1)
    tiles = (own + COLUMNS - 1) // COLUMNS + (sinks + COLUMNS - 1) // COLUMNS
    tiles += (ring + COLUMNS - 1) // COLUMNS + (low + COLUMNS - 1) // COLUMNS
    for _ in range(tiles):
        mbarrier.wait(k_full.index(stage), phase)
        if TURNS:
            named_sync(TURN + GROUP, 256)
            named_arrive(TURN + (GROUP + 1) % out_smem.shape[0], 256)
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.wait(v_full.index(stage), phase)
        mbarrier.arrive(v_empty.index(stage), count=1)
        stage, phase = _advance(stage, phase, k_smem.shape[0])
    return stage, phase


@gluon.jit
def _write(acc, top, total, i_b, i_h, row, end, smem, outputs, shape):
    """Store 64 rows of out and lse from `row` on, those before `end`: by TMA unless that would touch the next block."""
    out_desc, p_out, p_lse, s_ob, s_oh, s_on = outputs
    heads, kv_heads, batch_heads, n, block_size, window, sink, grid_start, slots = shape
    ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    lse = (top + gl.log2(total)) * 0.6931471805599453
    rows = row + gl.arange(0, 64, layout=top.type.layout)
    gl.store(p_lse + (i_b * heads + i_h).to(gl.int64) * n + rows, lse, mask=rows < end)
    share = gl.convert_layout(1.0 / total, ROWS, assert_trivial=True)
    out = (acc * share[:, None]).to(smem.dtype)
    if (row + 64 <= end) | (end == n):
        tma.store_wait(0)
        smem.store(out)
        fence_async_shared()
        tma_store(out_desc, [i_b, i_h, row, 0], box(smem, 64, smem.shape[1]))
    else:
        p_out += i_b.to(gl.int64) * s_ob + i_h.to(gl.int64) * s_oh
        out_rows = row + gl.arange(0, 64, layout=ROWS)
        columns = gl.arange(0, smem.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
        at = out_rows.to(gl.int64)[:, None] * s_on + columns[None, :]
        gl.store(p_out + at, out, mask=(out_rows < end)[:, None])


@gluon.jit
def _consumer(
    outputs, buffers, bars, work, scale2,
    SEGMENTS: gl.constexpr, RING: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Own 64 query rows of each work item: attend, then write. With TURNS the consumers start their matmuls in turn."""
    q_smem, k_smem, v_smem, out_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    p_position, p_lanes, shape, plan = work
    GROUPS: gl.constexpr = out_smem.shape[0]
    stage = 0
    phase = 0
    q_stage = 0
    q_phase = 0
    if TURNS and GROUP == GROUPS - 1:
        named_arrive(TURN, 256)
    for i in range(_rounds(shape, plan)):
        i_b, i_h, first_row, end = _item(i, shape, plan, GROUPS * 64)
        first, sinks, start, count, low = _keys(i_b, end, p_position, shape, RING)
        counts = (end - first, sinks, count, low)
        row = first_row + GROUP * 64
        mbarrier.wait(q_full.index(q_stage), q_phase)
        if row < end:
            q = q_smem.index(q_stage * GROUPS + GROUP)
            acc, top, total, stage, phase = _attend(
                q, counts, scale2, buffers, bars, q_stage, stage, phase, SEGMENTS, TURNS, GROUP
            )
            _write(acc, top, total, i_b, i_h, row, end, out_smem.index(GROUP), outputs, shape)
        else:
            stage, phase = _sit_out(counts, buffers, bars, q_stage, stage, phase, TURNS, GROUP)
        q_stage, q_phase = _advance(q_stage, q_phase, q_full.shape[0])
    if TURNS and GROUP == 0:
        named_sync(TURN, 256)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "s_ob", "s_oh", "s_on", "scale2", "heads", "kv_heads", "batch_heads", "n", "block_size", "window", "sink",
        "grid_start", "slots", "blocks", "per_block", "last_tiles", "heavy", "light",
    ],
    do_not_specialize_on_alignment=["p_position", "p_lanes"],
)  # fmt: skip
def _forward(
    q_desc, k_desc, v_desc, out_desc, ring_k_desc, ring_v_desc, p_out, p_lse, p_position, p_lanes, s_ob, s_oh, s_on,
    scale2, heads, kv_heads, batch_heads, n, block_size, window, sink, grid_start, slots,
    blocks, per_block, last_tiles, heavy, light,
    GROUPS: gl.constexpr, COLUMNS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, TURNS: gl.constexpr, SINKS: gl.constexpr, RING: gl.constexpr, LANES: gl.constexpr,
):  # fmt: skip
    """Set up shared memory and barriers, then split into one producer and GROUPS consumers."""
    ROWS: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [Q_STAGES * GROUPS, 64, D], ROWS)
    k_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, COLUMNS, D], ROWS)
    v_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, COLUMNS, D], ROWS)
    out_smem = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 64, D], ROWS)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    fence_async_shared()
    inputs = (q_desc, k_desc, v_desc, ring_k_desc, ring_v_desc)
    outputs = (out_desc, p_out, p_lse, s_ob, s_oh, s_on)
    buffers = (q_smem, k_smem, v_smem, out_smem)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    shape = (heads, kv_heads, batch_heads, n, block_size, window, sink, grid_start, slots)
    work = (p_position, p_lanes, shape, (blocks, per_block, last_tiles, heavy, light))
    SEGMENTS: gl.constexpr = 4 if RING else (2 if SINKS else 1)
    # Constants cannot sit in a tuple bound to a name, so the argument lists are spelled out.
    if GROUPS == 2:
        gl.warp_specialize([
            (_producer, (inputs, buffers, bars, work, SINKS, RING, LANES)),
            (_consumer, (outputs, buffers, bars, work, scale2, SEGMENTS, RING, TURNS, 0)),
            (_consumer, (outputs, buffers, bars, work, scale2, SEGMENTS, RING, TURNS, 1)),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
    elif GROUPS == 3:
        gl.warp_specialize([
            (_producer, (inputs, buffers, bars, work, SINKS, RING, LANES)),
            (_consumer, (outputs, buffers, bars, work, scale2, SEGMENTS, RING, TURNS, 0)),
            (_consumer, (outputs, buffers, bars, work, scale2, SEGMENTS, RING, TURNS, 1)),
            (_consumer, (outputs, buffers, bars, work, scale2, SEGMENTS, RING, TURNS, 2)),
        ], [4, 4, 4], [REGISTERS, REGISTERS, REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_producer, (inputs, buffers, bars, work, SINKS, RING, LANES)),
            (_consumer, (outputs, buffers, bars, work, scale2, SEGMENTS, RING, TURNS, 0)),
            (_consumer, (outputs, buffers, bars, work, scale2, SEGMENTS, RING, TURNS, 1)),
            (_consumer, (outputs, buffers, bars, work, scale2, SEGMENTS, RING, TURNS, 2)),
            (_consumer, (outputs, buffers, bars, work, scale2, SEGMENTS, RING, TURNS, 3)),
        ], [4, 4, 4, 4], [REGISTERS, REGISTERS, REGISTERS, REGISTERS])  # fmt: skip


class Config(NamedTuple):
    """Consumers (64 query rows each), keys of a tile, buffers of K and V and of Q, registers of a consumer's thread, and
    whether consumers start their matmuls in turn."""

    groups: int
    columns: int
    stages: int
    q_stages: int
    registers: int
    turns: bool


CONFIGS = {
    128: (Config(2, 128, 2, 2, 240, False),),
    64: (Config(3, 128, 3, 2, 160, True), Config(4, 64, 4, 2, 112, False)),
}


@lru_cache(maxsize=1024)
def choose_config(head_dim: int, block_size: int) -> Config:
    """Return the configuration for a head dim and the tokens of a block."""
    best, *others = CONFIGS[head_dim]
    for other in others:
        # The first one is about 7% faster a row when neither pads the block to whole tiles.
        if _padded(block_size, other) < 0.935 * _padded(block_size, best):
            best = other
    return best


def _padded(block_size: int, config: Config) -> int:
    rows = config.groups * 64
    return -(-block_size // rows) * rows


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
    ring: Ring | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from each token to its block window, and to the history in `ring` if there is one.

    Args:
        q: [B, H, N, D], the call's own tokens; D 64 or 128, float16 or bfloat16.
        k, v: [B, Hkv, N, D].
        scale: factor on the scores.
        block_size, window, sink: the pattern, in tokens; sinks count from the start of the stream.
        grid_start: start of the block grid relative to the call's first token, at most 0.
        ring: history of each row.
        config: replaces the table's choice.

    Returns:
        out [B, H, N, D] with the dtype and layout of q; natural log-sum-exp, float32 [B, H, N].
    """
    if scale < 0:
        q, scale = -q, -scale
    batch, heads, n, head_dim = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if ring is None and window + sink >= n:
        window, sink = n, 0
    config = config or choose_config(head_dim, min(block_size, n))
    weighed = (window, sink) if ring is None else (0, 0)
    plan = plan_forward(n, block_size, *weighed, grid_start, config.groups * 64)
    ring_k, ring_v = (k, v) if ring is None else (ring.k, ring.v)
    position = lse if ring is None else ring.position
    lanes = position if ring is None or ring.lanes is None else ring.lanes
    _forward[(min(multiprocessors(q.device), batch * heads * plan.tiles),)](
        descriptor(q, 64), descriptor(k, config.columns), descriptor(v, config.columns), descriptor(out, 64),
        descriptor(ring_k, config.columns), descriptor(ring_v, config.columns),
        out, lse, position, lanes, *out.stride()[:3], max(scale * LOG2E, 1e-30),
        heads, k.shape[1], batch * heads, n, block_size, window, sink, grid_start, ring_k.shape[2], *plan,
        GROUPS=config.groups, COLUMNS=config.columns, D=head_dim, STAGES=config.stages, Q_STAGES=config.q_stages,
        REGISTERS=config.registers, TURNS=config.turns,
        SINKS=sink > 0, RING=ring is not None, LANES=ring is not None and ring.lanes is not None, num_warps=4,
    )  # fmt: skip
    return out, lse
