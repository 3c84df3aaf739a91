from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import SMALL, Case, qkv, ring_case

from swba_kernels import BlockWindow, reference


def one_query(q, k, v, keys: list[int], scale: float) -> tuple[list[float], float]:
    """Attention of one query in plain Python."""
    scores = [scale * math.fsum(a * b for a, b in zip(q.tolist(), k[i].tolist(), strict=True)) for i in keys]
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    total = math.fsum(weights)
    out = [math.fsum(w * v[i, d].item() for w, i in zip(weights, keys, strict=True)) / total for d in range(v.shape[1])]
    return out, top + math.log(total)


def test_reference_equals_plain_python() -> None:
    case = Case(BlockWindow(3, 5, 2, 1), 11, heads=4, kv_heads=2, head_dim=8)
    q, k, v = qkv(case, torch.float64)
    out, lse = reference.block_window_reference(q, k, v, case.pattern, sm_scale=0.7, return_lse=True)
    for b, h, i in [(0, 0, 0), (0, 1, 4), (1, 2, 7), (1, 3, 10)]:
        keys = [j for j in range(case.n) if case.pattern.visible(i, j, case.n)]
        expected, expected_lse = one_query(q[b, h, i], k[b, h // 2], v[b, h // 2], keys, 0.7)
        torch.testing.assert_close(out[b, h, i].tolist(), expected)
        torch.testing.assert_close(lse[b, h, i].item(), expected_lse)


def test_explicit_block_ends_equal_the_grid() -> None:
    case = SMALL[3]
    q, k, v = qkv(case, torch.float64)
    ends = case.pattern.block_ends(case.n)
    grid = BlockWindow(case.pattern.block_size, case.pattern.window, case.pattern.sink)
    a = reference.block_window_reference(q, k, v, case.pattern)
    b = reference.block_window_reference(q, k, v, grid, block_ends=ends)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(ValueError, match="block_ends: expected increasing"):
        reference.block_window_reference(q, k, v, grid, block_ends=[5, 5, 31])


def test_a_suffix_with_history_equals_the_whole() -> None:
    p = BlockWindow(4, 10, 3)
    q, k, v = qkv(Case(p, 26), torch.float64)
    whole = reference.block_window_reference(q, k, v, p)
    part = reference.block_window_reference(q[:, :, 12:], k, v, p, history=12)
    torch.testing.assert_close(part, whole[:, :, 12:])


def test_steps_through_the_ring_equal_the_whole_sequence() -> None:
    p = BlockWindow(4, 10, 3, 2)
    case = Case(p, 38)
    q, k, v = qkv(case, torch.float64)
    whole, whole_lse = reference.block_window_reference(q, k, v, p, return_lse=True)
    rings = [torch.full((2, 2, 13, 16), float("nan"), dtype=torch.float64) for _ in range(2)]
    for start, end in p.blocks(case.n):
        rows = slice(start, end)
        position = torch.tensor([start, start])
        one = BlockWindow(p.block_size, p.window, p.sink)
        ahead = reference.prefill_reference(q[:, :, rows], k[:, :, rows], v[:, :, rows], one, *rings, position)
        reference.ring_write_reference(*rings, k[:, :, rows], v[:, :, rows], position, sink=3)
        valid = torch.tensor([min(end, 13)] * 2)
        out, lse = reference.decode_reference(q[:, :, rows], *rings, valid, return_lse=True)
        torch.testing.assert_close(out, whole[:, :, rows])
        torch.testing.assert_close(lse, whole_lse[:, :, rows])
        torch.testing.assert_close(ahead, whole[:, :, rows])


def test_prefill_reads_only_what_the_ring_retains() -> None:
    rows = ring_case(SMALL[2], torch.float64, seed=3)
    out = reference.prefill_reference(*rows[:3], SMALL[2].pattern, *rows[3:6], lanes=rows.lanes)
    assert torch.isfinite(out).all()


def test_ring_layout_keeps_sinks_and_the_last_window() -> None:
    assert ring_layout_dict(9, 6, 2) == {0: 0, 1: 1, 5: 5, 6: 2, 7: 3, 8: 4}
    assert ring_layout_dict(0, 6, 2) == {}


def ring_layout_dict(position: int, capacity: int, sink: int) -> dict[int, int]:
    return dict(zip(*reference.ring_layout(position, capacity, sink), strict=True))
