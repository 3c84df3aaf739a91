from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    SMALL,
    check_backward,
    check_decode,
    check_forward,
    check_prefill,
    check_ring_write,
    decode_case,
    qkv,
    ring_case,
)

import swba_kernels
from swba_kernels import BlockWindow, reference, sdpa

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SEEDS = range(3)


def seen_decode(q, k_ring, v_ring, valid, lanes):
    """The GPU form of decode, which reads nothing on the host."""
    seen = torch.arange(k_ring.shape[2]) < valid[:, None]
    return sdpa._attend_seen(q, k_ring[lanes], v_ring[lanes], seen, q.shape[-1] ** -0.5, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_forward_equals_the_reference(case, dtype) -> None:
    check_forward(case, dtype, "sdpa")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradients_equal_the_reference(case, dtype) -> None:
    check_backward(case, dtype, "sdpa")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_prefill_equals_the_reference(case, seed) -> None:
    check_prefill(case, torch.float32, "sdpa", seed=seed, spare=seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_prefill_without_host_reads_equals_the_reference(case, seed, monkeypatch) -> None:
    monkeypatch.setattr(sdpa, "_prefill_exact", sdpa._prefill_masked)
    check_prefill(case, torch.float32, "sdpa", seed=seed, spare=seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_decode_equals_the_reference(case, seed, masked) -> None:
    def exact(q, k_ring, v_ring, valid, lanes):
        return swba_kernels.window_decode_attention(q, k_ring, v_ring, valid, lanes=lanes, return_lse=True, impl="sdpa")

    check_decode(case, torch.float32, seen_decode if masked else exact, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_of_equal_lengths_takes_one_call(dtype, monkeypatch) -> None:
    q, k, v = qkv(SMALL[3], dtype)
    valid = torch.tensor([17, 17])
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", lambda *a, **b: calls.append(1) or real(*a, **b))
    out = swba_kernels.window_decode_attention(q, k, v, valid)
    assert len(calls) == 1
    assert out.stride() == q.stride()
    oracle = reference.decode_reference(q.double(), k.double(), v.double(), valid)
    torch.testing.assert_close(out.double(), oracle, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("scatter", [False, True])
def test_ring_write_equals_writing_token_by_token(case, seed, scatter) -> None:
    def write(k_ring, v_ring, k, v, position, lanes, sink):
        if scatter:
            sdpa._ring_write_scatter(k_ring, v_ring, k, v, position, lanes, sink)
        else:
            swba_kernels.ring_write(k_ring, v_ring, k, v, position, sink=sink, lanes=lanes)

    check_ring_write(case, torch.float32, write, seed=seed)


@pytest.mark.parametrize(("n", "capacity", "sink"), [(3, 10, 0), (10, 7, 2), (30, 9, 5), (4, 9, 8)])
def test_no_slot_is_written_by_two_tokens(n, capacity, sink) -> None:
    position = torch.tensor([0, 1, sink, 23])
    index, slot = sdpa._scatter_slots(position, n, capacity, sink)
    for tokens, slots in zip(index.tolist(), slot.tolist(), strict=True):
        assert len(set(slots)) == len(set(tokens)) == len(set(zip(tokens, slots, strict=True)))


def test_hidden_nan_never_reaches_a_result() -> None:
    p = BlockWindow(4, 8, 2)
    q, k, v = (x.clone() for x in qkv(SMALL[1]._replace(pattern=p), torch.float32))
    clean = swba_kernels.block_window_attention(q, k, v, p)
    k[:, :, 3], v[:, :, 3] = float("nan"), float("nan")
    poisoned = swba_kernels.block_window_attention(q, k, v, p)
    hidden = ~p.mask(q.shape[2])[:, 3]
    assert hidden.any()
    assert torch.equal(poisoned[:, :, hidden], clean[:, :, hidden])


def test_gradcheck_in_float64() -> None:
    case = SMALL[3]._replace(n=9, head_dim=8, batch=1)
    inputs = [x.requires_grad_() for x in qkv(case, torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: swba_kernels.block_window_attention(*a, case.pattern), inputs)


def test_values_that_the_host_can_see_are_checked() -> None:
    q, k_ring, v_ring, _, lanes = decode_case(SMALL[1], torch.float32)
    bad = torch.tensor([1, k_ring.shape[2] + 1])
    with pytest.raises(ValueError, match="valid: expected lengths from 1 to 12, got"):
        swba_kernels.window_decode_attention(q, k_ring, v_ring, bad, lanes=lanes)
    with pytest.raises(ValueError, match="lanes: expected lanes from 0 to 3, got"):
        swba_kernels.window_decode_attention(q, k_ring, v_ring, torch.tensor([1, 2]), lanes=torch.tensor([0, 4]))
    rows = ring_case(SMALL[1], torch.float32)
    with pytest.raises(ValueError, match="position: expected at least 0"):
        swba_kernels.ring_write(rows.k_ring, rows.v_ring, rows.k, rows.v, torch.tensor([0, -1]), lanes=rows.lanes)
