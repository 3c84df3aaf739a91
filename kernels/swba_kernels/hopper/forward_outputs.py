"""What the consumers of the Hopper forward store: rows of out and of lse, or partial results of what is cut."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from .compat import box, tma_store
from .softmax import row_state


class Outputs(NamedTuple):
    """The descriptor of out [B, H, N, D], its address and strides, and the address of lse [B, H, N]."""

    descriptor: Any
    p_out: Any
    s_ob: Any
    s_oh: Any
    s_on: Any
    p_lse: Any


@gluon.jit
def wide(x):
    """Return a number that is not negative in 64 bits; one of 32 gets zeros, so that no register keeps its sign."""
    if x.dtype == gl.int32:
        x = x.to(gl.uint32)
    return x.to(gl.int64)


@gluon.jit
def _write(acc, top, total, i_b, i_h, row, end, smem, outputs, call):
    """Store 64 rows of out and lse from `row` on, those before `end`: by TMA unless that would touch the next block."""
    ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    top, total = row_state(top, total, ROWS)
    lse = (top + gl.log2(total)) * 0.6931471805599453
    lse_rows = row + gl.arange(0, 64, layout=ROWS)
    gl.store(outputs.p_lse + (i_b * call.heads + i_h).to(gl.int64) * wide(call.n) + lse_rows, lse, mask=lse_rows < end)
    out = (acc * (1.0 / total)[:, None]).to(smem.dtype)
    if (row + 64 <= end) | (end == call.n):
        tma.store_wait(0)
        smem.store(out)
        fence_async_shared()
        tma_store(outputs.descriptor, [i_b, i_h, row, 0], box(smem, 64, smem.shape[1]))
    else:
        rows = row + gl.arange(0, 64, layout=ROWS)
        columns = gl.arange(0, smem.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
        at = rows.to(gl.int64)[:, None] * wide(outputs.s_on) + columns[None, :]
        p_head = outputs.p_out + i_b.to(gl.int64) * wide(outputs.s_ob) + i_h.to(gl.int64) * wide(outputs.s_oh)
        gl.store(p_head + at, out, mask=(rows < end)[:, None])


@gluon.jit
def _write_part(acc, top, total, unit, cuts):
    """Store 64 rows of a part's result in the workspace."""
    ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    top, total = row_state(top, total, ROWS)
    rows = unit.to(gl.int64) * 64 + gl.arange(0, 64, layout=ROWS)
    columns = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
    gl.store(cuts.p_part_lse + rows, top + gl.log2(total))
    gl.store(cuts.p_part + (rows[:, None] * acc.shape[1] + columns[None, :]), acc * (1.0 / total)[:, None])


@gluon.jit
def keep(acc, top, total, item, row, smem, outputs, call, cuts, CUT: gl.constexpr, GROUP: gl.constexpr):
    """Store 64 rows from `row` on, of a whole item in out, of a part in the workspace."""
    if CUT:
        if item.unit > 0:
            _write_part(acc, top, total, item.unit - 1 + GROUP, cuts)
        else:
            _write(acc, top, total, item.i_b, item.i_h, row, item.end, smem, outputs, call)
    else:
        _write(acc, top, total, item.i_b, item.i_h, row, item.end, smem, outputs, call)
