"""Sums in global memory that several programs add to by TMA, and how to add in turn.

A tile [64, 64] of sums lies in memory in the order in which the threads of a warpgroup hold it (`by_thread`), so that
each thread writes 16 bytes at a time into shared memory, side by side with its neighbours.

Float32 addition does not associate, so adding in any order gives other bits every time. With turns, the programs that
add to a tile do so in the order of their keys: a counter per tile says whose turn it is.
"""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin

from .compat import cta_barrier


@builtin
def tma_add(desc, coord, src, _semantic=None):
    """Add a float32 box in shared memory to global memory; the copy engine does it (3.9 has a name for it)."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


def sum_layout(rank: int) -> gl.NVMMASharedLayout:
    """Return the shared layout of a box of sums, rows of 64 float32 numbers."""
    return gl.NVMMASharedLayout(0, 32, rank=rank)


sum_box = gluon.constexpr_function(sum_layout)


@gluon.jit
def by_thread(x):
    """Return an accumulator [64, 64] with the four numbers that a thread holds of 8 columns next to each other."""
    return x.reshape([4, 2, 8, 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([64, 64])


@gluon.jit
def await_turn(p_turn, turn):
    """Wait until the counter says `turn`; what others added before is then ordered before what this thread adds."""
    gl.inline_asm_elementwise(
        "{ .reg .pred waiting; .reg .u32 now; again: ld.acquire.gpu.global.u32 now, [$1]; "
        "setp.ne.u32 waiting, now, $2; @waiting bra again; fence.proxy.async; mov.u32 $0, now; }",
        "=r,l,r", [p_turn, turn], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def pass_turn(p_turn, turn):
    """Wait until what this partition added is in global memory, then set the counter to `turn`.

    The warp that issued the additions waits for them, and the others for that warp. Every thread sets the counter: as a
    maximum, so that a late one cannot set it back.
    """
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; fence.proxy.async; mov.u32 $0, 0;",
        "=r", [], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    cta_barrier()
    gl.inline_asm_elementwise(
        "red.release.gpu.global.max.u32 [$1], $2; mov.u32 $0, 0;",
        "=r,l,r", [p_turn, turn], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
