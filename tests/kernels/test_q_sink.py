"""A second query for the sinks' columns, in every entry point, on a CPU."""

from __future__ import annotations

import math
import random

import pytest
import torch
from kernel_cases import (
    SINKS,
    Case,
    check_backward,
    check_decode,
    check_forward,
    check_prefill,
    decode_case,
    qkv,
    ring_case,
    second_query,
)

import swba_kernels
from swba_kernels import BlockWindow, reference, sdpa

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SEEDS = range(3)
INSIDE = Case(BlockWindow(6, 40, 25, 4), 44, heads=4, kv_heads=2, head_dim=8)  # sinks that stay in the window for long
CASES = [*SINKS, INSIDE]


def test_reference_equals_plain_python() -> None:
    case = Case(BlockWindow(3, 5, 4, 1), 11, heads=4, kv_heads=2, head_dim=8)
    q, k, v = qkv(case, torch.float64)
    q_sink = second_query(q, 4)
    assert q_sink is not None
    out, lse = reference.block_window_reference(q, k, v, case.pattern, q_sink=q_sink, sm_scale=0.7, return_lse=True)
    for b, h, i in [(0, 0, 0), (0, 1, 4), (1, 2, 7), (1, 3, 10)]:
        keys = [j for j in range(case.n) if case.pattern.visible(i, j, case.n)]
        pairs = [((q_sink if j < 4 else q)[b, h, i], k[b, h // 2, j], v[b, h // 2, j]) for j in keys]
        scores = [0.7 * math.fsum(a * c for a, c in zip(x.tolist(), y.tolist(), strict=True)) for x, y, _ in pairs]
        top = max(scores)
        weights = [math.exp(s - top) for s in scores]
        total = math.fsum(weights)
        expected = sum(w * z for w, (_, _, z) in zip(weights, pairs, strict=True)) / total
        torch.testing.assert_close(out[b, h, i], expected)
        torch.testing.assert_close(lse[b, h, i].item(), top + math.log(total))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_equal_the_reference(case, dtype) -> None:
    check_forward(case, dtype, "sdpa", bounded=True)
    check_backward(case, dtype, "sdpa", bounded=True)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_prefill_equals_the_reference(case, seed, masked, monkeypatch) -> None:
    if masked:
        monkeypatch.setattr(sdpa, "_prefill_exact", sdpa._prefill_masked)
    check_prefill(case, torch.float32, "sdpa", seed=seed, spare=seed, bounded=True)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_decode_equals_the_reference(case, seed, masked) -> None:
    def exact(q, k_ring, v_ring, valid, lanes, **options):
        return swba_kernels.window_decode_attention(
            q, k_ring, v_ring, valid, lanes=lanes, return_lse=True, impl="sdpa", **options
        )

    def seen(q, k_ring, v_ring, valid, lanes, q_sink, sink):
        visible = torch.arange(k_ring.shape[2]) < valid[:, None]
        return sdpa._attend_seen(
            q, k_ring[lanes], v_ring[lanes], visible, q.shape[-1] ** -0.5, True, q_sink, sink
        )  # fmt: skip

    check_decode(case, torch.float32, seen if masked else exact, seed=seed, bounded=True)


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    block = rng.randrange(1, 9)
    pattern = BlockWindow(block, block + rng.randrange(20), rng.randrange(1, 30), rng.randrange(block + 1))
    kv_heads = rng.choice([1, 2])
    return Case(pattern, rng.randrange(1, 70), heads=kv_heads * rng.choice([1, 3]), kv_heads=kv_heads, head_dim=8)


@pytest.mark.parametrize("seed", range(40))
def test_steps_and_prefills_through_a_ring_equal_the_whole_sequence(seed) -> None:
    case = random_case(seed)
    p = case.pattern
    q, k, v = qkv(case, torch.float64, seed=seed)
    q_sink = second_query(q, p.sink, seed)
    assert q_sink is not None
    whole = reference.block_window_reference(q, k, v, p, q_sink=q_sink)
    torch.testing.assert_close(swba_kernels.block_window_attention(q, k, v, p, q_sink=q_sink), whole)
    shape = (case.batch, case.kv_heads, p.sink + p.window, case.head_dim)
    rings = [torch.full(shape, float("nan"), dtype=torch.float64) for _ in range(2)]
    grid = BlockWindow(p.block_size, p.window, p.sink)
    for start, end in p.blocks(case.n):
        rows = slice(start, end)
        one, of_sinks = q[:, :, rows], q_sink[:, :, rows]
        position = torch.full((case.batch,), start)
        ahead = swba_kernels.prefill_attention(
            one, k[:, :, rows], v[:, :, rows], grid, *rings, position, q_sink=of_sinks
        )
        swba_kernels.ring_write(*rings, k[:, :, rows], v[:, :, rows], position, sink=p.sink)
        valid = torch.full((case.batch,), min(end, p.sink + p.window))
        step = swba_kernels.window_decode_attention(one, *rings, valid, q_sink=of_sinks, sink=p.sink)
        torch.testing.assert_close(ahead, whole[:, :, rows])
        torch.testing.assert_close(step, whole[:, :, rows])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_second_query_that_equals_the_first_changes_nothing(case) -> None:
    q, k, v = qkv(case, torch.float64)
    plain = swba_kernels.block_window_attention(q, k, v, case.pattern, return_lse=True)
    twice = swba_kernels.block_window_attention(q, k, v, case.pattern, q_sink=q.clone(), return_lse=True)
    torch.testing.assert_close(twice, plain)


def test_gradcheck_of_all_four_gradients_in_float64() -> None:
    case = SINKS[1]._replace(n=9, head_dim=8, batch=1)
    q, k, v = qkv(case, torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, second_query(q, case.pattern.sink)) if x is not None]
    for attend in (swba_kernels.block_window_attention, reference.block_window_reference):

        def call(q, k, v, q_sink, attend=attend):
            return attend(q, k, v, case.pattern, q_sink=q_sink)

        assert torch.autograd.gradcheck(call, inputs)


def test_gradients_have_the_layouts_of_their_inputs_and_flow_through_a_compiled_graph() -> None:
    case = SINKS[1]
    q, k, v = (x.requires_grad_() for x in qkv(case, torch.float32))
    q_sink = torch.randn(q.shape).mT.contiguous().mT.requires_grad_()

    def call(*inputs):
        return swba_kernels.block_window_attention(*inputs[:3], case.pattern, q_sink=inputs[3] * 2)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = function(q, k, v, q_sink)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, q_sink))))
    torch.testing.assert_close(*results)
    assert [x.stride() for x in results[0][1:4]] == [x.stride() for x in (q, k, v)]
    assert results[0][4].abs().sum() > 0


