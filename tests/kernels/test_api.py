from __future__ import annotations

import logging
import math

import pytest
import torch

import swba_kernels
from swba_kernels import BlockWindow, choice, choose_impl

PATTERN = BlockWindow(4, 8, 2)
X = torch.randn(2, 4, 6, 16)
KV = torch.randn(2, 2, 6, 16)
RING = torch.randn(3, 2, 10, 16)
ROWS = torch.tensor([3, 5])


def rejects(call, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=message):
        call()


BAD_TENSORS = [
    ([[1.0]], TypeError, "expected a tensor, got list"),
    (X[0], ValueError, r"expected 4 dimensions \[B, H, N, D\], got shape \(4, 6, 16\)"),
    (X.int(), ValueError, "expected float16, bfloat16, float32 or float64, got torch.int32"),
    (X.to("meta"), ValueError, "expected a tensor on cpu or cuda, got meta"),
    (X[:, :, :0], ValueError, "expected at least one row, head and token"),
    (X[..., :12], ValueError, "expected a head dim that is a multiple of 8 up to 256, got 12"),
    (torch.randn(1, 1, 2, 264), ValueError, "expected a head dim that is a multiple of 8 up to 256, got 264"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD_TENSORS)
def test_every_entry_rejects_bad_tensors_by_name(bad, error, message) -> None:
    attend = swba_kernels.block_window_attention
    rejects(lambda: attend(bad, KV, KV, PATTERN), "q: " + message, error)
    rejects(lambda: attend(X, bad, KV, PATTERN), "k: " + message, error)
    rejects(lambda: attend(X, KV, bad, PATTERN), "v: " + message, error)
    rejects(lambda: swba_kernels.window_decode_attention(bad, RING, RING, ROWS), "q: " + message, error)
    rejects(lambda: swba_kernels.window_decode_attention(X, bad, RING, ROWS), "k_ring: " + message, error)
    rejects(lambda: swba_kernels.window_decode_attention(X, RING, bad, ROWS), "v_ring: " + message, error)
    rejects(lambda: swba_kernels.ring_write(RING, RING, bad, KV, ROWS), "k: " + message, error)
    rejects(lambda: swba_kernels.prefill_attention(X, KV, KV, PATTERN, bad, RING, ROWS), "k_ring: " + message, error)


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        (KV.half(), KV, r"k: expected the dtype of q \(torch.float32\), got torch.float16"),
        (KV, KV.half(), r"v: expected the dtype of k \(torch.float32\), got torch.float16"),
        (KV[..., :8], KV, r"k: expected the head dim of q \(16\), got 8"),
        (torch.randn(2, 3, 6, 16), KV, "k: expected heads that divide the 4 heads of q, got 3"),
        (KV[:, :, :5], KV, "k: expected 2 rows of 6 tokens as in q, got 2 of 5"),
        (KV[:1], KV, "k: expected 2 rows of 6 tokens as in q, got 1 of 6"),
        (KV, KV[:, :1], r"v: expected the shape of k \(2, 2, 6, 16\), got \(2, 1, 6, 16\)"),
    ],
)
def test_keys_and_values_must_fit_the_queries(k, v, message) -> None:
    rejects(lambda: swba_kernels.block_window_attention(X, k, v, PATTERN), message)


def test_arguments_that_are_not_tensors() -> None:
    attend = swba_kernels.block_window_attention
    rejects(lambda: attend(X, KV, KV, (4, 8)), "pattern: expected a BlockWindow, got tuple", TypeError)
    rejects(lambda: attend(X, KV, KV, PATTERN, sm_scale="1"), "sm_scale: expected a float, got str", TypeError)
    rejects(lambda: attend(X, KV, KV, PATTERN, sm_scale=math.nan), "sm_scale: expected a finite number, got nan")
    rejects(lambda: attend(X, KV, KV, PATTERN, impl="fast"), "impl: expected one of 'auto', 'hopper', .* got 'fast'")
    rejects(lambda: attend(X, KV, KV, PATTERN, deterministic=1), "deterministic: expected a bool, got int", TypeError)


