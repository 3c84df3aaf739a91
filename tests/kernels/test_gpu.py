"""The Triton kernels on a GPU against the float64 reference, in every dtype, and their promises on launches."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    Case,
    check_backward,
    check_decode,
    check_forward,
    check_prefill,
    check_ring_write,
    qkv,
)
from ops_cases import op_samples
from tolerance import assert_close
from torch._dynamo.testing import CompileCounterWithBackend

import swba_kernels
from swba_kernels import BlockWindow, reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ODD = [
    Case(BlockWindow(1, 3), 5, batch=1),
    Case(BlockWindow(1, 40, 3), 131, head_dim=64),
    Case(BlockWindow(7, 9, 3), 200, heads=6, kv_heads=2, head_dim=8),
    Case(BlockWindow(48, 48 * 4), 48 * 9, heads=6, kv_heads=6, head_dim=64),
    Case(BlockWindow(63, 200, 75, 20), 1000, heads=4, kv_heads=1, head_dim=24),
    Case(BlockWindow(144, 144 * 3), 144 * 5, head_dim=40),
    Case(BlockWindow(256, 600, 31), 1111, heads=3, kv_heads=3, head_dim=128),
    Case(BlockWindow(300, 777, 5, 17), 900, head_dim=128, batch=1),
    Case(BlockWindow(100, 250, 500), 777, heads=4, kv_heads=2, head_dim=256, batch=1),
    Case(BlockWindow(500, 500), 130, head_dim=64, batch=3),
    Case(BlockWindow(129, 1290), 1300, heads=2, kv_heads=1, head_dim=64, batch=1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_forward_equals_the_reference(case, dtype) -> None:
    check_forward(case, dtype, "triton", "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_gradients_equal_the_reference(case, dtype) -> None:
    check_backward(case, dtype, "triton", "cuda")


@pytest.mark.parametrize("head_dim", [32, 48, 56, 72, 80, 96, 112, 120, 136, 160, 192, 224, 248])
def test_more_head_dims(head_dim) -> None:
    case = Case(BlockWindow(50, 130, 9, 3), 260, heads=2, kv_heads=1, head_dim=head_dim, batch=1)
    check_forward(case, torch.bfloat16, "triton", "cuda")
    check_backward(case, torch.bfloat16, "triton", "cuda")
    check_decode(case, torch.bfloat16, decode, "cuda")
    check_ring_write(case, torch.bfloat16, write, "cuda")


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_prefill_on_poisoned_rings_equals_the_reference(case, dtype, impl) -> None:
    for seed in range(3):
        check_prefill(case, dtype, impl, "cuda", seed=seed, spare=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [ODD[2], ODD[6]], ids=str)
def test_sdpa_on_a_gpu_equals_the_reference(case, dtype) -> None:
    check_forward(case, dtype, "sdpa", "cuda")
    check_backward(case, dtype, "sdpa", "cuda")
    check_decode(case, dtype, lambda *a: decode(*a, impl="sdpa"), "cuda")
    check_ring_write(case, dtype, lambda *a: write(*a, impl="sdpa"), "cuda")


def decode(q, k_ring, v_ring, valid, lanes, impl="triton"):
    return swba_kernels.window_decode_attention(q, k_ring, v_ring, valid, lanes=lanes, return_lse=True, impl=impl)


def write(k_ring, v_ring, k, v, position, lanes, sink, impl="triton") -> None:
    swba_kernels.ring_write(k_ring, v_ring, k, v, position, sink=sink, lanes=lanes, impl=impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_decode_of_poisoned_rings_equals_the_reference(case, dtype) -> None:
    for seed in range(3):
        check_decode(case, dtype, decode, "cuda", seed=seed)


@pytest.mark.parametrize("splits", [1, 2, 7, 64])
def test_any_number_of_splits(splits) -> None:
    from swba_kernels.portable import decode as kernel

    def call(q, k_ring, v_ring, valid, lanes):
        return kernel.decode(q, k_ring, v_ring, valid, lanes, scale=q.shape[-1] ** -0.5, splits=splits)

    for case in (ODD[5], ODD[6], ODD[10]):
        check_decode(case, torch.bfloat16, call, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_ring_write_equals_writing_token_by_token(case, dtype) -> None:
    check_ring_write(case, dtype, write, "cuda")


def test_nan_of_a_hidden_key_never_reaches_a_result() -> None:
    """Blocks are larger than a query tile here: blocks that share a tile share each other's NaN (0 x NaN)."""
    p = BlockWindow(256, 600, 30)
    q, k, v = (x.clone() for x in qkv(Case(p, 1500, head_dim=64), torch.bfloat16, "cuda"))
    hidden = ~p.mask(1500, "cuda")[:, 50]
    results = []
    for value in (0.0, float("nan")):
        k[:, :, 50], v[:, :, 50] = value, value
        results.append(swba_kernels.block_window_attention(q, k, v, p, impl="triton")[:, :, hidden])
    assert hidden.any()
    assert torch.isfinite(results[0]).all()
    assert torch.equal(*results)


