"""Online softmax over key tiles: its running maximum and sum, and the rare rescaling of what was summed before."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# A row keeps its old maximum until a score beats it by this much (base 2). Weights then reach at most 2^SLACK, not
# 1, which costs float32 sums nothing, and nearly no tile needs the accumulator rescaled.
SLACK = gl.constexpr(8.0)


@gluon.jit
def hide_first(s, behind):
    """Mask the scores s of a tile's first keys: its first one lies `behind` keys behind the lowest that counts."""
    counts = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout)) + behind >= 0
    return gl.where(counts[None, :], s, float("-inf"))


@gluon.jit
def first_weights(s, scale2):
    """Return (weights, top, total) of the first tile of raw scores s; `top` is in units of log2."""
    top = gl.max(s, 1) * scale2
    p = gl.exp2(s * scale2 - top[:, None])
    return p, top, gl.sum(p, 1)


@gluon.jit
def next_weights(s, top, total, scale2):
    """Return (weights, top, total, fade) after one more tile; what was summed before has to be multiplied by `fade`."""
    peak = gl.max(s, 1) * scale2
    new_top = gl.where(peak > top + SLACK, peak, top)
    fade = gl.exp2(top - new_top)
    p = gl.exp2(s * scale2 - new_top[:, None])
    return p, new_top, total * fade + gl.sum(p, 1), fade


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