@pytest.mark.parametrize(
    ("valid", "error", "message"),
    [
        (3, TypeError, "valid: expected an int64 tensor, got int"),
        (ROWS.int(), ValueError, "valid: expected int64, got torch.int32"),
        (ROWS[:1], ValueError, r"valid: expected shape \(2,\), one number a row, got \(1,\)"),
        (ROWS[None], ValueError, r"valid: expected shape \(2,\)"),
        (ROWS.to("meta"), ValueError, "valid: expected a tensor on cpu, got meta"),
        (torch.tensor([1, 11]), ValueError, "valid: expected lengths from 1 to 10"),
        (torch.tensor([0, 1]), ValueError, "valid: expected lengths from 1 to 10"),
    ],
)
def test_bad_lengths(valid, error, message) -> None:
    rejects(lambda: swba_kernels.window_decode_attention(X, RING, RING, valid), message, error)


def test_rings_must_fit() -> None:
    decode, write, prefill = (
        swba_kernels.window_decode_attention,
        swba_kernels.ring_write,
        swba_kernels.prefill_attention,
    )
    rejects(lambda: decode(X, RING[:, :, :5], RING[:, :, :5], ROWS), "q: expected at most 5 tokens .* got 6")
    rejects(lambda: decode(X, RING[:1], RING[:1], ROWS), r"k_ring: expected at least 2 lanes \(lanes=None\), got 1")
    rejects(lambda: decode(X, RING, RING, ROWS, lanes=ROWS.int()), "lanes: expected int64")
    rejects(lambda: decode(X, RING, RING, ROWS, lanes=torch.tensor([0, 3])), "lanes: expected lanes from 0 to 2")
    turned = RING.mT.contiguous().mT
    rejects(lambda: decode(X, turned, turned, ROWS), r"k_ring, v_ring: expected adjacent elements")
    rejects(lambda: write(RING[:, :1], RING[:, :1], KV, KV, ROWS), "k_ring: expected the 2 heads of k, got 1")
    rejects(lambda: write(RING, RING, KV, KV, ROWS, sink=10), "sink: expected 0 <= sink < 10")
    rejects(lambda: write(RING, RING, KV, KV, ROWS, sink=1.0), "sink: expected an int, got float", TypeError)
    rejects(lambda: write(RING, RING, KV, KV, torch.tensor([0, -1])), "position: expected at least 0")
    grad = RING.clone().requires_grad_()
    rejects(lambda: write(grad, RING, KV, KV, ROWS), "expected tensors that do not require grad")
    small = RING[:, :, :9]
    rejects(lambda: prefill(X, KV, KV, PATTERN, small, small, ROWS), r"k_ring: expected at least sink \+ window = 10")


def test_a_rejected_write_leaves_the_ring_alone() -> None:
    k_ring, v_ring = RING.clone(), RING.clone()
    rejects(lambda: swba_kernels.ring_write(k_ring, v_ring, KV, KV, ROWS, lanes=torch.tensor([0, 7])), "lanes")
    assert torch.equal(k_ring, RING)
    assert torch.equal(v_ring, RING)


def test_writing_keys_that_require_grad_detaches_them() -> None:
    k_ring, v_ring = RING.clone(), RING.clone()
    swba_kernels.ring_write(k_ring, v_ring, KV.clone().requires_grad_(), KV, ROWS)
    assert not k_ring.requires_grad


def test_triton_by_name_raises_on_a_cpu(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rejects(lambda: swba_kernels.block_window_attention(X, KV, KV, PATTERN, impl="triton"), "got 'triton': ")


def test_auto_logs_each_decision_once(caplog) -> None:
    choice._choose.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="swba_kernels"):
        assert choose_impl("cpu", torch.float32, 64, "decode") == ("sdpa", "tensors on a CPU")
        choose_impl(torch.device("cpu"), torch.float32, 64, "decode")
    assert len(caplog.records) == 1
    rejects(lambda: choose_impl("cpu", torch.float32, 64, "dance"), "op: expected one of forward")
    rejects(lambda: choose_impl("cpu", torch.float32, 20, "decode"), "head_dim: expected a multiple of 8 up to 256")


@pytest.mark.parametrize(
    ("capability", "dtype", "installed", "expected"),
    [
        ((9, 0), torch.float32, True, "triton"),
        ((8, 0), torch.float32, True, "triton"),
        ((7, 5), torch.float16, True, "sdpa"),
        ((9, 0), torch.float64, True, "sdpa"),
        ((9, 0), torch.bfloat16, False, "sdpa"),
    ],
)
def test_auto_chooses_by_capability_dtype_and_triton(capability, dtype, installed, expected, monkeypatch) -> None:
    choice._choose.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "some GPU")
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: object() if installed else None)
    name, reason = choose_impl("cuda:0", dtype, 128, "forward")
    choice._choose.cache_clear()
    assert name == expected
    assert reason