SAMPLES = ["forward", "backward", "prefill", "decode", "ring_write"]


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, impl) -> None:
    checked = 0
    for op, arguments in op_samples(impl, torch.bfloat16, "cuda"):
        if op._name == f"swba::{name}":
            torch.library.opcheck(op, arguments)
            checked += 1
    assert checked


def test_compiled_calls_have_one_graph_and_recompile_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(swba_kernels.block_window_attention, fullgraph=True, backend=counter)
    for n, block_size, window in ((200, 40, 80), (333, 50, 110), (470, 60, 200), (640, 90, 330)):
        pattern = BlockWindow(block_size, window)
        inputs = [x.requires_grad_() for x in qkv(Case(pattern, n, head_dim=64), torch.bfloat16, "cuda")]
        out = call(*inputs, pattern)
        assert torch.equal(out, swba_kernels.block_window_attention(*inputs, pattern))
        out.sum().backward()
    assert counter.frame_count == 2


def test_inductor_runs_a_streaming_step() -> None:
    case = Case(BlockWindow(48, 192), 48, heads=6, kv_heads=6, head_dim=64, batch=1)
    q, k, v = qkv(case, torch.bfloat16, "cuda")
    position = torch.tensor([480], device="cuda")

    def step(q, k, v, k_ring, v_ring, position):
        swba_kernels.ring_write(k_ring, v_ring, k, v, position)
        valid = (position + q.shape[2]).clamp(max=k_ring.shape[2])
        return swba_kernels.window_decode_attention(q, k_ring, v_ring, valid) * 2

    start = torch.randn(2, 1, 6, 192, 64, device="cuda", dtype=torch.bfloat16)
    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        rings = start.clone()
        results.append((function(q, k, v, *rings, position), rings))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def compiled_kernels(package: str) -> int:
    """Count the kernels of a package that this process has compiled for its device."""
    import triton

    path = [str(Path(swba_kernels.__file__).parent / package)]
    modules = [import_module(f"swba_kernels.{package}.{x.name}") for x in pkgutil.iter_modules(path)]
    functions = {id(x): x for module in modules for x in vars(module).values()}
    kernels = [x for x in functions.values() if isinstance(x, triton.runtime.JITFunction)]
    return sum(len(entry[0]) for kernel in kernels for entry in kernel.device_caches.values())


def call_every_op(impl: str, n: int, block_size: int, window: int, sink: int, first: int, position: int) -> None:
    p = BlockWindow(block_size, window, sink, first)
    inputs = [x.requires_grad_() for x in qkv(Case(p, n, heads=4, kv_heads=2, head_dim=64), torch.bfloat16, "cuda")]
    swba_kernels.block_window_attention(*inputs, p, impl=impl).sum().backward()
    q, k, v = (x.detach() for x in inputs)
    k_ring = torch.zeros(3, 2, sink + window, 64, dtype=torch.bfloat16, device="cuda")
    rows = torch.full((2,), position, device="cuda")
    swba_kernels.prefill_attention(q, k, v, p, k_ring, k_ring, rows, impl=impl)
    swba_kernels.ring_write(k_ring, k_ring.clone(), k, v, rows, sink=sink, impl=impl)
    swba_kernels.window_decode_attention(q[:, :, :block_size], k_ring, k_ring, rows + 1, impl=impl)


