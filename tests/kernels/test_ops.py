from __future__ import annotations

import copy

import pytest
import torch
from kernel_cases import ring_case
from ops_cases import CASE, op_samples
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental import sym_node

import swba_kernels
from swba_kernels import BlockWindow

needs_dynamic_int = pytest.mark.skipif(
    not hasattr(sym_node, "DynamicInt"), reason="torch 2.9 compiles once more for each size that changes"
)
SAMPLES = list(op_samples("sdpa", torch.float32, "cpu"))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("op", "arguments"), SAMPLES, ids=[f"{i}-{op._name}" for i, (op, _) in enumerate(SAMPLES)])
def test_opcheck(op, arguments) -> None:
    torch.library.opcheck(op, arguments)


def draw(n: int, requires_grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(2, n, 2, 16).transpose(1, 2).requires_grad_(requires_grad) for _ in range(3)]


def test_forward_and_backward_compile_without_a_graph_break() -> None:
    pattern = BlockWindow(5, 13, 4, 2)

    def loss(q, k, v):
        out, lse = swba_kernels.block_window_attention(q * 2, k, v, pattern, return_lse=True)
        return (out.sin().sum() + lse.sum()), out

    inputs = draw(23)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        value, out = function(*inputs)
        results.append((value, out, *torch.autograd.grad(value, inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_inductor_compiles_the_op() -> None:
    pattern = BlockWindow(5, 13)
    inputs = draw(20)

    def call(*x):
        return swba_kernels.block_window_attention(*x, pattern).transpose(1, 2).reshape(2, -1, 32)

    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), call(*inputs))


def test_a_streaming_step_compiles_without_a_graph_break() -> None:
    rows = ring_case(CASE, torch.float32)
    q, k, v, _, _, position, lanes = rows
    start = [x.nan_to_num(0.5) for x in (rows.k_ring, rows.v_ring)]
    pattern = CASE.pattern

    def step(q, k, v, k_ring, v_ring, position, lanes):
        ahead = swba_kernels.prefill_attention(q, k, v, pattern, k_ring, v_ring, position, lanes=lanes)
        swba_kernels.ring_write(k_ring, v_ring, k, v, position, sink=pattern.sink, lanes=lanes)
        valid = (position + q.shape[2]).clamp(max=k_ring.shape[2])
        return ahead, swba_kernels.window_decode_attention(q[:, :, :5], k_ring, v_ring, valid, lanes=lanes)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        rings = [x.clone() for x in start]
        results.append((*function(q, k, v, *rings, position, lanes), *rings))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def count_compiles(sizes: list[tuple[int, int, int]], **options: object) -> list[int]:
    """Return how often Dynamo has compiled after each (N, block size, window)."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, **options)
    def call(q, k, v, pattern):
        return swba_kernels.block_window_attention(q, k, v, pattern)

    counts = []
    for n, block_size, window in sizes:
        inputs = draw(n)
        pattern = BlockWindow(block_size, window)
        out = call(*inputs, pattern)
        torch.testing.assert_close(out, swba_kernels.block_window_attention(*inputs, pattern))
        out.sum().backward()
        counts.append(counter.frame_count)
    return counts


def test_a_new_length_block_size_and_window_recompile_once() -> None:
    assert count_compiles([(20, 4, 8), (33, 5, 11), (47, 6, 20), (21, 4, 30), (64, 9, 12)]) == [1, 2, 2, 2, 2]


@needs_dynamic_int
@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        pytest.param([(20, 4, 8), (33, 4, 8), (35, 4, 8), (48, 4, 8)], [1, 2, 2, 2], id="length"),
        pytest.param([(20, 4, 8), (33, 4, 8), (33, 5, 8), (33, 5, 11), (41, 1, 1)], [1, 2, 2, 2, 2], id="one by one"),
        pytest.param([(20, 4, 8), (20, 5, 8), (20, 5, 11), (20, 1, 1), (33, 1, 1)], [1, 1, 1, 1, 2], id="length last"),
    ],
)
def test_sizes_that_change_one_after_another_recompile_once_in_all(sizes, counts) -> None:
    assert count_compiles(sizes) == counts


@needs_dynamic_int
def test_a_pattern_kept_by_a_module_may_change_without_a_recompilation() -> None:
    class Attention(torch.nn.Module):
        pattern = BlockWindow(4, 8)

        def forward(self, q, k, v):
            return swba_kernels.block_window_attention(q, k, v, self.pattern)

    module, counter = Attention(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    inputs = draw(20, False)
    for pattern in (BlockWindow(4, 8), BlockWindow(5, 8), BlockWindow(5, 11, 3), BlockWindow(5, 11, 3, 2)):
        module.pattern = pattern
        torch.testing.assert_close(compiled(*inputs), module(*inputs))
    assert counter.frame_count == 1


def test_two_patterns_of_a_compiled_function_are_told_apart_when_they_were_one_before() -> None:
    def difference(q, k, v, a, b):
        attend = swba_kernels.block_window_attention
        return attend(q, k, v, a) - attend(q, k, v, b)

    compiled = torch.compile(difference, fullgraph=True, backend="aot_eager")
    inputs, first = draw(20, False), BlockWindow(4, 8)
    for pair in ((first, first), (first, copy.copy(first)), (first, BlockWindow(7, 9)), (BlockWindow(3, 3), first)):
        torch.testing.assert_close(compiled(*inputs, *pair), difference(*inputs, *pair))


def test_dynamic_shapes_never_recompile() -> None:
    assert count_compiles([(20, 4, 8), (33, 4, 8), (35, 5, 8), (35, 5, 30), (48, 7, 9)], dynamic=True) == [1] * 5


def test_the_original_call_recompiles_once() -> None:
    counter = CompileCounterWithBackend("eager")
    call = torch.compile(swba_kernels.attention, fullgraph=True, backend=counter)
    for n, bs, ws in ((20, 4, 3), (33, 5, 4), (35, 6, 7), (64, 9, 2)):
        call(*draw(n, False), bs, ws, 0.3)
    assert counter.frame_count == 2


def test_the_log_sum_exp_carries_no_gradient() -> None:
    q, k, v = draw(9)
    out, lse = swba_kernels.block_window_attention(q, k, v, BlockWindow(3, 6), return_lse=True)
    assert out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradients_of_gradients_are_refused_where_they_are_asked_for(with_sinks) -> None:
    q, k, v = draw(9)
    pattern, q_sink = (BlockWindow(3, 6, 2), q * 2) if with_sinks else (BlockWindow(3, 6), None)
    out = swba_kernels.block_window_attention(q, k, v, pattern, q_sink=q_sink)
    first = torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(first, torch.autograd.grad(out.sum(), (q, k, v)), strict=True))
    with pytest.raises(RuntimeError, match="block_window_attention: expected to be differentiated once"):
        torch.autograd.grad(first[0].square().sum(), (q, k, v))


def test_results_have_the_layout_of_their_inputs() -> None:
    q, k, v = draw(9)
    out = swba_kernels.block_window_attention(q, k, v, BlockWindow(3, 6))
    assert out.stride() == q.stride()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [x.stride() for x in grads] == [x.stride() for x in (q, k, v)]