def test_a_step_with_a_second_query_compiles_without_a_graph_break() -> None:
    q, k_ring, v_ring, valid, lanes = decode_case(SINKS[1], torch.float32)
    rings = [x.nan_to_num(0.5) for x in (k_ring, v_ring)]

    def step(q, sink):
        return swba_kernels.window_decode_attention(q, *rings, valid, q_sink=-q, sink=sink, lanes=lanes)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for sink in (4, 3, 1):
        assert torch.equal(compiled(q, sink), step(q, sink))


def test_the_first_sinks_alone_are_read_by_the_second_query() -> None:
    case = INSIDE
    q, k, v = qkv(case, torch.float32)
    q_sink = torch.zeros_like(q).requires_grad_()
    swba_kernels.block_window_attention(q, k, v, case.pattern, q_sink=q_sink).sum().backward()
    first = k.clone()
    first[:, :, : case.pattern.sink] = 0
    alone = torch.zeros_like(q).requires_grad_()
    swba_kernels.block_window_attention(q, first, v, case.pattern, q_sink=alone).sum().backward()
    assert q_sink.grad is not None
    assert alone.grad is not None
    assert q_sink.grad.abs().sum() > 0
    assert alone.grad.abs().sum() == 0


def rejects(call, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        call()


def test_bad_second_queries_are_rejected_by_name() -> None:
    case = SINKS[0]
    q, k, v = qkv(case, torch.float32)
    rows = ring_case(case, torch.float32)
    attend, prefill = swba_kernels.block_window_attention, swba_kernels.prefill_attention
    for bad, error, message in (
        ([1.0], TypeError, "q_sink: expected a tensor, got list"),
        (q[:1], ValueError, "q_sink: expected the shape of q"),
        (q.half(), ValueError, r"q_sink: expected the dtype of q \(torch.float32\), got torch.float16"),
    ):
        rejects(lambda bad=bad: attend(q, k, v, case.pattern, q_sink=bad), message, error)
        rejects(lambda bad=bad: prefill(*rows[:3], case.pattern, *rows[3:6], q_sink=bad), message, error)
    none = BlockWindow(4, 8)
    rejects(lambda: attend(q, k, v, none, q_sink=q), "q_sink: expected None where pattern.sink is 0, got a tensor")
    rejects(lambda: attend(q, k, v, case.pattern, q_sink=q.double().to("meta")), "q_sink: expected a tensor on cpu")


def test_decode_takes_sinks_exactly_with_a_second_query() -> None:
    q, k_ring, v_ring, valid, lanes = decode_case(SINKS[0], torch.float32)

    def decode(**options):
        return swba_kernels.window_decode_attention(q, k_ring, v_ring, valid, lanes=lanes, **options)

    rejects(lambda: decode(q_sink=q), "q_sink: expected None where sink is 0, got a tensor")
    rejects(lambda: decode(sink=3), "sink: expected 0 without q_sink, got 3")
    rejects(lambda: decode(q_sink=q, sink=13), r"sink: expected from 1 to 12 \(the slots of the ring\), got 13")
    rejects(lambda: decode(q_sink=q, sink=2.0), "sink: expected an int, got float", TypeError)
    rejects(lambda: decode(q_sink=q[:, :1], sink=2), "q_sink: expected the shape of q")
