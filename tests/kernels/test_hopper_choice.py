"""Who runs the Hopper kernels, decided on a CPU: a faked device, and kernels played by the CPU implementation."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
from ops_cases import op_samples
from torch._dynamo.testing import CompileCounterWithBackend

import swba_kernels
from swba_kernels import BlockWindow, choice, choose_impl, ops, sdpa
from swba_kernels.hopper import supports

PATTERN = BlockWindow(96, 192, 16)
OPS = ("forward", "prefill", "decode")
SMALLEST = supports.SMALLEST_BLOCK["forward with sinks"]


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to be on a GPU whose Triton builds the kernels; return what changes that."""

    def pretend(capability=(9, 0), triton=None) -> None:
        choice._choose.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "some GPU")
        monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr(supports, "build_obstacle", lambda: triton)

    pretend()
    yield pretend
    choice._choose.cache_clear()


@pytest.mark.parametrize("op", OPS)
def test_auto_chooses_hopper_for_what_its_kernels_serve(op, gpu) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for head_dim in (64, 128):
            assert choose_impl("cuda:0", dtype, head_dim, op).name == "hopper"
    assert choose_impl("cuda:0", torch.bfloat16, 80, op).name == "triton"
    assert "head dim 80" in choose_impl("cuda:0", torch.bfloat16, 80, op).reason
    assert "float32" in choose_impl("cuda:0", torch.float32, 64, op).reason
    assert choose_impl("cuda:0", torch.bfloat16, 64, "ring_write").name == "triton"


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [
        ((8, 0), None, "8.0 is not 9.0"),
        ((10, 0), None, "10.0 is not 9.0"),
        ((9, 0), "too old a Triton", "too old a Triton"),
    ],
)
def test_elsewhere_auto_runs_the_portable_kernels_and_says_why(capability, triton, reason, gpu) -> None:
    gpu(capability, triton)
    for op in OPS:
        name, why = choose_impl("cuda:0", torch.bfloat16, 128, op)
        assert name == "triton"
        assert reason in why
    with pytest.raises(ValueError, match=f"got 'hopper': .*{reason}"):
        choice._resolve("hopper", "cuda", 0, torch.bfloat16, "decode")


def test_hopper_by_name_resolves_or_raises(gpu) -> None:
    assert [choice._resolve("hopper", "cuda", 0, torch.bfloat16, op) for op in OPS] == ["hopper"] * 3
    assert choice._resolve("hopper", "cuda", 0, torch.bfloat16, "ring_write") == "triton"
    with pytest.raises(ValueError, match="got 'hopper': float32"):
        choice._resolve("hopper", "cuda", 0, torch.float32, "decode")
    x = torch.randn(1, 1, 4, 64).half()
    with pytest.raises(ValueError, match="got 'hopper': tensors on a CPU"):
        swba_kernels.block_window_attention(x, x, x, PATTERN, impl="hopper")


def test_a_head_dim_is_refused_before_the_first_call(gpu, monkeypatch) -> None:
    resolve = choice._resolve
    monkeypatch.setattr(choice, "_resolve", lambda impl, device, *rest: resolve(impl, "cuda", *rest))
    choice.check_served("hopper", torch.empty(0, 0, 0, 64).half(), "decode")
    choice.check_served("auto", torch.empty(0, 0, 0, 80).half(), "decode")
    with pytest.raises(ValueError, match="got 'hopper': head dim 80"):
        choice.check_served("hopper", torch.empty(0, 0, 0, 80).half(), "decode")


