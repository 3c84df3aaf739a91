"""Decode on Hopper: the queries of one block against the first `valid` slots of a ring.

Two kernels, one for blocks that fill the GPU (decode_persistent.py) and one for smaller ones (decode_small.py), then a
merge of what was cut along the keys (combine.py). Each may start while the kernel before it ends.

B rows of the call, L ring lanes, H query heads, Hkv key/value heads, N queries, S ring slots, D head dim.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..portable.forward import LOG2E
from .combine import FIELDS, PARTS_AT_ONCE, combine, rows_of_program
from .decode_persistent import decode_persistent
from .decode_plan import LanePlan, plan_lane, table_of
from .decode_small import decode_small
from .launch import descriptor, multiprocessors


class _Tables(NamedTuple):
    """A plan and its table on the device: items [rounds * ctas, 8] and merges [M, 6], int32.

    Graphs hold the addresses of these tensors, so none is ever dropped. A thread of its own makes them: the caller's
    may allocate from a pool in which nothing may outlive the call (while torch.compile warms its graphs up).
    """

    plan: LanePlan
    ctas: int
    items: Tensor
    merges: Tensor
    units: int


@cache
def _tables(
    batch: int, heads: int, n: int, d: int, slots: int, lanes: int, device: torch.device, plan: LanePlan | None
) -> _Tables:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("decode: expected a call with these sizes before the capture of a graph, got none")
    sms = multiprocessors(device)
    plan = plan or plan_lane(d, heads, n, slots, lanes, sms)
    table = table_of(plan, batch, n, sms)
    with ThreadPoolExecutor(1) as thread:
        items, merges = thread.map(lambda x: torch.tensor(x, dtype=torch.int32, device=device), table[1:3])
    return _Tables(plan, table.ctas, items, merges.reshape(-1, FIELDS.value), table.units)


def decode(
    q: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    valid: Tensor,
    lanes: Tensor | None,
    *,
    scale: float,
    q_sink: Tensor | None = None,
    sink: int = 0,
    plan: LanePlan | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from every query of row b to slots [0, valid[b]) of ring lane lanes[b].

    Slots past `valid` are never read. The bits of a row's result depend on its own numbers, the shape and layout of
    q[b] and the shape of the ring, not on the other rows of the call.

    Args:
        q: [B, H, N, D], float16 or bfloat16, D 64 or 128, strides multiples of 8 elements.
        k_ring, v_ring: [L, Hkv, S, D], likewise.
        valid: [B] int64, from 1 to S.
        lanes: [B] int64, or None where row b reads lane b.
        scale: factor on the scores.
        q_sink: the queries that read slots [0, sink) in place of q, with the shape of q and likewise.
        sink: greater than 0 exactly if there is q_sink.
        plan: replaces the chosen one, for tuning.

    Returns:
        out [B, H, N, D] with the layout of q and the natural log-sum-exp [B, H, N] in float32.

    Raises:
        RuntimeError: the first call for these sizes is made while a graph is captured.
    """
    if scale < 0:
        q, q_sink, scale = -q, None if q_sink is None else -q_sink, -scale
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    shape = (q.shape[0], k_ring.shape[1], q.shape[1] // k_ring.shape[1] * q.shape[2], q.shape[3])
    if _groups_adjoin(q) and _groups_adjoin(out) and (q_sink is None or _groups_adjoin(q_sink)):
        q, out_rows, lse_rows = q.view(shape), out.view(shape), lse.view(shape[:3])
        q_sink = None if q_sink is None else q_sink.view(shape)
    else:
        out_rows, lse_rows = out, lse
    _decode(q, q_sink, k_ring, v_ring, valid, lanes, out_rows, lse_rows, sink, scale, plan)
    return out, lse


def _groups_adjoin(x: Tensor) -> bool:
    """Tell whether the rows of neighbouring heads follow each other, so that a group's may share tiles."""
    return x.shape[2] == 1 or x.stride(1) == x.shape[2] * x.stride(2)


def _decode(
    q: Tensor, q_sink: Tensor | None, k_ring: Tensor, v_ring: Tensor, valid: Tensor, lanes: Tensor | None,
    out: Tensor, lse: Tensor, sink: int, scale: float, plan: LanePlan | None,
) -> None:  # fmt: skip
    batch, heads, n, d = q.shape
    held, kv_heads, slots = k_ring.shape[:3]
    tables = _tables(batch, heads, n, d, slots, held, q.device, plan)
    plan, config = tables.plan, tables.plan.config
    part = torch.empty((tables.units * 64, d), dtype=torch.float32, device=q.device)
    part_lse = torch.empty(tables.units * 64, dtype=torch.float32, device=q.device)
    results = (descriptor(out, 64), lse, part, part_lse)
    queries = (descriptor(q, 64), None if q_sink is None else descriptor(q_sink, 64))
    inputs = (*queries, descriptor(k_ring, config.key_tile), descriptor(v_ring, config.key_tile))
    row_strides = (valid.stride(0), 0 if lanes is None else lanes.stride(0))
    filled = (valid, valid if lanes is None else lanes)
    scale2 = max(scale * LOG2E, 1e-30)
    sizes = (heads, heads // kv_heads, n, slots, None if q_sink is None else sink)
    constants = {
        "BN": config.key_tile, "D": d, "STAGES": config.stages, "HAS_LANES": lanes is not None,
        "Q_SINK": q_sink is not None, "num_warps": 4,
    }  # fmt: skip
    if config.warpgroups > 1:
        decode_persistent[(tables.ctas,)](
            *inputs, *results, tables.items, *filled,
            *sizes, plan.slot_tiles, *row_strides, scale2,
            W=config.warpgroups, TURNS=config.turns, REGISTERS=config.registers, **constants, launch_pdl=True,
        )  # fmt: skip
    else:
        splits = len(plan.bundles) // len(plan.tiles)
        decode_small[(-(-n // 64) * splits, heads, batch)](
            *inputs, *results, *filled,
            *sizes, splits, *row_strides, scale2,
            **constants, launch_pdl=True,
        )  # fmt: skip
    if tables.units:
        rows = rows_of_program(d)
        combine[(tables.merges.shape[0], 64 // rows)](
            part, part_lse, out, lse, tables.merges, heads, n, *out.stride()[:3],
            D=d, ROWS=rows, AT_ONCE=PARTS_AT_ONCE, num_warps=4, launch_pdl=True,
        )  # fmt: skip
