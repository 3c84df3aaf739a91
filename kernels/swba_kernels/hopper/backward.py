"""Gradients of attention over the block window on Hopper: the terms of each row, then keys and values, then queries.

B batch, H query heads, Hkv key/value heads, N tokens, D head dim.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..portable.forward import LOG2E
from .assembler import own_assembler
from .backward_dkv import dkv_kernel
from .backward_dq import dq_kernel
from .backward_fused import fused_kernel
from .backward_fused_narrow import fused_narrow_kernel
from .backward_order import sum_layout
from .backward_ranges import first_tile
from .backward_shared import ROW_COPIES, row_box_layout
from .launch import _Base, descriptor, multiprocessors
from .supports import FEWEST_WAVES, tma_strides, waves_of_backward

COPIES = ROW_COPIES.value


class Walk(NamedTuple):
    """A launch configuration: `warpgroups` x 64 rows stay in shared memory while tiles of `rows` rows pass by."""

    warpgroups: int
    rows: int
    stages: int
    registers: int


class Split(NamedTuple):
    """One kernel for the gradients of keys and values and one for those of queries: seven matmuls a tile."""

    dkv: Walk
    dq: Walk


class Fused(NamedTuple):
    """One kernel for all gradients, five matmuls a tile, that sums those of queries in global memory.

    Pipeline stages of the queries and of dS on its way to the warpgroups that make dQ of it, registers of a consumer's
    thread, how many kv heads run side by side at least and at most, how many bytes of the second-level cache they may
    take, and for how many queries a program takes its turn to add (by key, so that the sums have the same bits every
    time; 0: it adds at once).
    """

    stages: int
    slope_stages: int
    registers: int
    fewest_heads: int
    most_heads: int
    cache: int = 36 << 20
    turn_rows: int = 0

    def side_by_side(self, heads: int, head_bytes: int) -> int:
        """Return how many of all kv `heads` run side by side.

        As many as the second-level cache holds of what passes by a tile of keys, `head_bytes` for each, so that the
        next tiles of the head find it there; but within limits, and in groups of equal size, or nearly so.
        """
        together = min(max(self.cache // head_bytes, self.fewest_heads), self.most_heads)
        return triton.cdiv(heads, triton.cdiv(heads, together))


# Chosen on an H200 under triton 3.6.0; by head dim.
SPLIT = {
    64: Split(dkv=Walk(2, 64, 4, 240), dq=Walk(2, 128, 3, 240)),
    128: Split(dkv=Walk(2, 64, 3, 240), dq=Walk(2, 64, 4, 240)),
}
FAST = {
    64: Fused(stages=4, slope_stages=3, registers=208, fewest_heads=4, most_heads=12),
    128: Fused(stages=2, slope_stages=3, registers=240, fewest_heads=2, most_heads=4),
}
IN_TURN = {  # the more heads, the fewer programs of one head wait for one another
    64: FAST[64]._replace(fewest_heads=6, most_heads=32, cache=48 << 20, turn_rows=256),
    128: FAST[128]._replace(fewest_heads=4, turn_rows=64),
}


def choose_config(head_dim: int, deterministic: bool, waves: float) -> Split | Fused:
    """Return the configuration for `waves` times as many programs of the fused kernel as a GPU runs at once."""
    if not deterministic:
        return FAST[head_dim]
    return (SPLIT if waves < FEWEST_WAVES else IN_TURN)[head_dim]


@own_assembler
@triton.jit(
    do_not_specialize=[
        "s_ob", "s_oh", "s_on", "s_gb", "s_gh", "s_gn", "heads", "n", "terms_stride", "copy_stride", "tiles",
    ]
)  # fmt: skip
def row_terms_kernel(
    p_out, p_grad, p_lse, p_lse2, p_delta, s_ob, s_oh, s_on, s_gb, s_gh, s_gn, heads, n, terms_stride,
    copy_stride, tiles, D: tl.constexpr, ROWS: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Write the log-sum-exp in base 2 and delta = sum(out * dout) of each row; strides count 8 elements.

    A row without a finite log-sum-exp gets (inf, 0), which makes its probabilities and gradients zero. Copy i of the
    terms holds row r at r - i: TMA boxes start at multiples of 16 bytes, and so one of them starts at any row.
    """
    pid = tl.program_id(0)
    i_bh = pid // tiles
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    rows = pid % tiles * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)[None, :]
    inside = rows < n
    wide = rows.to(tl.int64)[:, None] * 8
    out = tl.load(p_out + (i_b * s_ob + i_h * s_oh) * 8 + wide * s_on + d, mask=inside[:, None], other=0.0)
    grad = tl.load(p_grad + (i_b * s_gb + i_h * s_gh) * 8 + wide * s_gn + d, mask=inside[:, None], other=0.0)
    lse = tl.load(p_lse + i_bh.to(tl.int64) * n + rows, mask=inside, other=0.0)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    infinite = tl.abs(lse) == float("inf")
    at = i_bh.to(tl.int64) * terms_stride + rows
    lse2 = tl.where(infinite, float("inf"), lse * 1.4426950408889634)
    delta = tl.where(infinite, 0.0, delta)
    for i in tl.static_range(COPIES):
        shifted = at - i + i * copy_stride.to(tl.int64)
        tl.store(p_lse2 + shifted, lse2, mask=inside & (rows >= i))
        tl.store(p_delta + shifted, delta, mask=inside & (rows >= i))


