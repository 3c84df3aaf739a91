"""A consumer of the Hopper forward: a warpgroup that owns 64 query rows and reads the key tiles with its siblings."""

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

from .compat import cta_barrier
from .forward_outputs import keep
from .forward_plan import tiles_of, walk_of
from .forward_shared import keys_of_tile, told_item
from .notes import told
from .pipeline import next_stage, overlaps
from .softmax import first_weights, next_weights, rescale
from .starts import await_start, close_starts, open_starts, pass_start
from .weights import add_values, as_operand

# What of a tile's scores a consumer hides: nothing, the first columns, or what not all of its rows see, but for sinks.
NOTHING = gl.constexpr(0)
FIRST = gl.constexpr(1)
UNSEEN = gl.constexpr(2)
UNSEEN_BUT_SINKS = gl.constexpr(3)


@gluon.jit
def clear_rows(v, rows):
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
def _hide_first(s, length, v, v_full, phase):
    """Mask the first columns of a segment's ragged tile, and clear the values there if no other tile holds them."""
    COLUMNS: gl.constexpr = s.shape[1]
    hidden = (length + COLUMNS - 1) // COLUMNS * COLUMNS - length
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, s.type.layout))
    if length < COLUMNS:
        mbarrier.wait(v_full, phase)
        clear_rows(v, hidden)
    return gl.where((column >= hidden)[None, :], s, float("-inf"))


@gluon.jit
def _hide_unseen(s, key, row, limits, sink, HIDE: gl.constexpr):
    """Mask what rows from `row` on do not see of a tile that starts at `key`, if there is any.

    `limits` are those of `keys_of_rows`: rows before the first end belong to the first block.
    """
    first, first_end, last_first, end = limits
    if (key < last_first) | (key + s.shape[1] > first_end):
        keys = key + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))[None, :]
        early = row + gl.arange(0, 64, layout=gl.SliceLayout(1, s.type.layout)) < first_end
        seen = keys >= gl.where(early, first, last_first)[:, None]
        if HIDE == UNSEEN_BUT_SINKS:
            seen |= keys < sink
        seen &= keys < gl.where(early, first_end, end)[:, None]
        s = gl.where(seen, s, float("-inf"))
    return s


