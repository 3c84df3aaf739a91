"""Online softmax over key tiles: its running maximum and sum, and the rare rescaling of what was summed before.

`top` [64] is in units of log2. `total` [64, 4] keeps apart what each of the four threads that share a row has summed:
they meet once, in `row_total`, not at every tile.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# A row keeps its old maximum until a score beats it by this much (base 2). Weights then reach at most 2^SLACK, not
# 1, which costs float32 sums nothing, and nearly no tile needs the accumulator rescaled.
SLACK = gl.constexpr(8.0)
LOWEST = gl.constexpr(-3.0e38)  # the maximum of a row that has seen no key yet: -inf less -inf would be NaN


@gluon.jit
def hide_first(s, behind):
    """Mask the scores s of a tile's first keys: its first one lies `behind` keys behind the lowest that counts."""
    counts = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout)) + behind >= 0
    return gl.where(counts[None, :], s, float("-inf"))


@gluon.jit
def _sums_of_threads(p):
    """Sum what each thread holds of a row of p [64, N], an accumulator of wgmma: [64, 4]."""
    return gl.sum(gl.sum(gl.reshape(p, (p.shape[0], p.shape[1] // 8, 4, 2)), 3), 1)


@gluon.jit
def row_total(total, top):
    """Return the sums of rows, in the layout of `top`."""
    return gl.convert_layout(gl.sum(total, 1), top.type.layout, assert_trivial=True)


@gluon.jit
def first_weights(s, scale2):
    """Return (weights, top, total) of the first tile of raw scores s; those of a row that sees none are zero."""
    top = gl.maximum(gl.max(s, 1) * scale2, LOWEST)
    p = gl.exp2(s * scale2 - top[:, None])
    return p, top, _sums_of_threads(p)


@gluon.jit
def next_weights(s, top, total, scale2):
    """Return (weights, top, total, fade) after one more tile; what was summed before has to be multiplied by `fade`."""
    peak = gl.max(s, 1) * scale2
    new_top = gl.where(peak > top + SLACK, peak, top)
    fade = gl.exp2(top - new_top)
    p = gl.exp2(s * scale2 - new_top[:, None])
    fades = gl.convert_layout(fade, gl.SliceLayout(1, total.type.layout), assert_trivial=True)[:, None]
    return p, new_top, total * fades + _sums_of_threads(p), fade


@gluon.jit
def finish_before(total):
    """Keep the exponentials, whose sums `total` are, ahead of the wait that follows: for a matmul that runs beside.

    ptxas moves such a wait up in front of them, which leaves this warpgroup's queue at the tensor cores empty all
    through the softmax. A sum is never negative, so nobody sleeps; but the question has to be answered first. (A trap
    in its place makes ptxas serialise the matmuls of the decode.)
    """
    ASM: gl.constexpr = (
        "{ .reg .pred q; setp.lt.f32 q, $2, 0f00000000; setp.lt.or.f32 q, $3, 0f00000000, q; "
        "@q nanosleep.u32 0; mov.u32 $0, 0; mov.u32 $1, 0; }"
    )
    gl.inline_asm_elementwise(ASM, "=r,=r,f,f", [total], dtype=gl.int32, is_pure=False, pack=2)


@gluon.constexpr_function
def _rescale_asm(n):
    """PTX that multiplies n registers of a thread unless all factors are one in the whole warp.

    The registers belong to two rows: 0 and 1, 4 and 5, ... to one, 2 and 3, 6 and 7, ... to the other. Operands: n
    results, n factors, n old values tied to the results.
    """
    multiply = " ".join(f"mul.f32 ${i}, ${i}, ${n + i};" for i in range(n))
    return (
        "{ .reg .pred q; "
        f"setp.neu.f32 q, ${n}, 0f3F800000; @!q setp.neu.f32 q, ${n + 2}, 0f3F800000; "
        "vote.sync.any.pred q, q, 0xffffffff; @!q bra.uni KEPT; "
        f"{multiply} KEPT: }}"
    )


@gluon.constexpr_function
def _rescale_constraints(n):
    return ",".join(["=f"] * n + ["f"] * n + [str(i) for i in range(n)])


@gluon.jit
def rescale(acc, fade):
    """Return acc * fade[:, None]; a warp whose fades are all one skips the multiplications.

    acc is a wgmma accumulator [64, D] of one warpgroup: a thread holds D / 2 numbers of two rows.
    """
    HELD: gl.constexpr = acc.shape[1] // 2
    ASM: gl.constexpr = _rescale_asm(HELD)
    CONSTRAINTS: gl.constexpr = _rescale_constraints(HELD)
    fade = gl.convert_layout(fade, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
    return gl.inline_asm_elementwise(ASM, CONSTRAINTS, [fade[:, None], acc], dtype=gl.float32, is_pure=True, pack=HELD)