OTHER_SIZES = [
    (601, 101, 401, 0, 0, 0),
    (1024, 128, 512, 128, 0, 500),
    (640, 64, 100, 1, 1, 30),
    (999, 250, 3999, 3, 9, 1),
]


def test_new_sizes_compile_no_new_kernel(monkeypatch) -> None:
    """Decode has two kernels, by whether its keys are split: one call here for each, then sizes of both kinds."""
    from swba_kernels.portable import decode

    splits, choose = [], decode.decode_splits
    monkeypatch.setattr(decode, "decode_splits", lambda *sizes: splits.append(choose(*sizes)) or splits[-1])
    call_every_op("triton", 600, 100, 200, 50, 20, 7)
    call_every_op("triton", 600, 100, 4000, 50, 20, 7)
    assert [x > 1 for x in splits] == [False, True]
    before = compiled_kernels("portable")
    assert before >= 8
    for sizes in OTHER_SIZES:
        call_every_op("triton", *sizes)
    assert {x > 1 for x in splits[2:]} == {False, True}
    assert compiled_kernels("portable") == before


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs capability 9.0"
)
def test_new_sizes_compile_no_new_hopper_kernel() -> None:
    """Each configuration is a kernel: one call here for each that blocks up to 256 tokens choose, then others."""
    from swba_kernels.hopper.decode import decode
    from swba_kernels.hopper.decode_plan import CONFIGS, lane_plans
    from swba_kernels.hopper.forward import choose_config
    from swba_kernels.hopper.forward_small import serves

    n, most_sinks = 1100, 50
    chosen: set[tuple] = set()
    for block in range(1, 257):
        for seen in range(block + most_sinks, n, 50):  # keys, sinks among them
            forward, prefill = (choose_config(64, block, seen, *ring) for ring in ((False, True), (True, False)))
            alone = None if serves(64, block, n, 0) else forward
            choices = {("prefill", prefill), ("with sinks", forward), ("without", alone)}
            if not choices <= chosen:
                chosen |= choices
                for sink in (0, most_sinks):
                    call_every_op("hopper", n, block, seen - sink, sink, 0, 7)
    assert {choice[1] for kind, choice in chosen if kind == "with sinks"} == {False, True}
    q, ring = (torch.zeros(2, 4, x, 64, dtype=torch.bfloat16, device="cuda") for x in (250, 4000))
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for config in CONFIGS[64]:
        for plan in lane_plans(config, 4, 250, 4000, 2, multiprocessors):
            decode(q, ring, ring, torch.full((2,), 9, device="cuda"), None, scale=0.1, plan=plan)
    before = compiled_kernels("hopper")
    assert before > len(CONFIGS[64])
    for sizes in OTHER_SIZES:
        call_every_op("hopper", *sizes)
    assert compiled_kernels("hopper") == before


def test_repeats_are_bitwise_equal() -> None:
    p = BlockWindow(130, 500, 33)
    inputs = [x.requires_grad_() for x in qkv(Case(p, 2000, heads=8, kv_heads=2, head_dim=128), torch.bfloat16, "cuda")]
    seed = torch.randn_like(inputs[0])

    def run():
        out = swba_kernels.block_window_attention(*inputs, p, impl="triton")
        valid = torch.tensor([1999, 700], device="cuda")
        one = swba_kernels.window_decode_attention(inputs[0][:, :, :130], inputs[1], inputs[2], valid, impl="triton")
        return (out, one, *torch.autograd.grad(out, inputs, seed))

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_a_lane_is_bitwise_the_same_whatever_the_others_do() -> None:
    q = torch.randn(4, 6, 100, 64, device="cuda", dtype=torch.bfloat16)
    k_ring, v_ring = torch.randn(2, 4, 6, 3000, 64, device="cuda", dtype=torch.bfloat16)
    valid = torch.tensor([3000, 1, 1234, 2999], device="cuda")
    together = decode(q, k_ring, v_ring, valid, None)
    for b in range(4):
        one = slice(b, b + 1)
        alone = decode(q[one], k_ring, v_ring, valid[one], torch.tensor([b], device="cuda"))
        assert all(torch.equal(x, y[one]) for x, y in zip(alone, together, strict=True))