@gluon.jit
def _issue_scores(q, k):
    """Start S = Q K^T for 64 rows and one key tile."""
    COLUMNS: gl.constexpr = k.shape[0]
    zero = gl.zeros([64, COLUMNS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16]))
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _first_tile(
    q, length, unseen, scale2, buffers, bars, stage, phase,
    HIDE: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Return (weights, top, total) of an item's first tile; a segment of `length` keys begins with a ragged one."""
    mbarrier.wait(bars.k_full.index(stage), phase)
    await_start(TURNS, GROUP)
    s = _issue_scores(q, buffers.k.index(stage))
    pass_start(buffers.out.shape[0], TURNS, GROUP)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(bars.k_empty.index(stage), count=1)
    s = _hide_first(s, length, buffers.v.index(stage), bars.v_full.index(stage), phase)
    if HIDE >= UNSEEN:
        s = _hide_unseen(s, *unseen, HIDE)
    p, top, total = first_weights(s, scale2, q.dtype)
    if overlaps(buffers.out.shape[0]):
        p = as_operand(p, q.dtype, buffers.k.shape[2])
    return p, top, total


@gluon.jit
def _next_tile(
    q, length, unseen, scale2, acc, p, top, total, buffers, bars, stage, phase,
    HIDE: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Issue the scores of one more tile, then the matmul of the tile before it (in `stage`), whose weights are p.

    That one runs beside the softmax of the new scores if it `overlaps`.
    """
    OVERLAP: gl.constexpr = overlaps(buffers.out.shape[0])
    last = stage
    last_phase = phase
    stage, phase = next_stage(stage, phase, buffers.k.shape[0])
    mbarrier.wait(bars.k_full.index(stage), phase)
    await_start(TURNS, GROUP)
    s = _issue_scores(q, buffers.k.index(stage))
    mbarrier.wait(bars.v_full.index(last), last_phase)
    acc = add_values(p, buffers.v.index(last), acc)
    pass_start(buffers.out.shape[0], TURNS, GROUP)
    if OVERLAP:
        s = warpgroup_mma_wait(1, deps=(s,))
    else:
        s, acc = warpgroup_mma_wait(0, deps=(s, acc))
        mbarrier.arrive(bars.v_empty.index(last), count=1)
    mbarrier.arrive(bars.k_empty.index(stage), count=1)
    if HIDE == FIRST:
        s = _hide_first(s, length, buffers.v.index(stage), bars.v_full.index(stage), phase)
    elif HIDE >= UNSEEN:
        s = _hide_unseen(s, *unseen, HIDE)
    p, top, total, fade = next_weights(s, top, total, scale2, q.dtype)
    if OVERLAP:
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(bars.v_empty.index(last), count=1)
        p = as_operand(p, q.dtype, buffers.k.shape[2])
    acc = rescale(acc, fade)
    return acc, p, top, total, stage, phase


@gluon.jit
def _next_segment(
    q, length, scale2, acc, p, top, total, buffers, bars, stage, phase, TURNS: gl.constexpr, GROUP: gl.constexpr
):
    """Attend to the tiles of one more segment, if it has keys; the first is the ragged one."""
    COLUMNS: gl.constexpr = buffers.k.shape[1]
    if length > 0:
        acc, p, top, total, stage, phase = _next_tile(
            q, length, None, scale2, acc, p, top, total, buffers, bars, stage, phase, FIRST, TURNS, GROUP
        )
        for _ in range(tiles_of(length, COLUMNS) - 1):
            acc, p, top, total, stage, phase = _next_tile(
                q, length, None, scale2, acc, p, top, total, buffers, bars, stage, phase, NOTHING, TURNS, GROUP
            )
    return acc, p, top, total, stage, phase


@gluon.jit
def _change_queries(buffers, bars, q_stage, q_phase):
    """Return the stage of the sinks' queries once they are there, and let those of the window go."""
    mbarrier.arrive(bars.q_empty.index(q_stage), count=1)
    q_stage, q_phase = next_stage(q_stage, q_phase, buffers.q.shape[0] // buffers.out.shape[0])
    mbarrier.wait(bars.q_full.index(q_stage), q_phase)
    return q_stage, q_phase


@gluon.jit
def _attend(
    item, scale2, buffers, bars, q_stage, q_phase, stage, phase,
    SEGMENTS: gl.constexpr, SINKS_FROM: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Attend from 64 query rows to the tiles of all segments: return (sum of weighted values, top, total), stages.

    The segments from SINKS_FROM on have queries of their own.
    """
    GROUPS: gl.constexpr = buffers.out.shape[0]
    COLUMNS: gl.constexpr = buffers.k.shape[1]
    D: gl.constexpr = buffers.k.shape[2]
    q = buffers.q.index(q_stage * GROUPS + GROUP)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    own = item.own
    acc = gl.zeros([64, D], gl.float32, ACC)
    p, top, total = _first_tile(q, own, None, scale2, buffers, bars, stage, phase, FIRST, TURNS, GROUP)
    for _ in range((own - 1) // COLUMNS):
        acc, p, top, total, stage, phase = _next_tile(
            q, own, None, scale2, acc, p, top, total, buffers, bars, stage, phase, NOTHING, TURNS, GROUP
        )
    for i in range(1, SEGMENTS):
        if SINKS_FROM == SEGMENTS:
            length = item.sinks if i == 1 else (item.ring if i == 2 else item.low)
            reads = q
        else:
            if i == SINKS_FROM:
                q_stage, q_phase = _change_queries(buffers, bars, q_stage, q_phase)
            length = item.sinks if i == SINKS_FROM else (item.ring if i == 1 else item.low)
            length = item.kept if i == SINKS_FROM + 1 else length
            reads = buffers.q.index(q_stage * GROUPS + GROUP)
        acc, p, top, total, stage, phase = _next_segment(
            reads, length, scale2, acc, p, top, total, buffers, bars, stage, phase, TURNS, GROUP
        )
    mbarrier.arrive(bars.q_empty.index(q_stage), count=1)
    acc, stage, phase = _last_values(acc, p, buffers, bars, stage, phase)
    return acc, top, total, q_stage, q_phase, stage, phase


@gluon.jit
def _last_values(acc, p, buffers, bars, stage, phase):
    """Add the values of the last tile."""
    mbarrier.wait(bars.v_full.index(stage), phase)
    acc = add_values(p, buffers.v.index(stage), acc)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(bars.v_empty.index(stage), count=1)
    stage, phase = next_stage(stage, phase, buffers.k.shape[0])
    return acc, stage, phase


@gluon.jit
def _attend_straddling(
    item, row, call, scale2, buffers, bars, q_stage, stage, phase,
    SINKS: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Attend as `_attend` from 64 query rows of an item whose rows may lie in different blocks.

    (It serves the others of such a call, too. With a branch between this and `_attend`, Triton 3.6's ptxas computes the
    address of the queries in one of them and reads it in both.)
    """
    COLUMNS: gl.constexpr = buffers.k.shape[1]
    D: gl.constexpr = buffers.k.shape[2]
    HIDE: gl.constexpr = UNSEEN_BUT_SINKS if SINKS else UNSEEN
    q = buffers.q.index(q_stage * buffers.out.shape[0] + GROUP)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    first = item.first
    end = first + item.own
    low, first_end, last_low, last_end, _ = keys_of_tile(row, min(row + 64, call.n), call)
    skipped, met, rest = walk_of(first, end, low, last_end, call.sink, COLUMNS)
    limits = (low, first_end, last_low, last_end)
    stage, phase = _pass_tiles(skipped, buffers, bars, stage, phase, TURNS, GROUP)
    # Tiles go backwards from `end`, and all but the first one start at multiples of COLUMNS from `first`.
    start = first + ((end - first - 1) // COLUMNS - skipped) * COLUMNS
    key = end - COLUMNS if skipped == 0 else start
    acc = gl.zeros([64, D], gl.float32, ACC)
    length = item.own if skipped == 0 else COLUMNS
    p, top, total = _first_tile(
        q, length, (key, row, limits, call.sink), scale2, buffers, bars, stage, phase, HIDE, TURNS, GROUP
    )
    for _ in range(met - 1):
        start -= COLUMNS
        acc, p, top, total, stage, phase = _next_tile(
            q, 0, (start, row, limits, call.sink), scale2, acc, p, top, total, buffers, bars, stage, phase,
            HIDE, TURNS, GROUP,
        )  # fmt: skip
    if SINKS:
        acc, p, top, total, stage, phase = _next_segment(
            q, item.sinks, scale2, acc, p, top, total, buffers, bars, stage, phase, TURNS, GROUP
        )
    mbarrier.arrive(bars.q_empty.index(q_stage), count=1)
    acc, stage, phase = _last_values(acc, p, buffers, bars, stage, phase)
    stage, phase = _pass_tiles(rest, buffers, bars, stage, phase, TURNS, GROUP)
    return acc, top, total, stage, phase


@gluon.jit
def _pass_on(lengths, buffers, bars, stage, phase, TURNS: gl.constexpr, GROUP: gl.constexpr):
    """Give the tiles of some segments back unread."""
    COLUMNS: gl.constexpr = buffers.k.shape[1]
    tiles = 0
    for i in gl.static_range(len(lengths)):
        tiles += (lengths[i] + COLUMNS - 1) // COLUMNS
    return _pass_tiles(tiles, buffers, bars, stage, phase, TURNS, GROUP)


@gluon.jit
def _pass_tiles(tiles, buffers, bars, stage, phase, TURNS: gl.constexpr, GROUP: gl.constexpr):
    """Give some tiles back unread."""
    for _ in range(tiles):
        mbarrier.wait(bars.k_full.index(stage), phase)
        await_start(TURNS, GROUP)
        pass_start(buffers.out.shape[0], TURNS, GROUP)
        mbarrier.arrive(bars.k_empty.index(stage), count=1)
        mbarrier.wait(bars.v_full.index(stage), phase)
        mbarrier.arrive(bars.v_empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, buffers.k.shape[0])
    return stage, phase


@gluon.jit
def _sit_out(
    item, buffers, bars, q_stage, q_phase, stage, phase,
    Q_SINK: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Give every tile of an item back unread: the item has no rows for this consumer."""
    if Q_SINK:
        stage, phase = _pass_on((item.own, item.ring, item.low), buffers, bars, stage, phase, TURNS, GROUP)
        q_stage, q_phase = _change_queries(buffers, bars, q_stage, q_phase)
        mbarrier.arrive(bars.q_empty.index(q_stage), count=1)
        stage, phase = _pass_on((item.sinks, item.kept), buffers, bars, stage, phase, TURNS, GROUP)
    else:
        mbarrier.arrive(bars.q_empty.index(q_stage), count=1)
        stage, phase = _pass_on((item.own, item.sinks, item.ring, item.low), buffers, bars, stage, phase, TURNS, GROUP)
    return q_stage, q_phase, stage, phase


@gluon.jit
def consume(
    outputs, buffers, bars, call, cuts, scale2,
    SEGMENTS: gl.constexpr, RING: gl.constexpr, Q_SINK: gl.constexpr, STRADDLE: gl.constexpr, CUT: gl.constexpr,
    TURNS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Own 64 query rows of each work item: attend, then write. With TURNS the consumers start their matmuls in turn."""
    GROUPS: gl.constexpr = buffers.out.shape[0]
    SINKS_FROM: gl.constexpr = (3 if RING else 1) if Q_SINK else SEGMENTS
    stage = 0
    phase = 0
    q_stage = 0
    q_phase = 0
    open_starts(GROUPS, TURNS, GROUP)
    mbarrier.wait(bars.q_full.index(0), 0)
    more = told(buffers.notes, 0, 0) >= 0
    while more:
        item = told_item(buffers.notes, q_stage)
        row = item.row + GROUP * 64
        if row < item.end:
            if STRADDLE:
                acc, top, total, stage, phase = _attend_straddling(
                    item, row, call, scale2, buffers, bars, q_stage, stage, phase, SEGMENTS > 1, TURNS, GROUP
                )
            else:
                acc, top, total, q_stage, q_phase, stage, phase = _attend(
                    item, scale2, buffers, bars, q_stage, q_phase, stage, phase, SEGMENTS, SINKS_FROM, TURNS, GROUP
                )
            keep(acc, top, total, item, row, buffers.out.index(GROUP), outputs, call, cuts, CUT, GROUP)
        else:
            q_stage, q_phase, stage, phase = _sit_out(
                item, buffers, bars, q_stage, q_phase, stage, phase, Q_SINK, TURNS, GROUP
            )
        q_stage, q_phase = next_stage(q_stage, q_phase, buffers.q.shape[0] // GROUPS)
        mbarrier.wait(bars.q_full.index(q_stage), q_phase)
        more = told(buffers.notes, q_stage, 0) >= 0
    close_starts(TURNS, GROUP)
    tma.store_wait(0)
