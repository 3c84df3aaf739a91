"""Sample arguments of every custom op, for opcheck on any device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from kernel_cases import Case, decode_case, qkv, ring_case

from swba_kernels import BlockWindow

CASE = Case(BlockWindow(5, 13, 4, 2), 31, heads=4, kv_heads=2, head_dim=24)


def op_samples(
    impl: str, dtype: torch.dtype, device: str, head_dim: int = CASE.head_dim
) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield (op, arguments): with and without q_sink, lanes, log-sum-exp and gradients, dense and strided."""
    ops = torch.ops.swba
    case = CASE._replace(head_dim=head_dim)
    p = case.pattern
    pattern = (0.3, p.block_size, p.window, p.sink, p.grid_start, impl)
    q, k, v = qkv(case, dtype, device)
    q_sink = q.roll(1, 2)
    for need_lse in (False, True):
        yield ops.forward.default, (q, k, v, None, *pattern, need_lse, True)
    for last in ([q_sink], []):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, *last)]
        yield ops.forward.default, (*leaves, *[None] * (4 - len(leaves)), *pattern, True, True)
    odd = [x.mT.contiguous().mT for x in (q, k, v, q_sink)]
    yield ops.forward.default, (*odd, *pattern, True, False)
    for second in (q_sink, None):
        out, lse = ops.forward(q, k, v, second, *pattern, True, True)
        yield ops.backward.default, (torch.randn_like(out), q, k, v, second, out, lse, *pattern, True)
    rows = ring_case(case, dtype, device)
    rings = rows.k_ring.nan_to_num(0.5), rows.v_ring.nan_to_num(0.5)
    for lanes, second in ((rows.lanes, None), (None, None), (None, rows.q.neg())):
        yield ops.prefill.default, (rows.q, rows.k, rows.v, second, *rings, rows.position, lanes, *pattern, True)
        yield ops.ring_write.default, (*rings, rows.k, rows.v, rows.position, lanes, p.sink, impl)
    q, k_ring, v_ring, valid, lanes = decode_case(case, dtype, device)
    rings = k_ring.nan_to_num(0.5), v_ring.nan_to_num(0.5)
    for chosen, need_lse, second, sink in ((lanes, True, None, 0), (None, False, None, 0), (lanes, True, q.neg(), 4)):
        yield ops.decode.default, (q, *rings, second, valid, chosen, sink, 0.3, impl, need_lse)