def row_terms(out: Tensor, dout: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log-sum-exp in base 2, delta), each [COPIES * B * H, N]; rows start at multiples of 16 bytes."""
    batch, heads, n, head_dim = out.shape
    terms = torch.empty(2, COPIES * batch * heads, -(-n // COPIES) * COPIES, dtype=torch.float32, device=out.device)
    rows = 64
    tiles = triton.cdiv(n, rows)
    row_terms_kernel[(tiles * batch * heads,)](
        out, dout, lse, terms[0], terms[1], *(s // 8 for s in (*out.stride()[:3], *dout.stride()[:3])),
        heads, n, terms.shape[2], batch * heads * terms.shape[2], tiles,
        D=head_dim, ROWS=rows, COPIES=COPIES, num_warps=4,
    )  # fmt: skip
    return terms[0, :, :n], terms[1, :, :n]


def row_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Return the TMA descriptor of float32 x [A, N] for boxes [1, rows]; numbers past the end are read as zero."""
    return _row_descriptor(x.data_ptr(), x.shape, x.stride(0), rows)


@lru_cache(maxsize=1024)
def _row_descriptor(address: int, shape: torch.Size, stride: int, rows: int) -> TensorDescriptor:
    return TensorDescriptor(_Base(address, torch.float32), list(shape), [stride, 1], [1, rows], row_box_layout())


def sum_descriptor(x: Tensor) -> TensorDescriptor:
    """Return the TMA descriptor of contiguous float32 x [B, H, A, 64] for boxes [1, 1, 64, 64]."""
    return _sum_descriptor(x.data_ptr(), x.shape, x.stride())


@lru_cache(maxsize=1024)
def _sum_descriptor(address: int, shape: torch.Size, strides: tuple[int, ...]) -> TensorDescriptor:
    return TensorDescriptor(_Base(address, torch.float32), list(shape), list(strides), [1, 1, 64, 64], sum_layout(4))


def copyable(x: Tensor) -> Tensor:
    """Return x itself when a TMA descriptor can describe it, else a contiguous copy."""
    return x if tma_strides(x) and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


@own_assembler
@gluon.jit(
    do_not_specialize=["count", "n", "block_size", "window", "sink", "grid_start", "tiles", "sink_part"]
)  # fmt: skip
def start_turns_kernel(
    p_counters, count, n, block_size, window, sink, grid_start, tiles, sink_part, ROWS: gl.constexpr, KEYS: gl.constexpr
):
    """Set the ticket to 0, and the counter of each ROWS queries to ~(the first tile of keys that adds to some)."""
    i = gl.program_id(0) * 128 + gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    pattern = (n, block_size, window, 0, grid_start)
    row = gl.minimum(i % tiles * ROWS, n - 1)
    first = gl.where(i < sink_part, first_tile(row, sink, pattern, KEYS), 0)
    gl.store(p_counters + 4 + i, ~first, mask=i < count)
    gl.store(p_counters + i, gl.zeros_like(i), mask=i < 4)


