"""Prefills on a GPU whose work items are cut along the keys, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from forward_calls import call, equal_rows, items_of, ring_of
from kernel_cases import Case, qkv
from tolerance import assert_close, assert_lse_close

from swba_kernels import BlockWindow, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="kernels for Hopper"
    ),
]

PATTERNS = {0: (BlockWindow(150, 450), 70), 40: (BlockWindow(333, 999, 40), 0), 200: (BlockWindow(64, 640, 200), 33)}
PATTERNS |= {300: (BlockWindow(64, 128, 300), 0)}  # whose own sinks come in more than one tile


def cuts(items: int) -> list:
    from swba_kernels.hopper.forward_cut import Cut

    some = max(items - 3, 1)
    return [Cut(0, items, 2), Cut(some, items - some, 3), Cut(items // 2, items - items // 2, 7), Cut(0, items, 20)]


@pytest.fixture
def poison(monkeypatch) -> None:
    """Let new tensors hold NaN, among them the workspace of partial results."""

    def poisoned(*sizes, **options):
        x = torch.zeros(*sizes, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, float("nan")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sink", PATTERNS)
def test_every_cut_at_every_stage_of_a_ring(sink, head_dim, dtype, poison) -> None:
    """Lanes of any length, so that some parts have no keys, and some are of one segment."""
    from swba_kernels.portable.forward import Ring

    pattern, spare = PATTERNS[sink]
    total = pattern.sink + pattern.window + spare
    stages = [0, 1, sink, sink + 1, 149, total - 1, total, total + 1, total + 230, 3 * total + 17]
    rings = ring_of(pattern, stages, 2, head_dim, dtype, spare)
    lanes = torch.tensor([3, 9, 0, 7, 1, 8, 4, 2, 6, 5], device="cuda")
    position = torch.tensor(stages, device="cuda")[lanes]
    for n in (40, 150, 700):
        q, k, v = qkv(Case(pattern, n, 4, 2, head_dim, batch=len(stages)), dtype, "cuda")
        double = [x.double() for x in (q, k, v)]
        oracle, oracle_lse = reference.prefill_reference(
            *double, pattern, *rings.double(), position, lanes=lanes, return_lse=True
        )
        eager = reference.prefill_reference(q, k, v, pattern, *rings, position, lanes=lanes)
        for cut in cuts(items_of(n, pattern, head_dim, 4)):
            out, lse = call(q, k, v, pattern, ring=Ring(*rings, position, lanes), cut=cut)
            assert_close(out, oracle, eager, f"{n} tokens by {cut}")
            assert_lse_close(lse, oracle_lse)
            again = call(q, k, v, pattern, ring=Ring(*rings, position, lanes), cut=cut)
            equal_rows((out, lse), again, slice(None))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_parts_than_are_added_up_at_once_and_than_there_are_multiprocessors(head_dim) -> None:
    from swba_kernels.hopper.forward_cut import Cut
    from swba_kernels.portable.forward import Ring

    pattern = BlockWindow(333, 2997)
    rings = ring_of(pattern, [5000], 8, head_dim, torch.bfloat16, 0)
    q, k, v = qkv(Case(pattern, 333, 8, 8, head_dim, batch=1), torch.bfloat16, "cuda")
    position, items = torch.tensor([5000], device="cuda"), items_of(333, pattern, head_dim, 8)
    double = [x.double() for x in (q, k, v)]
    oracle, oracle_lse = reference.prefill_reference(*double, pattern, *rings.double(), position, return_lse=True)
    eager = reference.prefill_reference(q, k, v, pattern, *rings, position)
    for parts in (8, 9, 24, 32):
        out, lse = call(q, k, v, pattern, ring=Ring(*rings, position), cut=Cut(0, items, parts))
        assert_close(out, oracle, eager, f"{parts} parts")
        assert_lse_close(lse, oracle_lse)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_row_keeps_its_bits_whatever_the_others_are(head_dim) -> None:
    """By the chosen cut, which knows the ring's lanes and not the rows of the call."""
    from swba_kernels.hopper.forward import choose_config, cut_of_call
    from swba_kernels.portable.forward import Ring

    pattern = BlockWindow(333, 2997)
    config, _ = choose_config(head_dim, 333, 2997, True, False)
    assert cut_of_call(items_of(333, pattern, head_dim, 8), 2, 2997, config, head_dim, 132) is not None
    rings = ring_of(pattern, [5000, 700], 8, head_dim, torch.bfloat16, 0)
    q, k, v = qkv(Case(pattern, 333, 8, 8, head_dim, batch=2), torch.bfloat16, "cuda")
    lanes, position = torch.tensor([1, 0], device="cuda"), torch.tensor([700, 5000], device="cuda")
    together = call(q, k, v, pattern, ring=Ring(*rings, position, lanes))
    for b in range(2):
        row = slice(b, b + 1)
        alone = call(q[row], k[row], v[row], pattern, ring=Ring(*rings, position[row], lanes[row]))
        equal_rows(alone, [x[row] for x in together], slice(None))


def test_a_tensor_of_any_layout_gets_what_was_cut() -> None:
    """Heads that lie apart, rows that do, and a block that ends within a tile: other rows are not touched."""
    from swba_kernels.portable.forward import Ring

    pattern, n = BlockWindow(100, 300, 20), 333
    rings = ring_of(pattern, [1000], 2, 128, torch.bfloat16, 0)
    position = torch.tensor([1000], device="cuda")
    q, k, v = qkv(Case(pattern, n, 4, 2, 128, batch=1), torch.bfloat16, "cuda")
    expected = call(q, k, v, pattern, ring=Ring(*rings, position))
    apart = torch.zeros(1, n, 4, 256, device="cuda", dtype=torch.bfloat16)[..., 64:192].transpose(1, 2)
    apart.copy_(q)
    for cut in cuts(items_of(n, pattern, 128, 4)):
        out, lse = call(apart, k, v, pattern, ring=Ring(*rings, position), cut=cut)
        assert out.stride() == torch.empty_like(apart).stride()
        assert_close(out, expected[0].double(), expected[0])
        assert_lse_close(lse, expected[1].double())


def test_a_graph_follows_the_rings_position_through_every_stage() -> None:
    from swba_kernels.hopper.forward_cut import Cut
    from swba_kernels.portable.forward import Ring

    pattern = BlockWindow(150, 450, 40)
    stages = [0, 200, 490, 1000]
    rings = ring_of(pattern, stages, 2, 128, torch.bfloat16, 0)
    q, k, v = qkv(Case(pattern, 300, 4, 2, 128, batch=1), torch.bfloat16, "cuda")
    position, lanes = torch.tensor([0], device="cuda"), torch.tensor([0], device="cuda")
    items = items_of(300, pattern, 128, 4)
    for cut in (Cut(items, 0, 1), *cuts(items)):
        call(q, k, v, pattern, ring=Ring(*rings, position, lanes), cut=cut)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(q, k, v, pattern, ring=Ring(*rings, position, lanes), cut=cut)
        for lane in (3, 0, 2, 1):
            position.fill_(stages[lane])
            lanes.fill_(lane)
            graph.replay()
            equal_rows(captured, call(q, k, v, pattern, ring=Ring(*rings, position, lanes), cut=cut), slice(None))
