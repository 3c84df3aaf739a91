"""The portable gradient kernels under Triton's interpreter, against float64 autograd, inside poisoned memory."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import SINKS, check_backward

from swba_kernels.pattern import BlockWindow
from swba_kernels.reference import block_window_reference

pytest.importorskip("triton")

from poison import embed, relative_error
from small_problems import TILE, WITH_AND_WITHOUT_Q_SINK
from tolerance import assert_close

from swba_kernels.portable.backward import backward
from swba_kernels.portable.tiles import Tile


def gradients(
    pattern: BlockWindow, heads: int, kv_heads: int, n: int, d: int, scale: float, dtype=torch.float32, bounded=False,
    **tiles,
):  # fmt: skip
    """Return (kernel, float64, eager) gradients of one random problem; the kernel gets poisoned strided inputs.

    If `bounded`, there is a q_sink and its gradient comes last.
    """
    torch.manual_seed(n * d + heads)
    inputs = [torch.randn(2, h, n, d).to(dtype) for h in (heads, kv_heads, kv_heads, *[heads] * bounded)]
    dout = torch.randn(2, heads, n, d).to(dtype)

    def eager(kind):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        q_sink = leaves[3] if bounded else None
        out, lse = block_window_reference(*leaves[:3], pattern, q_sink=q_sink, sm_scale=scale, return_lse=True)
        return out.detach(), lse.detach(), torch.autograd.grad(out, leaves, dout.to(kind))

    out, lse, expected = eager(torch.float64)
    got = backward(
        embed(dout),
        *(embed(x) for x in inputs[:3]),
        embed(out.to(dtype)),
        lse.float(),
        q_sink=embed(inputs[3]) if bounded else None,
        scale=scale,
        block_size=pattern.block_size,
        window=pattern.window,
        sink=pattern.sink,
        grid_start=pattern.grid_start,
        **tiles,
    )
    assert bounded or got[3] is None
    return got[: len(inputs)], expected, eager(dtype)[2]


@pytest.mark.parametrize(
    ("n", "block_size", "window", "sink", "first_block", "heads", "kv_heads", "d", "bounded"), WITH_AND_WITHOUT_Q_SINK
)
def test_gradients_equal_autograd_and_read_nothing_outside_their_tensors(
    n, block_size, window, sink, first_block, heads, kv_heads, d, bounded
):
    pattern = BlockWindow(block_size, window, sink, first_block)
    got, expected, _ = gradients(pattern, heads, kv_heads, n, d, d**-0.5, bounded=bounded, tile_dkv=TILE, tile_dq=TILE)
    for x, y in zip(got, expected, strict=True):
        assert torch.isfinite(x).all()
        assert (x - y).norm() < 5e-6 * y.norm() + 2e-5 * n**0.5


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("tile", [Tile(32, 16, 4, 1), Tile(16, 64, 4, 2), Tile(64, 32, 4, 3)])
def test_gradients_do_not_depend_on_the_tile(tile, bounded):
    pattern = BlockWindow(24, 60, sink=5, first_block=9)
    got, expected, _ = gradients(pattern, 2, 1, 133, 16, 0.25, bounded=bounded, tile_dkv=tile, tile_dq=tile)
    for x, y in zip(got, expected, strict=True):
        assert relative_error(x, y) < 5e-6


@pytest.mark.parametrize("bounded", [False, True])
def test_a_negative_scale_is_served(bounded):
    got, expected, _ = gradients(
        BlockWindow(10, 25, sink=7), 1, 1, 40, 16, -0.5, bounded=bounded, tile_dkv=TILE, tile_dq=TILE
    )
    for x, y in zip(got, expected, strict=True):
        assert relative_error(x, y) < 5e-6


@pytest.mark.parametrize("bounded", [False, True])
def test_half_precision_gradients_are_no_worse_than_eager_attention(bounded):
    got, expected, eager = gradients(
        BlockWindow(20, 45, sink=4), 2, 1, 90, 24, 0.2, torch.float16, bounded, tile_dkv=TILE, tile_dq=TILE
    )
    for x, y, z in zip(got, expected, eager, strict=True):
        assert x.dtype == torch.float16
        assert_close(x, y, z)


@pytest.mark.parametrize("case", SINKS, ids=str)
def test_gradients_of_the_public_call_equal_the_reference_with_a_second_query(case):
    check_backward(case, torch.float32, "triton", bounded=True)


def test_gradients_have_the_layouts_of_their_inputs_and_an_expanded_dout_is_served():
    pattern = BlockWindow(20, 20)
    q, k, v = (torch.randn(1, 40, 2, 16).transpose(1, 2).requires_grad_() for _ in range(3))
    out, lse = block_window_reference(q, k, v, pattern, return_lse=True)
    expected = torch.autograd.grad(out.sum(), (q, k, v))
    ones = torch.ones(()).expand(out.shape)
    with torch.no_grad():
        *got, _ = backward(ones, q, k, v, out, lse, scale=0.25, block_size=20, window=20, sink=0, grid_start=0)
    for x, y, z in zip(got, expected, (q, k, v), strict=True):
        assert x.stride() == z.stride()
        assert torch.allclose(x, y, atol=1e-5)


def test_empty_input_gives_empty_gradients():
    x, lse = torch.empty(1, 2, 0, 16), torch.empty(1, 2, 0)
    got = backward(x, x, x, x, x, lse, q_sink=x, scale=1.0, block_size=4, window=4, sink=2, grid_start=0)
    assert [g.shape for g in got] == [x.shape] * 4
