"""The Hopper backward on a GPU against the float64 reference; every buffer it allocates starts as NaN."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Case, qkv
from tolerance import assert_close, cancellation
from torch import Tensor

from swba_kernels import BlockWindow, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs capability 9.0"
    ),
]

CASES = [
    Case(BlockWindow(64, 192), 640, head_dim=64),
    Case(BlockWindow(144, 432), 1000, heads=4, kv_heads=2, head_dim=64),
    Case(BlockWindow(256, 1024), 1536, head_dim=128, batch=1),
    Case(BlockWindow(256, 600, 31), 1111, heads=3, kv_heads=3, head_dim=128),
    Case(BlockWindow(333, 700, 130), 1200, heads=6, kv_heads=2, head_dim=64),
    Case(BlockWindow(333, 999, 0, 100), 901, heads=2, kv_heads=1, head_dim=128),
    Case(BlockWindow(512, 1024, 512), 2048, head_dim=64, batch=1),
    Case(BlockWindow(880, 1760, 5, 17), 1900, heads=2, kv_heads=1, head_dim=128, batch=1),
    Case(BlockWindow(1560, 1560), 2000, head_dim=64, batch=1),
    Case(BlockWindow(1560, 4680, 70), 3200, heads=1, kv_heads=1, head_dim=128, batch=1),
    Case(BlockWindow(500, 500), 130, head_dim=64, batch=3),
    Case(BlockWindow(64, 64), 1, head_dim=128, batch=3),
    Case(BlockWindow(7, 40, 3, 2), 300, heads=4, kv_heads=1, head_dim=64),
    Case(BlockWindow(1, 1), 200, head_dim=128),
    Case(BlockWindow(200, 500), 1001, heads=2, kv_heads=2, head_dim=128),  # walks of 13 and 7 tiles of queries
]


MODES = ["split", "in turn", "fastest"]


def mode_options(mode: str, head_dim: int) -> dict:
    """Return what makes a backward run in one of its ways, all but the last of which are deterministic."""
    from swba_kernels.hopper.backward import FAST, IN_TURN, SPLIT

    tables = {"split": SPLIT, "in turn": IN_TURN, "fastest": FAST}
    return {"config": tables[mode][head_dim]}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Let torch fill what it allocates uninitialised with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def forward(case: Case, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, dict]:
    from swba_kernels.portable.forward import forward as portable_forward

    p = case.pattern
    options = {"scale": case.head_dim**-0.5, "block_size": p.block_size, "window": p.window}
    options |= {"sink": p.sink, "grid_start": p.grid_start}
    return *portable_forward(*inputs, **options), options


def gradients(case: Case, inputs: tuple[Tensor, ...], dout: Tensor, **more) -> tuple[Tensor, ...]:
    from swba_kernels.hopper.backward import backward

    out, lse, options = forward(case, inputs)
    return backward(dout, *inputs, out, lse, **options, **more)[:3]


def draw_dout(case: Case, dtype: torch.dtype) -> Tensor:
    shape = (case.batch, case.heads, case.n, case.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to("cuda", dtype)


def check(case: Case, inputs: tuple[Tensor, ...], dout: Tensor, **more) -> None:
    actual = gradients(case, inputs, dout, **more)

    def by_autograd(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
        return torch.autograd.grad(reference.block_window_reference(*leaves, case.pattern), leaves, dout.to(dtype))

    floors = (*cancellation(*inputs, dout, case.pattern, case.head_dim**-0.5), None)
    pairs = zip(actual, by_autograd(torch.float64), by_autograd(dout.dtype), floors, inputs, strict=True)
    for name, (a, oracle, eager, floor, x) in zip(("dq", "dk", "dv"), pairs, strict=True):
        assert_close(a, oracle, eager, name, floor)
        assert a.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_the_reference(case, dtype, mode) -> None:
    check(case, qkv(case, dtype, "cuda"), draw_dout(case, dtype), **mode_options(mode, case.head_dim))


@pytest.mark.parametrize("mode", MODES)
def test_views_of_wider_buffers_full_of_nan(mode) -> None:
    case = Case(BlockWindow(144, 333, 20), 700, heads=4, kv_heads=2, head_dim=128)

    def inside(x: Tensor) -> Tensor:
        buffer = torch.full((x.shape[0], x.shape[2] + 24, x.shape[1] + 1, x.shape[3] + 8), float("nan"), device="cuda")
        view = buffer.to(x.dtype)[:, 16:-8, 1:, : x.shape[3]].transpose(1, 2)
        return view.copy_(x)

    inputs = tuple(inside(x) for x in qkv(case, torch.bfloat16, "cuda"))
    check(case, inputs, inside(draw_dout(case, torch.bfloat16)), **mode_options(mode, case.head_dim))


def test_expanded_gradient_of_the_output() -> None:
    case = Case(BlockWindow(100, 300), 500, head_dim=64)
    dout = torch.ones((), device="cuda", dtype=torch.bfloat16).expand(case.batch, case.heads, case.n, case.head_dim)
    check(case, qkv(case, torch.bfloat16, "cuda"), dout)


@pytest.mark.parametrize("mode", MODES)
def test_large_scores_do_not_overflow(mode) -> None:
    case = Case(BlockWindow(200, 500), 1001, head_dim=128)
    inputs = tuple(x * 12 for x in qkv(case, torch.bfloat16, "cuda"))
    check(case, inputs, draw_dout(case, torch.bfloat16), **mode_options(mode, case.head_dim))


@pytest.mark.parametrize("mode", MODES[:-1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_deterministic_gradients_repeat_bit_for_bit(case, mode) -> None:
    inputs, dout = qkv(case, torch.bfloat16, "cuda"), draw_dout(case, torch.bfloat16)
    first = gradients(case, inputs, dout, **mode_options(mode, case.head_dim))
    for _ in range(5):
        assert all(map(torch.equal, gradients(case, inputs, dout, **mode_options(mode, case.head_dim)), first))


@pytest.mark.parametrize("mode", MODES)
def test_nan_of_hidden_tokens_never_reaches_a_gradient(mode) -> None:
    """Blocks and window are multiples of the tiles here: blocks that share a tile share each other's NaN (0 x NaN)."""
    case = Case(BlockWindow(256, 512), 1500, head_dim=128)
    token = 700
    mask = case.pattern.mask(case.n, "cuda")
    lost_queries = mask[:, token].clone()
    lost_keys = mask[lost_queries].any(0)
    results = []
    for value in (0.0, float("nan")):
        inputs = tuple(x.clone() for x in qkv(case, torch.bfloat16, "cuda"))
        for x in inputs:
            x[:, :, token] = value
        dq, dk, dv = gradients(case, inputs, draw_dout(case, torch.bfloat16), **mode_options(mode, case.head_dim))
        results.append((dq[:, :, ~lost_queries], dk[:, :, ~lost_keys], dv[:, :, ~lost_keys]))
    assert not lost_queries.all()
    assert not lost_keys.all()
    for a, b in zip(*results, strict=True):
        assert a.numel()
        assert torch.isfinite(b).all()
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_rows_with_an_infinite_log_sum_exp_have_no_gradient() -> None:
    from swba_kernels.hopper.backward import backward

    case = Case(BlockWindow(128, 256), 384, head_dim=64)
    inputs, dout = qkv(case, torch.bfloat16, "cuda"), draw_dout(case, torch.bfloat16)
    out, lse, options = forward(case, inputs)
    without = dout.index_fill(2, torch.tensor([5, 200], device="cuda"), 0.0)
    *expected, _ = backward(without, *inputs, out, lse, **options)
    lse[:, :, 5], lse[:, :, 200] = float("inf"), float("-inf")
    *actual, _ = backward(dout, *inputs, out, lse, **options)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("mode", MODES[:-1])
