"""The merge of partial decode results: float32 outputs and base-2 log-sum-exps of the parts of a query tile's keys.

A unit is 64 query rows of one part: rows [64 u, 64 u + 64) of the workspace. N queries, H heads, D head dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FIELDS = tl.constexpr(6)  # of an entry in the table: row, head, first query, first unit, units between parts, parts
MAX_PARTS = 64
PARTS_AT_ONCE = 8
ROWS = 16  # query rows of a program


def room(parts: int) -> int:
    """Return the constant MAX_PARTS of the kernel for tiles of at most `parts` parts: one of two variants."""
    return PARTS_AT_ONCE if parts <= PARTS_AT_ONCE else MAX_PARTS


@triton.jit(do_not_specialize=["heads", "n", "stride_ob", "stride_oh", "stride_on"])
def combine(
    p_part, p_part_lse, p_out, p_lse, p_merges, heads, n, stride_ob, stride_oh, stride_on,
    D: tl.constexpr, ROWS: tl.constexpr, MAX_PARTS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Own ROWS rows of a query tile and add up its parts in increasing order, AT_ONCE loads under way at a time.

    A part without keys has the log-sum-exp -inf and no output. Parts of short rings may all but one be such. The loads
    depend on nothing that is loaded, so that they share one wait: past the last part they read it again.
    """
    p_merge = p_merges + tl.program_id(0) * FIELDS
    i_b = tl.load(p_merge).to(tl.int64)
    i_h = tl.load(p_merge + 1).to(tl.int64)
    first = tl.load(p_merge + 2)
    unit = tl.load(p_merge + 3)
    step = tl.load(p_merge + 4)
    parts = tl.load(p_merge + 5)
    i_r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    i_p = tl.arange(0, MAX_PARTS)
    i_d = tl.arange(0, D)
    # Dependents come last: CTAs that settle while a decode kernel still runs crowd the first multiprocessors it leaves.
    gdc_wait()
    gdc_launch_dependents()

    at = (unit + i_p * step).to(tl.int64)[:, None] * 64 + i_r[None, :]
    lse = tl.load(p_part_lse + at, mask=(i_p < parts)[:, None], other=float("-inf"))
    top = tl.max(lse, 0)
    total = tl.sum(tl.exp2(lse - top[None, :]), 0)
    acc = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, parts, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            row = (unit + tl.minimum(start + i, parts - 1) * step).to(tl.int64) * 64 + i_r
            part_lse = tl.load(p_part_lse + row)
            part = tl.load(p_part + row[:, None] * D + i_d[None, :])
            weight = tl.where(start + i < parts, tl.exp2(part_lse - top), 0.0)
            acc += tl.where(weight[:, None] > 0, weight[:, None] * part, 0.0)

    rows = first + i_r
    in_n = rows < n
    tl.store(p_lse + (i_b * heads + i_h) * n + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=in_n)
    p_row = p_out + i_b * stride_ob + i_h * stride_oh + rows.to(tl.int64)[:, None] * stride_on
    out = (acc / total[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_row + i_d[None, :], out, mask=in_n[:, None])
