"""The merge of partial results, of a decode or a prefill: float32 outputs and base-2 log-sum-exps of parts of the keys.

A unit is 64 query rows of one part: rows [64 u, 64 u + 64) of the workspace. N queries, H heads, D head dim.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .assembler import own_assembler
from .compat import allow_dependents, await_prerequisites
from .forward_cut import merge_of

FIELDS = gl.constexpr(6)  # of an entry in the table: row, head, first query, first unit, units between parts, parts
PARTS_AT_ONCE = 8


def rows_of_program(head_dim: int) -> int:
    """Return how many query rows a program owns: its share of PARTS_AT_ONCE parts takes 64 registers of a thread."""
    return 1024 // head_dim


@gluon.jit
def add_up(
    p_part, p_part_lse, p_out, p_lse, i_b, i_h, first, end, unit, step, parts, heads, n,
    stride_ob, stride_oh, stride_on, D: gl.constexpr, ROWS: gl.constexpr, AT_ONCE: gl.constexpr,
):  # fmt: skip
    """Add up the parts of ROWS rows of 64 from `first` on in increasing order, AT_ONCE at a time; store those < `end`.

    The first part is in `unit`, the others `step` units apart. A part without keys has the log-sum-exp -inf and no
    output. Parts of short rings may all but one be such. A thread holds the same rows and columns of every part, so
    that all loads are under way at once and nothing is exchanged.
    """
    PARTS: gl.constexpr = gl.BlockedLayout([AT_ONCE, 1, 4], [1, 128 // D, D // 4], [1, 4, 1], [2, 1, 0])
    LSES: gl.constexpr = gl.SliceLayout(2, PARTS)
    RESULT: gl.constexpr = gl.SliceLayout(0, PARTS)
    i_r = gl.program_id(1) * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(0, LSES))
    i_p = gl.arange(0, AT_ONCE, layout=gl.SliceLayout(1, LSES))
    i_d = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(0, PARTS)))
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(0, LSES))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(0, LSES))
    acc = gl.zeros([ROWS, D], gl.float32, RESULT)
    # Dependents come last: CTAs that settle while a decode kernel still runs crowd the first multiprocessors it leaves.
    await_prerequisites()
    allow_dependents()
    for start in range(0, parts, AT_ONCE):
        at = (unit + (start + i_p) * step).to(gl.int64)[:, None] * 64 + i_r[None, :]
        exists = (start + i_p < parts)[:, None] & (i_r >= 0)[None, :]
        lse = gl.load(p_part_lse + at, mask=exists, other=float("-inf"))
        columns = gl.expand_dims(gl.expand_dims(i_d, 0), 0)
        part = gl.load(p_part + (gl.expand_dims(at, 2) * D + columns), mask=gl.expand_dims(exists, 2), other=0.0)
        new_top = gl.maximum(top, gl.max(lse, 0))
        base = gl.where(new_top > float("-inf"), new_top, 0.0)
        fade = gl.exp2(top - base)
        weight = gl.exp2(lse - base[None, :])
        total = total * fade + gl.sum(weight, 0)
        seen = gl.expand_dims(weight, 2)
        added = gl.sum(gl.where(seen > 0, seen * part, 0.0), 0)
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, RESULT), assert_trivial=True)[:, None] + added
        top = new_top

    rows = first + i_r
    in_block = rows < end
    gl.store(p_lse + (i_b * heads + i_h) * n + rows, (top + gl.log2(total)) * 0.6931471805599453, mask=in_block)
    share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, RESULT), assert_trivial=True)
    rows = gl.convert_layout(rows, gl.SliceLayout(1, RESULT), assert_trivial=True)
    columns = gl.convert_layout(i_d, gl.SliceLayout(0, RESULT), assert_trivial=True)
    at_row = i_b * stride_ob + i_h * stride_oh + rows.to(gl.int64) * stride_on
    p_row = p_out + gl.multiple_of(at_row, 8)[:, None]  # strides are such multiples, as TMA asks for
    out = (acc * share[:, None]).to(p_out.dtype.element_ty)
    gl.store(p_row + columns[None, :], out, mask=(rows < end)[:, None])


@own_assembler
@gluon.jit(do_not_specialize=["heads", "n", "stride_ob", "stride_oh", "stride_on"])
def combine(
    p_part, p_part_lse, p_out, p_lse, p_merges, heads, n, stride_ob, stride_oh, stride_on,
    D: gl.constexpr, ROWS: gl.constexpr, AT_ONCE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Own ROWS rows of a query tile of a decode, as a table of merges has it."""
    p_merge = p_merges + gl.program_id(0) * FIELDS
    i_b = gl.load(p_merge).to(gl.int64)
    i_h = gl.load(p_merge + 1).to(gl.int64)
    first = gl.load(p_merge + 2)
    unit = gl.load(p_merge + 3)
    step = gl.load(p_merge + 4)
    parts = gl.load(p_merge + 5)
    add_up(
        p_part, p_part_lse, p_out, p_lse, i_b, i_h, first, n, unit, step, parts, heads, n,
        stride_ob, stride_oh, stride_on, D, ROWS, AT_ONCE,
    )  # fmt: skip


@own_assembler
@gluon.jit(
    do_not_specialize=[
        "whole", "cut", "parts", "heads", "n", "block_size", "grid_start", "heavy_items", "group_items", "last",
        "per_block", "lacking", "heavy", "light", "stride_ob", "stride_oh", "stride_on",
    ]
)  # fmt: skip
def combine_cut(
    p_part, p_part_lse, p_out, p_lse, whole, cut, parts, heads, n, block_size, grid_start,
    heavy_items, group_items, last, per_block, lacking, heavy, light, stride_ob, stride_oh, stride_on,
    GROUPS: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, AT_ONCE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Own ROWS rows of an item of a prefill that is cut along the keys."""
    head, first, end, unit = merge_of(
        gl.program_id(0), whole, cut, parts, GROUPS, n, block_size, grid_start,
        heavy_items, group_items, last, per_block, lacking, heavy, light,
    )  # fmt: skip
    if first + gl.program_id(1) * ROWS < end:
        i_b = (head // heads).to(gl.int64)
        i_h = (head % heads).to(gl.int64)
        add_up(
            p_part, p_part_lse, p_out, p_lse, i_b, i_h, first, end, unit, GROUPS, parts, heads, n,
            stride_ob, stride_oh, stride_on, D, ROWS, AT_ONCE,
        )  # fmt: skip