@own_assembler
@triton.jit(do_not_specialize=["s_b", "s_h", "s_n", "heads", "n", "tiles"])
def cast_kernel(p_sum, p_more, p_dq, scale, s_b, s_h, s_n, heads, n, tiles, D: tl.constexpr, TWO: tl.constexpr):
    """Write dq = scale * sum in the dtype and layout of dq, or of TWO sums; strides count 8 elements.

    Sums of 64 rows lie together, ordered as `by_thread` orders each 64 columns of them.
    """
    pid = tl.program_id(0)
    i_bh = pid // tiles
    i_b = (i_bh // heads).to(tl.int64)
    i_h = (i_bh % heads).to(tl.int64)
    rows = (pid % tiles * 64 + tl.arange(0, 64))[:, None]
    d = tl.arange(0, D)[None, :]
    at = pid.to(tl.int64) * (64 * D) + tl.arange(0, 64 * D)
    x = tl.load(p_sum + at)
    if TWO:
        x += tl.load(p_more + at)
    x = tl.reshape(x, [D // 64, 8, 4, 8, 4, 2, 2])
    x = tl.reshape(tl.permute(x, [2, 5, 3, 0, 1, 4, 6]), [64, D])
    p_dq += (i_b * s_b + i_h * s_h) * 8 + rows.to(tl.int64) * s_n * 8 + d
    tl.store(p_dq, (x * scale).to(p_dq.dtype.element_ty), mask=rows < n)


class _Call(NamedTuple):
    """What all kernels of one call share."""

    q: Tensor
    q_sink: Tensor | None
    k: Tensor
    v: Tensor
    dout: Tensor
    lse2: Tensor
    delta: Tensor
    scale: float
    pattern: tuple[int, int, int, int, int]

    def head_bytes(self) -> int:
        """Return what passes by a tile of keys of a kv head: its window's queries and dout, and float32 sums of dQ."""
        _, heads, _, head_dim = self.q.shape
        return heads // self.k.shape[1] * self.pattern[2] * head_dim * (2 + 2 + 4)

    def key_tiles(self, keys: int, apart: bool) -> int:
        """Return how many tiles of `keys` a head has; none holds sinks and others if those are met apart."""
        n, _, _, sink, _ = self.pattern
        return triton.cdiv(sink, keys) + triton.cdiv(n - sink, keys) if apart else triton.cdiv(n, keys)


class _Gradients(NamedTuple):
    q: Tensor
    q_sink: Tensor | None
    k: Tensor
    v: Tensor

    def key_descriptors(self, sink: int, apart: bool) -> tuple[TensorDescriptor | None, ...]:
        """Return those of dk and dv, and of the rows in them that belong to sinks, if sinks are met apart."""
        ends = (self.k[:, :, :sink], self.v[:, :, :sink]) if apart else (None, None)
        return tuple(None if x is None else descriptor(x, 64) for x in (self.k, self.v, *ends))


def _maybe(x: Tensor | None, rows: int) -> TensorDescriptor | None:
    return None if x is None else descriptor(x, rows)


def _split(call: _Call, config: Split, grads: _Gradients) -> None:
    q, q_sink, k, v, dout, lse2, delta, scale, pattern = call
    batch, heads, n, head_dim = q.shape
    group, sink = heads // k.shape[1], pattern[3]
    walk = config.dkv
    apart = q_sink is not None
    tiles = call.key_tiles(walk.warpgroups * 64, apart)
    dkv_kernel[(tiles * batch * k.shape[1],)](
        descriptor(q, walk.rows), _maybe(q_sink, walk.rows), descriptor(dout, walk.rows),
        descriptor(k, 64), descriptor(v, 64), row_descriptor(lse2, walk.rows), row_descriptor(delta, walk.rows),
        *grads.key_descriptors(sink, apart), scale * LOG2E, *pattern, heads, group, tiles,
        WARPGROUPS=walk.warpgroups, BLOCK_M=walk.rows, D=head_dim, STAGES=walk.stages, REGISTERS=walk.registers,
        Q_SINK=q_sink is not None, num_warps=4,
    )  # fmt: skip
    walk = config.dq
    tiles = triton.cdiv(n, walk.warpgroups * 64)
    programs, rest, rest_programs = tiles * batch * heads, None, None
    if q_sink is not None:
        rest = _first_reader_of_others(pattern)
        grads.q[:, :, :rest].zero_()
        rest_programs = triton.cdiv(n - rest, walk.warpgroups * 64) * batch * heads
        programs += rest_programs
    dq_kernel[(programs,)](
        descriptor(q, 64), _maybe(q_sink, 64), descriptor(dout, 64), descriptor(k, walk.rows), descriptor(v, walk.rows),
        descriptor(grads.q, 64), _maybe(grads.q_sink, 64), lse2, delta,
        scale * LOG2E, *pattern[:1], lse2.stride(0), *pattern[1:], heads, group, tiles, rest, rest_programs,
        WARPGROUPS=walk.warpgroups, BLOCK_N=walk.rows, D=head_dim, STAGES=walk.stages, REGISTERS=walk.registers,
        Q_SINK=q_sink is not None, num_warps=4,
    )  # fmt: skip


def _first_reader_of_others(pattern: tuple[int, int, int, int, int]) -> int:
    """Return the first query that sees a key which is no sink: its block is the first to end behind the sinks."""
    n, block_size, _, sink, grid_start = pattern
    return n if sink >= n else max(sink - (sink - grid_start) % block_size, 0)


def _fused(call: _Call, config: Fused, grads: _Gradients) -> None:
    q, q_sink, k, v, dout, lse2, delta, scale, pattern = call
    batch, heads, n, head_dim = q.shape
    sink, rows, keys = pattern[3], 64, 128
    # Turns go by key in the order in which tiles are met, which sinks would break: they take turns of their own.
    apart = q_sink is not None or (config.turn_rows > 0 and sink > 0)
    tiles, work = triton.cdiv(n, rows), call.key_tiles(keys, apart) * batch * k.shape[1]
    size = ((1 + apart) * batch, heads, tiles * head_dim, 64)
    if config.turn_rows:  # the first to add to a tile writes it instead
        sums = torch.empty(size, dtype=torch.float32, device=q.device)
        if apart:  # nobody adds to queries that see only sinks
            reader = _first_reader_of_others(pattern)
            sums[:batch, :, : (tiles if reader == n else reader // rows) * head_dim].zero_()
        turns = triton.cdiv(n, config.turn_rows)
        part = batch * heads * (head_dim // 64) * turns  # at head dim 128 two add, each half of the columns
        counters = torch.empty(4 + (1 + apart) * part, dtype=torch.int32, device=q.device)
        start_turns_kernel[(triton.cdiv(counters.numel(), 128),)](
            counters, counters.numel() - 4, *pattern, turns, part,
            ROWS=config.turn_rows, KEYS=keys, num_warps=4,
        )  # fmt: skip
    else:
        sums = torch.zeros(size, dtype=torch.float32, device=q.device)
        # At head dim 128 nobody takes a ticket.
        counters = (torch.zeros if head_dim == 64 else torch.empty)(4, dtype=torch.int32, device=q.device)
    arguments = (
        descriptor(q, rows), _maybe(q if apart and q_sink is None else q_sink, rows), descriptor(dout, rows),
        descriptor(k, keys), descriptor(v, 64),
        row_descriptor(lse2, rows), row_descriptor(delta, rows), sum_descriptor(sums),
        *grads.key_descriptors(sink, apart), counters[4:], counters,
        scale * LOG2E, *pattern, heads, heads // k.shape[1], batch * k.shape[1],
        config.side_by_side(batch * k.shape[1], call.head_bytes()),
    )  # fmt: skip
    constants = {"BLOCK_M": rows, "D": head_dim, "STAGES": config.stages, "SLOPE_STAGES": config.slope_stages}
    constants |= {"REGISTERS": config.registers, "TURN_ROWS": config.turn_rows, "Q_SINK": apart, "num_warps": 4}
    if head_dim == 128:
        fused_kernel[(work,)](*arguments, **constants)
    else:
        rest = 512 - 24 - 2 * config.registers  # a multiprocessor has 512 registers for four warpgroups' threads
        fused_narrow_kernel[(min(work, multiprocessors(q.device)),)](*arguments, work, SUM_REGISTERS=rest, **constants)
    parts = sums.chunk(1 + apart)
    casts = [(parts[0], None, grads.q)]
    if q_sink is not None:
        casts.append((parts[1], None, grads.q_sink))
    elif apart:
        casts = [(*parts, grads.q)]
    for x, more, dq in casts:
        cast_kernel[(tiles * batch * heads,)](
            x, more, dq, scale, *(s // 8 for s in dq.stride()[:3]), heads, n, tiles,
            D=head_dim, TWO=more is not None, num_warps=4,
        )  # fmt: skip


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    block_size: int,
    window: int,
    sink: int,
    grid_start: int,
    q_sink: Tensor | None = None,
    deterministic: bool = True,
    config: Split | Fused | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (dq, dk, dv, dq_sink) of the forward call that gave `out` and `lse`.

    Args:
        dout, q, out: [B, H, N, D], fp16 or bf16, D 64 or 128.
        k, v: [B, Hkv, N, D].
        lse: natural log-sum-exp, float32 [B, H, N].
        scale, block_size, window, sink, grid_start: as in the forward call.
        q_sink: the queries that read sinks, as in the forward call.
        deterministic: give the same bits every time, or the fastest way: dq is then summed in float32 in any order.
        config: replaces the table's choice.

    Returns:
        Gradients with the dtypes and layouts of q, k, v and q_sink; None for the latter without it.
    """
    of_sinks = None if q_sink is None else torch.empty_like(q_sink)
    grads = _Gradients(torch.empty_like(q), of_sinks, torch.empty_like(k), torch.empty_like(v))
    if q.numel() == 0:
        return grads.q, grads.k.zero_(), grads.v.zero_(), grads.q_sink
    dout, out, lse = copyable(dout), copyable(out), lse.contiguous()
    lse2, delta = row_terms(out, dout, lse)
    n = q.shape[2]
    pattern = (n, min(block_size, n - grid_start), min(window, n), min(sink, n), grid_start)
    call = _Call(q, q_sink, k, v, dout, lse2, delta, scale, pattern)
    if config is None:
        config = choose_config(q.shape[3], deterministic, waves_of_backward(q, k))
    if isinstance(config, Split):
        _split(call, config, grads)
    else:
        _fused(call, config, grads)
    return grads.q, grads.k, grads.v, grads.q_sink
