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
    """Yield (op, arguments): with and without lanes, log-sum-exp and gradients, dense and strided."""
    ops = torch.ops.swba
    case = CASE._replace(head_dim=head_dim)
    p = case.pattern
    pattern = (0.3, p.block_size, p.window, p.sink, p.grid_start, impl)
    q, k, v = qkv(case, dtype, device)
    for need_lse in (False, True):
        yield ops.forward.default, (q, k, v, *pattern, need_lse, True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    yield ops.forward.default, (*leaves, *pattern, True, True)
    odd = [x.mT.contiguous().mT for x in (q, k, v)]
    yield ops.forward.default, (*odd, *pattern, True, False)
    out, lse = ops.forward(q, k, v, *pattern, True, True)
    yield ops.backward.default, (torch.randn_like(out), q, k, v, out, lse, *pattern, True)
    rows = ring_case(case, dtype, device)
    rings = rows.k_ring.nan_to_num(0.5), rows.v_ring.nan_to_num(0.5)
    for lanes in (rows.lanes, None):
        yield ops.prefill.default, (rows.q, rows.k, rows.v, *rings, rows.position, lanes, *pattern, True)
        yield ops.ring_write.default, (*rings, rows.k, rows.v, rows.position, lanes, p.sink, impl)
    q, k_ring, v_ring, valid, lanes = decode_case(case, dtype, device)
    rings = k_ring.nan_to_num(0.5), v_ring.nan_to_num(0.5)
    for chosen, need_lse in ((lanes, True), (None, False)):
        yield ops.decode.default, (q, *rings, valid, chosen, 0.3, impl, need_lse)
