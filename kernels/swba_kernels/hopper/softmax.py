"""Online softmax over key tiles: its running maximum and sum, and the rare rescaling of what was summed before.

`top` and `total` [64, 4] belong to a thread and a row: `total` is what each of the four threads that share a row has
summed (they meet once, in `row_state`, not at every tile), `top` in units of log2 the same in all four.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .weights import pack_words, weigh

LOWEST = gl.constexpr(-3.0e38)  # the maximum of a row that has seen no key yet: -inf less -inf would be NaN


@gluon.jit
def hide_first(s, behind):
    """Mask the scores s of a tile's first keys: its first one lies `behind` keys behind the lowest that counts."""
    counts = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout)) + behind >= 0
    return gl.where(counts[None, :], s, float("-inf"))


@gluon.jit
def _pairs(x):
    """View an accumulator of wgmma [64, N] as [64, N / 8, 4, 2], the pairs of each of the four threads of a row."""
    return gl.reshape(x, (64, x.shape[1] // 8, 4, 2))


@gluon.jit
def _spread(state, x):
    """Return a state [64, 4] as [64, 1, 4, 1], to go with x of `_pairs`."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, x.type.layout))
    return gl.expand_dims(gl.expand_dims(gl.convert_layout(state, LAYOUT, assert_trivial=True), 1), 3)


@gluon.jit
def row_state(top, total, LAYOUT: gl.constexpr):
    """Return (maxima, sums) of rows [64] in a layout of rows of an accumulator."""
    top = gl.convert_layout(gl.max(top, 1), LAYOUT, assert_trivial=True)
    return top, gl.convert_layout(gl.sum(total, 1), LAYOUT, assert_trivial=True)


@gluon.jit
def first_weights(s, scale2, dtype: gl.constexpr):
    """Return (words of weights, top, total) of the first tile of raw scores s; a row that sees none has zeros."""
    top = gl.maximum(gl.max(s, 1) * scale2, LOWEST)
    p, total = pack_words(_pairs(gl.exp2(s * scale2 - top[:, None])), dtype)
    top = gl.convert_layout(top, gl.SliceLayout(1, total.type.layout), assert_trivial=True)
    top = gl.expand_dims(top, 1) + gl.zeros_like(total)
    return p, top, total


@gluon.jit
def next_weights(s, top, total, scale2, dtype: gl.constexpr):
    """Return (words of weights, top, total, fade) after one more tile.

    What was summed before has to be multiplied by `fade`.
    """
    x = _pairs(s)
    p, sums, top, fade = weigh(x, _spread(top, x), scale2, dtype)
    return p, top, total * fade + sums, fade


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
    """Return acc multiplied by the fades of its rows; a warp whose fades are all one skips the multiplications.

    acc is a wgmma accumulator [64, D] of one warpgroup: a thread holds D / 2 numbers of two rows.
    """
    HELD: gl.constexpr = acc.shape[1] // 2
    ASM: gl.constexpr = _rescale_asm(HELD)
    CONSTRAINTS: gl.constexpr = _rescale_constraints(HELD)
    x = _pairs(acc)
    x = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [_spread(fade, x), x], dtype=gl.float32, is_pure=True, pack=HELD)
    return gl.convert_layout(gl.reshape(x, acc.shape), acc.type.layout, assert_trivial=True)