@pytest.mark.parametrize(
    ("version", "serves"),
    [("3.5.1", False), ("3.6.0", True), ("3.7.1", True), ("3.9.0+git1", True), ("3.10.0", False), ("4.0.0", False)],
)
def test_triton_versions_that_were_tried(version, serves, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    monkeypatch.setattr(supports.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    obstacle = supports.build_obstacle.__wrapped__()
    assert (obstacle is None) == serves, obstacle
    assert serves or version in obstacle


def test_gluon_cannot_be_interpreted_nor_built_without_triton(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.6.0"))
    monkeypatch.setattr(supports.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET" in supports.build_obstacle.__wrapped__()
    monkeypatch.setattr(supports.importlib.util, "find_spec", lambda name: None)
    assert supports.build_obstacle.__wrapped__() == "triton is not installed"


class Played:
    """Kernels of both families, played by the CPU implementation; `calls` names who ran what."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.deterministic: list[bool] = []
        self.waves = 1.0  # of programs of a fused backward

    def install(self, monkeypatch) -> None:
        for package in ("hopper", "portable"):
            family = {"hopper": "hopper", "portable": "triton"}[package]
            for name in ("forward", "backward", "decode"):
                module = types.SimpleNamespace(**{name: self.function(family, name)})
                if name == "forward":
                    module.Ring = lambda *ring: ring
                monkeypatch.setitem(sys.modules, f"swba_kernels.{package}.{name}", module)

    def function(self, family: str, name: str):
        def play(*tensors, ring=None, deterministic=None, **options):
            self.calls.append((family, name))
            if family == "hopper":
                read = tensors[1:4] if name == "backward" else tensors[:3]
                assert supports.obstacle(*read) is None
            if name == "backward":
                assert (deterministic is None) == (family == "triton")
                self.deterministic.append(deterministic)
                return sdpa.backward(*tensors, **options)
            if name == "decode":
                return sdpa.decode(*tensors, need_lse=True, **options)
            if ring is not None:
                return sdpa.prefill(*tensors, *ring, need_lse=True, **options)
            return sdpa.forward(*tensors, need_lse=True, **options)

        return play


@pytest.fixture
def played(monkeypatch) -> Played:
    """Let a CPU pass for a GPU with Hopper kernels."""
    kernels = Played()
    kernels.install(monkeypatch)

    def resolve(impl, device, index, dtype, op):
        return (
            choice.HOPPER_OR_TRITON if impl == "auto" and op != "ring_write" else impl if impl == "hopper" else "sdpa"
        )

    resolve._dynamo_marked_constant = True
    monkeypatch.setattr(choice, "_resolve", resolve)
    monkeypatch.setattr(supports, "waves_of_backward", lambda q, k: kernels.waves)
    ops._log_once.cache_clear()
    torch._dynamo.reset()
    yield kernels
    torch._dynamo.reset()


def draw(n: int, heads: int = 2, head_dim: int = 64, dtype=torch.float16) -> list[torch.Tensor]:
    return [torch.randn(1, n, heads, head_dim, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]


def attend(*inputs, **options):
    return swba_kernels.block_window_attention(*inputs, options.pop("pattern", PATTERN), **options)


def unaligned(x: torch.Tensor) -> torch.Tensor:
    """Return an equal tensor whose first element lies 2 bytes past an aligned address."""
    flat = torch.empty(x.numel() + 8, dtype=x.dtype)
    return flat[1 : x.numel() + 1].view(x.shape).copy_(x)


def odd_strides(x: torch.Tensor) -> torch.Tensor:
    """Return an equal tensor whose rows lie an odd number of elements apart."""
    wide = torch.empty(*x.shape[:3], x.shape[3] + 1, dtype=x.dtype)
    return wide[..., :-1].copy_(x)


def test_a_call_without_obstacles_runs_on_hopper_forward_and_backward(played) -> None:
    q, k, v = draw(200)
    attend(q, k, v).square().sum().backward()
    attend(q, k, v, impl="hopper").square().sum().backward()
    assert played.calls == [("hopper", "forward"), ("hopper", "backward")] * 2


@pytest.mark.parametrize("spoil", [unaligned, odd_strides])
@pytest.mark.parametrize("which", range(3))
def test_tensors_that_tma_cannot_read_run_portable_under_auto_and_raise_by_name(spoil, which, played) -> None:
    inputs = [x.detach() for x in draw(200)]
    inputs[which] = spoil(inputs[which])
    attend(*(x.requires_grad_() for x in inputs)).square().sum().backward()
    assert played.calls == [("triton", "forward"), ("triton", "backward")]
    with pytest.raises(ValueError, match=r"got 'hopper' for forward: (a tensor whose first|strides)"):
        attend(*inputs, impl="hopper")


@pytest.mark.parametrize("spoil", [unaligned, odd_strides])
def test_rings_that_tma_cannot_read_run_portable_under_auto_and_raise_by_name(spoil, played) -> None:
    q = draw(96)[0].detach()
    ring, bad = torch.randn(1, 2, 256, 64).half(), spoil(torch.randn(1, 2, 256, 64).half())
    rows = torch.tensor([100])
    for rings in ((ring, ring), (bad, ring), (ring, bad)):
        swba_kernels.window_decode_attention(q, *rings, rows)
        swba_kernels.prefill_attention(q, q, q, PATTERN, *rings, rows)
    assert [family for family, _ in played.calls] == ["hopper"] * 2 + ["triton"] * 4
    with pytest.raises(ValueError, match="got 'hopper' for decode"):
        swba_kernels.window_decode_attention(q, bad, ring, rows, impl="hopper")
    with pytest.raises(ValueError, match="got 'hopper' for prefill"):
        swba_kernels.prefill_attention(q, q, q, PATTERN, ring, bad, rows, impl="hopper")


@pytest.mark.parametrize("spoil", [unaligned, odd_strides])
def test_a_second_query_that_tma_cannot_read_runs_portable_under_auto_and_raises_by_name(spoil, played) -> None:
    q, k, v = draw(96)
    bad, ring, rows = spoil(q.detach()), torch.randn(1, 2, 256, 64).half(), torch.tensor([100])
    pattern = BlockWindow(100, 200, 30)
    calls = [
        lambda **given: attend(q, k, v, pattern=pattern, **given).sum().backward(),
        lambda **given: swba_kernels.window_decode_attention(q, ring, ring, rows, sink=30, **given),
        lambda **given: swba_kernels.prefill_attention(q, q, q, pattern, ring, ring, rows, **given),
    ]
    for call in calls:
        call(q_sink=bad)
    assert {family for family, _ in played.calls} == {"triton"}
    played.calls.clear()
    for call in calls:
        call(q_sink=q.detach().clone())
        with pytest.raises(ValueError, match="got 'hopper' for"):
            call(q_sink=bad, impl="hopper")
    assert {family for family, _ in played.calls} == {"hopper"}


def test_other_head_dims_and_small_blocks_run_portable_under_auto(played, caplog) -> None:
    with caplog.at_level(logging.DEBUG, logger="swba_kernels"):
        for _ in range(2):
            attend(*draw(200, head_dim=96))
            attend(*draw(200), pattern=BlockWindow(SMALLEST[64] - 1, 100, 3))
    assert played.calls == [("triton", "forward")] * 4
    assert len(caplog.records) == 2, "each reason is logged once"
    with pytest.raises(ValueError, match="head dim 96"):
        attend(*draw(200, head_dim=96), impl="hopper")
    attend(*draw(200), pattern=BlockWindow(5, 100, 3), impl="hopper")
    attend(*draw(200), pattern=BlockWindow(5, 100))
    assert played.calls[-2:] == [("hopper", "forward")] * 2, "without sinks small blocks have a kernel of their own"


def test_small_blocks_are_for_the_fused_backward(played) -> None:
    """Deterministic, it is for calls of many programs; else for all."""
    pattern = BlockWindow(5, 100)
    for played.waves, deterministic in ((2.9, True), (3.0, True), (0.1, False)):
        attend(*draw(200), pattern=pattern, deterministic=deterministic).sum().backward()
        torch.use_deterministic_algorithms(True)
        try:
            attend(*draw(200), pattern=pattern, deterministic=deterministic).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    expected = ["triton"] * 2 + ["hopper"] * 3 + ["triton"]
    assert [family for family, op in played.calls if op == "backward"] == expected


def test_the_layout_of_a_gradient_is_no_obstacle(played) -> None:
    inputs = draw(200)
    out = attend(*inputs, impl="hopper")
    weight = torch.randn(64, dtype=torch.float16)
    for dout in (weight.expand_as(out), weight.expand_as(out).contiguous(), odd_strides(weight.expand_as(out))):
        torch.autograd.grad(out, inputs, dout, retain_graph=True)
    assert played.calls[1:] == [("hopper", "backward")] * 3


def test_a_short_call_is_a_small_block(played) -> None:
    for n in (SMALLEST[128] - 1, SMALLEST[128]):
        attend(*draw(n, head_dim=128), pattern=BlockWindow(1000, 1000, 3))
    assert [family for family, _ in played.calls] == ["triton", "hopper"]


def test_sinks_that_every_window_holds_are_none(played) -> None:
    for n in (103, 104):
        attend(*draw(n), pattern=BlockWindow(20, 100, 3))
    assert [family for family, _ in played.calls] == ["hopper", "triton"]


def test_strides_of_dimensions_of_size_one_do_not_matter() -> None:
    x = torch.randn(8, 64).half().as_strided((1, 1, 8, 64), (3, 5, 64, 1))
    assert supports.obstacle(x) is None
    assert "strides" in supports.obstacle(torch.randn(1, 1, 1, 64).half().expand(2, 1, 1, 64))


def test_determinism_is_the_default_and_torch_may_demand_it(played) -> None:
    for options in ({}, {"deterministic": True}, {"deterministic": False}):
        attend(*draw(200), **options).square().sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        attend(*draw(200), deterministic=False).square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert played.deterministic == [True, True, False, True]


def test_one_compiled_graph_serves_every_size_and_decides_as_it_runs(played) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(lambda q, k, v, pattern: attend(q, k, v, pattern=pattern), fullgraph=True, backend=counter)
    seen = []
    for n, block_size in ((200, 100), (300, 96), (333, 110), (400, 63), (410, 20), (500, 300)):
        inputs, pattern = draw(n), BlockWindow(block_size, 3 * block_size)
        out = call(*inputs, pattern)
        torch.testing.assert_close(out, attend(*inputs, pattern=pattern, impl="sdpa"))
        out.sum().backward()
        seen.append({family for family, _ in played.calls})
        played.calls.clear()
    assert seen == [{"hopper"}] * 3 + [{"hopper", "triton"}] * 2 + [{"hopper"}], "small blocks: forward, backward"
    assert counter.frame_count == 2
    call(*(unaligned(x.detach()).requires_grad_() for x in draw(512)), PATTERN)
    assert {family for family, _ in played.calls} == {"triton"}
    assert counter.frame_count <= 3


@pytest.mark.parametrize("impl", ["hopper", choice.HOPPER_OR_TRITON])
def test_opcheck(impl, played) -> None:
    for op, arguments in op_samples("sdpa", torch.float16, "cpu", head_dim=64):
        chosen = tuple(impl if x == "sdpa" else x for x in arguments)
        if op is not torch.ops.swba.ring_write.default:
            torch.library.opcheck(op, chosen)
    expected = {"hopper"} if impl == "hopper" else {"hopper", "triton"}
    assert {family for family, _ in played.calls} == expected


def test_an_op_runs_with_the_device_of_its_tensors_as_the_current_one(monkeypatch) -> None:
    events = []

    class Device:
        def __init__(self, device) -> None:
            self.device = device

        def __enter__(self) -> None:
            events.append(("enter", self.device))

        def __exit__(self, *_) -> None:
            events.append(("exit", self.device))

    monkeypatch.setattr(torch.cuda, "device", Device)
    x = torch.ones(2)
    body = ops._on_its_device(lambda x, factor: events.append("body") or x * factor)
    assert torch.equal(body(x, 3), x * 3)
    assert events == [("enter", x.device), "body", ("exit", x.device)]


def test_rings_too_long_for_32_bit_fractions_are_left_to_the_portable_kernels() -> None:
    most = supports.TOO_MANY_TOKENS - 1
    rings = [torch.empty(1, 1, slots, 64, dtype=torch.bfloat16, device="meta") for slots in (most, most + 1)]
    assert supports.obstacle(rings[0]) is None
    assert f"{most + 1} tokens or slots" in str(supports.obstacle(rings[1]))
