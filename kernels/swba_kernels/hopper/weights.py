"""A key tile's softmax weights without the tile's maximum: one block of PTX a thread.

A maximum costs as many instructions as the exponentials, which have to wait for it; yet after the first tiles nearly no
tile raises it. So weights are taken against the maximum so far, and their sums, which are needed anyway, tell whether
that was too low: then the warp takes its tile's maximum after all, and the weights once more.

N keys of a tile. Weights are pairs of 16-bit numbers in words, [64, N / 16, 4, 2] int32, until a matmul reads them: 16
bits at a time ptxas would move them through the loop.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

# What a thread's weights of a row may add up to in one tile. So a weight fits into float16, and sums in float32 have
# room for any number of them. All these types are as precise for large numbers as for those below one; but a weight of
# one, which the true maximum gives, is exact.
LIMIT = gl.constexpr(4096.0)


@gluon.constexpr_function
def _pair(dtype):
    """Return the PTX type of two weights in a word."""
    return "bf16x2" if dtype == gl.bfloat16 else "f16x2"


@gluon.constexpr_function
def _weigh_asm(n, pair, limit):
    """PTX for the n scores of a thread: 0 and 1, 4 and 5, ... belong to one row, 2 and 3, 6 and 7, ... to another.

    Operands: n results, n scores, n old maxima, n times the scale. The first n / 2 results are the words of weights;
    then come, for the two rows, sums of weights (0 and 2), maxima (1 and 3), factors for what was summed before (4 and
    6); the others are not written.
    """
    result, score, old, scale = ([f"${n * kind + i}" for i in range(n)] for kind in range(4))
    state = result[n // 2 :]

    def weights():
        for i in range(n // 2):
            r = i % 2
            for x, j in (("x", 2 * i), ("y", 2 * i + 1)):
                yield f"fma.rn.f32 {x}, {score[j]}, {scale[0]}, less{r}; ex2.approx.ftz.f32 {x}, {x};"
            yield f"add.f32 sum{r}, x, y;" if i < 2 else f"add.f32 sum{r}, sum{r}, x; add.f32 sum{r}, sum{r}, y;"
            yield f"cvt.rn.{pair}.f32 {result[i // 4 * 4 + i % 2 * 2 + i // 2 % 2]}, y, x;"
        yield f"mov.b32 {state[0]}, sum0; mov.b32 {state[2]}, sum1;"

    def raise_maximum(r):
        yield f"mov.f32 top, {score[2 * r]};"
        yield from (f"max.f32 top, top, {score[i]};" for i in range(n) if i // 2 % 2 == r)
        yield f"selp.f32 x, 1.0, 0.0, over{r};"
        for lane in (1, 2):  # four threads share a row: if one of them is over the limit, all are
            yield f"shfl.sync.bfly.b32 y, top, {lane}, 31, 0xffffffff; max.f32 top, top, y;"
            yield f"shfl.sync.bfly.b32 y, x, {lane}, 31, 0xffffffff; max.f32 x, x, y;"
        yield f"mul.f32 top, top, {scale[0]};"
        yield f"setp.gt.f32 any, x, 0.0; selp.f32 top, top, {old[2 * r]}, any;"
        yield f"sub.f32 x, {old[2 * r]}, top; ex2.approx.ftz.f32 x, x;"
        yield f"mov.b32 {state[1 + 2 * r]}, top; mov.b32 {state[4 + 2 * r]}, x; neg.f32 less{r}, top;"

    return "\n".join([
        "{ .reg .pred any, over<2>; .reg .f32 x, y, top, less<2>, sum<2>;",
        f"neg.f32 less0, {old[0]}; neg.f32 less1, {old[2]};",
        *weights(),
        f"mov.b32 {state[1]}, {old[0]}; mov.b32 {state[3]}, {old[2]};",
        f"mov.b32 {state[4]}, 0f3F800000; mov.b32 {state[6]}, 0f3F800000;",
        f"setp.gt.f32 over0, sum0, {limit}; setp.gt.f32 over1, sum1, {limit}; or.pred any, over0, over1;",
        "vote.sync.any.pred any, any, 0xffffffff; @!any bra.uni KEPT;",
        *raise_maximum(0), *raise_maximum(1), *weights(),
        "KEPT: }",
    ])  # fmt: skip


@gluon.constexpr_function
def _weigh_constraints(n):
    """All results are apart from all inputs (&): some are written before the last input is read."""
    return ",".join(["=&r"] * n + ["f"] * (3 * n))


@gluon.jit
def _halves(x):
    """Return the two halves of x [64, 2 M, 4, 2] along its second dimension."""
    x = gl.reshape(x, (64, 2, x.shape[1] // 2, 4, 2))
    return gl.split(gl.permute(x, (0, 2, 3, 4, 1)))


@gluon.jit
def _taken_apart(result):
    """Return (words, sums, maxima, fades) of what the block of PTX returned [64, N / 8, 4, 2]."""
    words, state = _halves(result)
    for _ in gl.static_range(4):  # down to the first eight numbers of a thread, those that are written
        if state.shape[1] > 2:
            state, _ = _halves(state)
    first, second = _halves(state.to(gl.float32, bitcast=True))
    sums, top = gl.split(gl.reshape(first, (64, 4, 2)))
    fade, _ = gl.split(gl.reshape(second, (64, 4, 2)))
    return words, sums, top, fade


@gluon.jit
def weigh(s, top, scale2, dtype: gl.constexpr):
    """Return (words of weights of `dtype`, their sums, maxima, fades) of raw scores s [64, N / 8, 4, 2].

    s is an accumulator of one warpgroup: a thread holds its pairs of two rows. `top`, sums, maxima and fades belong to
    a thread and a row: [64, 4]. What was summed before has to be multiplied by the fade, which mostly is one.
    """
    HELD: gl.constexpr = s.shape[1] * 4
    ASM: gl.constexpr = _weigh_asm(HELD, _pair(dtype), LIMIT)
    CONSTRAINTS: gl.constexpr = _weigh_constraints(HELD)
    result = gl.inline_asm_elementwise(ASM, CONSTRAINTS, [s, top, scale2], dtype=gl.int32, is_pure=True, pack=HELD)
    return _taken_apart(result)


@gluon.constexpr_function
def _pack_asm(pair):
    return f"cvt.rn.{pair}.f32 $0, $2, $1;"


@gluon.jit
def pack_words(p, dtype: gl.constexpr):
    """Return (words of weights of `dtype`, their sums) of float32 weights p [64, N / 8, 4, 2], as `weigh` does."""
    words_like, sums_like, _, _ = _taken_apart(p.to(gl.int32, bitcast=True))  # for their layouts
    low, high = gl.split(p)
    ASM: gl.constexpr = _pack_asm(_pair(dtype))
    words = gl.inline_asm_elementwise(ASM, "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)
    words = gl.permute(gl.reshape(words, (64, p.shape[1] // 2, 2, 4)), (0, 1, 3, 2))
    sums = gl.sum(gl.sum(p, 3), 1)
    return (
        gl.convert_layout(words, words_like.type.layout, assert_trivial=True),
        gl.convert_layout(sums, sums_like.type.layout, assert_trivial=True),
    )


@gluon.jit
def as_operand(words, dtype: gl.constexpr, D: gl.constexpr):
    """Return the weights [64, N] in these words as what a matmul with values [N, D] reads from registers."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    p = gl.permute(gl.join(low, high), (0, 1, 3, 2, 4))
    p = gl.reshape(p, (64, words.shape[1] * 16)).to(dtype, bitcast=True)
    return gl.convert_layout(p, gl.DotOperandLayout(0, ACC, 2), assert_trivial=True)


@gluon.jit
def add_values(p, v, acc):
    """Start acc += P V for the values v [N, D] of a tile, whose weights are p: words, or what `as_operand` returned."""
    if p.dtype == gl.int32:
        p = as_operand(p, v.dtype, v.shape[1])
    return warpgroup_mma(p, v, acc, is_async=True)