def test_gradients_replay_from_a_graph(mode) -> None:
    case = Case(BlockWindow(256, 768), 2000, head_dim=128)
    inputs, dout = qkv(case, torch.bfloat16, "cuda"), draw_dout(case, torch.bfloat16)
    expected = gradients(case, inputs, dout, **mode_options(mode, 128))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(case, inputs, dout, **mode_options(mode, 128))
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, captured, expected))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_no_new_kernel_for_new_sizes(head_dim) -> None:
    from swba_kernels.hopper.backward_dkv import dkv_kernel
    from swba_kernels.hopper.backward_dq import dq_kernel
    from swba_kernels.hopper.backward_fused import fused_kernel
    from swba_kernels.hopper.backward_fused_narrow import fused_narrow_kernel

    def kernels() -> list[int]:
        made = (dkv_kernel, dq_kernel, fused_kernel if head_dim == 128 else fused_narrow_kernel)
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in made]

    def run(case: Case) -> None:
        for mode in MODES:
            inputs = qkv(case, torch.bfloat16, "cuda")
            gradients(case, inputs, draw_dout(case, torch.bfloat16), **mode_options(mode, case.head_dim))

    run(Case(BlockWindow(100, 300, 5), 500, head_dim=head_dim))
    before = kernels()
    assert all(before)
    for n, block_size in ((1, 1), (16, 16), (512, 128), (1000, 333)):
        run(Case(BlockWindow(block_size, 2 * block_size, 16, 1), n, heads=4, kv_heads=1, head_dim=head_dim, batch=1))
    assert kernels() == before


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_walks_of_every_length(head_dim, group, mode) -> None:
    """Stages go round by two or four and slots by three: walks of 1 to 21 tiles of queries end on each of them."""
    for n in range(64, 449, 64):
        case = Case(BlockWindow(n, n), n, heads=group, kv_heads=1, head_dim=head_dim, batch=1)
        check(case, qkv(case, torch.bfloat16, "cuda"), draw_dout(case, torch.bfloat16), **mode_options(mode, head_dim))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_programs_that_add_in_turn_agree_with_the_split_kernels(head_dim) -> None:
    """More tiles of keys than a GPU runs at once, several heads side by side, blocks and sequences that end ragged."""
    case = Case(BlockWindow(520, 4160, 100), 9000, heads=24, kv_heads=12, head_dim=head_dim, batch=1)
    inputs, dout = qkv(case, torch.bfloat16, "cuda"), draw_dout(case, torch.bfloat16)
    first = gradients(case, inputs, dout, **mode_options("in turn", head_dim))
    for _ in range(5):
        again = gradients(case, inputs, dout, **mode_options("in turn", head_dim))
        assert all(map(torch.equal, again, first))
    for a, e in zip(first, gradients(case, inputs, dout, **mode_options("split", head_dim)), strict=True):
        assert (a.float() - e.float()).norm() < 0.006 * e.float().norm()


def test_deterministic_is_the_default_and_the_fastest_is_asked_for() -> None:
    case = Case(BlockWindow(256, 1024), 3000, heads=8, kv_heads=8, head_dim=64, batch=1)
    inputs, dout = qkv(case, torch.bfloat16, "cuda"), draw_dout(case, torch.bfloat16)
    first = gradients(case, inputs, dout)
    assert all(map(torch.equal, gradients(case, inputs, dout), first))
    for a, e in zip(gradients(case, inputs, dout, deterministic=False), first, strict=True):
        assert (a.float() - e.float()).norm() < 0.006 * e.float().norm()