def test_one_graph_serves_every_valid_length_and_position() -> None:
    q = torch.randn(2, 6, 48, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 6, 48, 64, device="cuda", dtype=torch.bfloat16)
    rings = torch.zeros(2, 2, 6, 500, 64, device="cuda", dtype=torch.bfloat16)
    position = torch.zeros(2, dtype=torch.int64, device="cuda")
    lanes = torch.tensor([1, 0], device="cuda")

    def step(rings):
        swba_kernels.ring_write(*rings, k, v, position, sink=20, lanes=lanes, impl="triton")
        valid = (position + 48).clamp(max=500)
        return decode(q, *rings, valid, lanes)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(rings.clone())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(rings)
    rings.zero_()
    expected_rings = rings.clone()
    for i in range(30):
        k.normal_()
        v.normal_()
        position.copy_(torch.tensor([48 * i, 7 * i]))
        expected = step(expected_rings)
        graph.replay()
        assert torch.equal(rings, expected_rings)
        assert torch.equal(out, expected)


def test_decode_and_ring_write_never_synchronise() -> None:
    q = torch.randn(1, 2, 8, 64, device="cuda", dtype=torch.bfloat16)
    rings = torch.randn(2, 1, 2, 100, 64, device="cuda", dtype=torch.bfloat16)
    rows = torch.tensor([20], device="cuda")
    p = BlockWindow(8, 100)

    def run(impl: str) -> None:
        write(*rings, q, q, rows, None, 0, impl)
        decode(q, *rings, rows, None, impl)
        swba_kernels.prefill_attention(q, q, q, p, *rings, rows, impl=impl)

    for impl in ("triton", "sdpa"):
        run(impl)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(impl)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    p = BlockWindow(64, 128)
    n = 2**31 // (16 * 128) + 200
    q = torch.randn(1, n, 16, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    assert q.numel() > 2**31
    out = swba_kernels.block_window_attention(q, q, q, p, impl="triton")
    start = p.block_ends(n)[-2] - 2 * p.block_size
    tail = q[:, :, start:]
    oracle = reference.block_window_reference(*[tail.double()] * 3, p)[:, :, 2 * p.block_size :]
    eager = reference.block_window_reference(tail, tail, tail, p)[:, :, 2 * p.block_size :]
    assert_close(out[:, :, start + 2 * p.block_size :], oracle, eager)


@pytest.mark.slow
def test_a_ring_of_more_than_two_to_the_31_elements() -> None:
    slots = 2**31 // (8 * 128) + 1000
    k_ring = torch.randn(1, 8, slots, 128, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(1, 8, 16, 128, device="cuda", dtype=torch.bfloat16)
    position = torch.tensor([slots - 8], device="cuda")
    write(k_ring, k_ring, q, q, position, None, 0)
    assert torch.equal(k_ring[:, :, slots - 8 :], q[:, :, :8])
    assert torch.equal(k_ring[:, :, :8], q[:, :, 8:])
    out, _ = decode(q[:, 7:], k_ring[:, 7:], k_ring[:, 7:], torch.tensor([slots], device="cuda"), None)
    keys = k_ring[:, 7:].float()
    expected = torch.softmax(q[:, 7:].float() @ keys.mT * 128**-0.5, dim=-1) @ keys
    torch.testing.assert_close(out.float(), expected, atol=2e-3, rtol=2e-2)
