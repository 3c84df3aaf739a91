"""Sums in global memory that several programs add to by TMA, and how to add in turn.

A tile [64, 64] of sums lies in memory in the order in which the threads of a warpgroup hold it (`by_thread`), so that
each thread writes 16 bytes at a time into shared memory, side by side with its neighbours.

Float32 addition does not associate, so adding in any order gives other bits every time. With turns, the programs that
add to a tile do so in the order of their keys: a counter per tile (or for several) says whose turn it is.
"""

# ruff: noqa: RUF059 (tuples travel whole between the partitions; each names all that it gets)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .backward_ranges import next_row, number_of, walk_grid, work_of
from .compat import cta_barrier, tma_add, tma_store, view


def sum_layout(rank: int) -> gl.NVMMASharedLayout:
    """Return the shared layout of a box of sums, rows of 64 float32 numbers."""
    return gl.NVMMASharedLayout(0, 32, rank=rank)


sum_box = gluon.constexpr_function(sum_layout)


@gluon.jit
def by_thread(x):
    """Return an accumulator [64, 64] with the four numbers that a thread holds of 8 columns next to each other."""
    return x.reshape([4, 2, 8, 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([64, 64])


@gluon.jit
def await_turn(p_turn, tile):
    """Wait until the counter says `tile`, or ~tile if nobody added before; return what it says.

    What others added before is then ordered before what this thread adds.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred waiting; .reg .u32 first; not.b32 first, $2; again: ld.acquire.gpu.global.u32 $0, [$1]; "
        "setp.ne.u32 waiting, $0, $2; setp.ne.and.u32 waiting, $0, first, waiting; @waiting bra again; "
        "fence.proxy.async; }",
        "=&r,l,r", [p_turn, tile], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _arrival_asm(newer):
    return f"cp.async.bulk.wait_group {newer}; fence.proxy.async; mov.u32 $0, 0;"


@gluon.jit
def pass_turn(p_turn, tile, NEWER: gl.constexpr):
    """Wait until what this warp added is in global memory, but for its NEWER latest tiles; then the turn is `tile`'s.

    The thread that issued the additions waits for them, and the others for that thread. Every thread sets the counter:
    as a maximum, so that a late one cannot set it back.
    """
    ASM: gl.constexpr = _arrival_asm(NEWER)
    gl.inline_asm_elementwise(ASM, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    cta_barrier()
    gl.inline_asm_elementwise(
        "red.release.gpu.global.max.s32 [$1], $2; mov.u32 $0, 0;",
        "=r,l,r", [p_turn, tile], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def add(
    sum_desc, dq_smem, dq_full, dq_empty, p_turns, i_work, pattern, shape,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, IN_TURN: gl.constexpr, Q_SINK: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Add one half of the columns of each tile of dQ as it comes; it comes two tiles late, and the first two are none.

    In turn, the first tile of keys writes instead of adding. A turn is passed on one tile late, when what was added has
    arrived: so setting counters runs beside the copies.
    """
    heads, group, kv_in_all, together = shape
    n, _, _, _, _ = pattern
    in_sinks, part, i_b, i_h, first, i_sums = work_of(i_work, pattern, shape, BLOCK_N, Q_SINK)
    tiles, from_row, to_row, _, _ = walk_grid(first, part, BLOCK_M, BLOCK_N, IN_TURN)
    way_out = view(dq_smem.index(HALF), [1, 1, 64, 64], sum_box(4))
    full = dq_full.index(HALF)
    empty = dq_empty.index(HALF)
    i_head = i_h * group
    row = from_row
    if IN_TURN:
        tile, _ = number_of(first, in_sinks, pattern, BLOCK_N, Q_SINK)
        counters = (n + BLOCK_M - 1) // BLOCK_M
        p_turn = p_turns + ((i_sums * heads + i_head) * 2 + HALF) * counters + row // BLOCK_M
        p_before = p_turns  # any other value: a name that starts as an alias would not be carried through the loop
    for phase in gl.static_range(2):
        mbarrier.wait(full, phase)
        mbarrier.arrive(empty, count=1)
    phase = 0
    for i in range(group * tiles):
        at = [i_sums, i_head, (row // BLOCK_M * 2 + HALF) * 64, 0]
        if IN_TURN:
            now = await_turn(p_turn, tile)
            mbarrier.wait(full, phase)
            if now < 0:
                tma_store(sum_desc, at, way_out)
            else:
                tma_add(sum_desc, at, way_out)
            if i > 0:
                pass_turn(p_before, tile + 1, 1)
            p_before = p_turn
            p_turn += gl.where(row == to_row, 2 * counters + (from_row - to_row) // BLOCK_M, -1)
        else:
            mbarrier.wait(full, phase)
            tma_add(sum_desc, at, way_out)
        tma.store_wait(0)
        mbarrier.arrive(empty, count=1)
        phase ^= 1
        i_head += (row == to_row).to(gl.int32)
        row = next_row(row, from_row, to_row, BLOCK_M, IN_TURN)
    if IN_TURN:
        pass_turn(p_before, tile + 1, 0)
