from __future__ import annotations

import logging
import math
from contextlib import nullcontext

import pytest
import torch

import swba_kernels
from swba_kernels import BlockWindow, choice, choose_impl, prefers_torch_decode, sdpa

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
    rejects(lambda: decode(X, RING, RING, ROWS, full=1), "full: expected a bool", TypeError)
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


H200 = ("NVIDIA H200", 132, 91900)
WAN = {"rows": 1, "heads": 12, "tokens": 4680, "slots": 32760, "head_dim": 128}


def stub_gpu(monkeypatch, gpu=H200, name="triton") -> None:
    """Pretend that "auto" runs `name` on `gpu`."""
    monkeypatch.setattr(choice, "_gpu", lambda index: gpu)
    monkeypatch.setattr(choice, "_resolve", lambda impl, *_: name if impl == "auto" else impl)


def prefers(dtype=torch.bfloat16, impl="auto", **sizes) -> bool:
    return prefers_torch_decode(torch.device("cuda:0"), dtype, **{**WAN, **sizes}, impl=impl)


@pytest.mark.parametrize(
    ("expected", "rows", "heads", "head_dim", "tokens", "slots"),
    [
        (True, 1, 12, 128, 4680, 32760),
        (True, 1, 40, 128, 4680, 32760),
        (True, 8, 16, 64, 256, 4096),
        (False, 1, 12, 128, 1560, 32760),
        (False, 1, 12, 64, 256, 4096),
        (False, 1, 16, 64, 64, 2048),
        (False, 1, 16, 64, 144, 4608),
        (False, 1, 6, 64, 48, 768),
    ],
)
def test_torch_decodes_what_it_was_measured_to_be_faster_at(
    expected, rows, heads, head_dim, tokens, slots, monkeypatch
) -> None:
    stub_gpu(monkeypatch)
    sizes = {"rows": rows, "heads": heads, "head_dim": head_dim, "tokens": tokens, "slots": slots}
    assert prefers(**sizes) is expected
    assert prefers(dtype=torch.float16, **sizes) is expected


def test_torch_decodes_nothing_that_was_not_measured(monkeypatch) -> None:
    stub_gpu(monkeypatch)
    assert prefers()
    assert not prefers(dtype=torch.float32)
    assert not prefers(impl="triton")
    assert not prefers(impl="sdpa")
    assert not prefers(head_dim=96)
    assert not prefers(slots=4680)
    for gpu in (("NVIDIA H100", 132, 91900), ("NVIDIA GH200 144G HBM3e", 132, 91900), ("NVIDIA H200", 132, 0)):
        stub_gpu(monkeypatch, gpu)
        assert not prefers()
    stub_gpu(monkeypatch, name="sdpa")
    assert not prefers()


@pytest.fixture
def cudnn_calls(monkeypatch) -> list[sdpa.SDPBackend]:
    """Let every full ring of head dim 16 be decoded by "cuDNN", played by a CPU; return which backends were forced."""
    forced: list[sdpa.SDPBackend] = []
    monkeypatch.setattr(choice, "_gpu", lambda index: ("stub", 1, 10**6))
    monkeypatch.setattr(choice, "_TORCH_DECODE", (choice.TorchDecode("stub", 16, 2, 10),))
    resolve = choice._resolve
    monkeypatch.setattr(choice, "_resolve", lambda impl, *a: "triton" if impl == "auto" else resolve(impl, *a))
    monkeypatch.setattr(sdpa, "sdpa_kernel", lambda backend: forced.append(backend) or nullcontext())
    return forced


def test_a_full_ring_is_decoded_by_cudnn_where_the_table_says_so(cudnn_calls) -> None:
    q, ring, valid = torch.randn(2, 2, 6, 16).half(), RING.half(), torch.tensor([10, 10])
    decode = swba_kernels.window_decode_attention
    out = decode(q, ring, -ring, valid, full=True)
    assert cudnn_calls == [sdpa.SDPBackend.CUDNN_ATTENTION]
    assert out.stride() == q.stride()
    assert torch.equal(out, decode(q, ring, -ring, valid, impl="sdpa"))
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(decode(turned, ring, -ring, valid, full=True), out)
    assert len(cudnn_calls) == 2


@pytest.mark.parametrize("change", ["not full", "lse", "lanes", "grouped heads", "float32", "few tiles", "by name"])
def test_cudnn_decodes_nothing_else(change, cudnn_calls, monkeypatch) -> None:
    impls = []
    monkeypatch.setattr(torch.ops.swba, "decode", lambda *a: impls.append(a[-2]) or (a[0], a[0]))
    q, options = torch.randn(2, 2, 6, 16).half(), {"full": True}
    if change == "not full":
        options = {}
    elif change == "lse":
        options["return_lse"] = True
    elif change == "lanes":
        options["lanes"] = torch.tensor([2, 0])
    elif change == "grouped heads":
        q = torch.randn(2, 4, 6, 16).half()
    elif change == "few tiles":
        q = q[:1, :1]
    elif change == "by name":
        options["impl"] = "sdpa"
    ring = RING[:, : min(2, q.shape[1])].to(torch.float32 if change == "float32" else torch.float16)
    q = q.to(ring.dtype)
    swba_kernels.window_decode_attention(q, ring, ring, torch.full((q.shape[0],), 10), **options)
    assert impls == ["sdpa" if change == "by name" else "triton"]
    assert not cudnn_calls


def test_a_compiled_decode_of_a_full_ring_is_one_graph(cudnn_calls) -> None:
    for name in ("_gpu", "_resolve"):
        getattr(choice, name)._dynamo_marked_constant = True
    torch._dynamo.reset()
    call = torch.compile(swba_kernels.window_decode_attention, fullgraph=True, backend="aot_eager")
    for tokens in (6, 5, 4):
        q, ring, valid = torch.randn(2, 2, tokens, 16).half(), RING.half(), torch.tensor([10, 10])
        expected = swba_kernels.window_decode_attention(q, ring, ring, valid, full=True)
        assert torch.equal(call(q, ring, ring, valid, full=True), expected)
    assert len(cudnn_calls) == 6
