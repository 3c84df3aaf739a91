"""The portable forward kernel under Triton's interpreter, against the float64 oracle, inside poisoned memory."""

from __future__ import annotations

import pytest
import torch

from swba_kernels.pattern import BlockWindow
from swba_kernels.reference import block_window_reference, prefill_reference

pytest.importorskip("triton")

from poison import embed, relative_error
from small_problems import TILE, WITH_AND_WITHOUT_Q_SINK
from tolerance import assert_close

from swba_kernels.portable.forward import Ring, forward
from swba_kernels.portable.tiles import Tile


def run(pattern: BlockWindow, q, k, v, **options):
    return forward(
        q,
        k,
        v,
        block_size=pattern.block_size,
        window=pattern.window,
        sink=pattern.sink,
        grid_start=pattern.grid_start,
        **options,
    )


def tensors(heads: int, kv_heads: int, n: int, d: int, dtype=torch.float32, batch: int = 2):
    torch.manual_seed(n * d + heads)
    return [torch.randn(batch, h, n, d).to(dtype) for h in (heads, kv_heads, kv_heads)]


def second(q, bounded: bool):
    """Return q_sink as the kernel gets it and as the oracle does."""
    if not bounded:
        return None, None
    q_sink = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).to(q.dtype)
    return embed(q_sink), q_sink.double()


@pytest.mark.parametrize(
    ("n", "block_size", "window", "sink", "first_block", "heads", "kv_heads", "d", "bounded"), WITH_AND_WITHOUT_Q_SINK
)
def test_forward_equals_the_reference_and_reads_nothing_outside_its_tensors(
    n, block_size, window, sink, first_block, heads, kv_heads, d, bounded
):
    pattern = BlockWindow(block_size, window, sink, first_block)
    q, k, v = tensors(heads, kv_heads, n, d)
    own, oracle = second(q, bounded)
    out, lse = run(pattern, embed(q), embed(k), embed(v), scale=d**-0.5, tile=TILE, q_sink=own)
    expected, expected_lse = block_window_reference(
        q.double(), k.double(), v.double(), pattern, q_sink=oracle, return_lse=True
    )
    assert relative_error(out, expected) < 2e-6
    assert relative_error(lse, expected_lse) < 2e-6


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("tile", [Tile(32, 16, 4, 1), Tile(16, 64, 4, 2), Tile(64, 32, 4, 3)])
def test_the_result_does_not_depend_on_the_tile(tile, bounded):
    pattern = BlockWindow(24, 60, sink=5, first_block=9)
    q, k, v = tensors(2, 1, 133, 16)
    own, oracle = second(q, bounded)
    out, lse = run(pattern, embed(q), embed(k), embed(v), scale=0.25, tile=tile, q_sink=own)
    expected, expected_lse = block_window_reference(
        q.double(), k.double(), v.double(), pattern, q_sink=oracle, return_lse=True
    )
    assert relative_error(out, expected) < 2e-6
    assert relative_error(lse, expected_lse) < 2e-6


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
def test_any_scale_is_served(scale, bounded):
    pattern = BlockWindow(10, 25, sink=7)
    q, k, v = tensors(1, 1, 40, 16, batch=1)
    own, oracle = second(q, bounded)
    out, lse = run(pattern, q, k, v, scale=scale, tile=TILE, q_sink=own)
    expected, expected_lse = block_window_reference(
        q.double(), k.double(), v.double(), pattern, q_sink=oracle, sm_scale=scale, return_lse=True
    )
    assert relative_error(out, expected) < 1e-5
    assert relative_error(lse, expected_lse) < 1e-5


def test_half_precision_is_no_worse_than_eager_attention():
    pattern = BlockWindow(20, 45, sink=4)
    q, k, v = tensors(2, 1, 90, 24, torch.float16)
    out, _ = run(pattern, embed(q), embed(k), embed(v), scale=24**-0.5, tile=TILE)
    expected = block_window_reference(q.double(), k.double(), v.double(), pattern)
    eager = block_window_reference(q, k, v, pattern)
    assert out.dtype == torch.float16
    assert_close(out, expected, eager)


def test_rows_with_strides_that_are_no_multiple_of_eight_are_served():
    pattern = BlockWindow(20, 45)
    q, k, v = (x[..., :16] for x in tensors(1, 1, 60, 19, batch=1))
    out, _ = run(pattern, q, k, v, scale=0.25, tile=TILE)
    expected = block_window_reference(q.double(), k.double(), v.double(), pattern)
    assert relative_error(out, expected) < 2e-6


def test_columns_that_are_not_adjacent_are_served():
    pattern = BlockWindow(20, 45)
    q, k, v = (x.transpose(2, 3) for x in tensors(1, 1, 16, 60, batch=1))
    out, _ = run(pattern, q, k, v, scale=0.25, tile=TILE)
    expected = block_window_reference(q.double(), k.double(), v.double(), pattern)
    assert relative_error(out, expected) < 2e-6


def test_out_has_the_layout_of_q():
    q, k, v = (x.transpose(1, 2) for x in tensors(40, 40, 2, 16, batch=1))
    out, lse = run(BlockWindow(20, 20), q, k, v, scale=0.25, tile=TILE)
    assert out.stride() == q.stride()
    assert lse.shape == (1, 2, 40)
    assert lse.is_contiguous()


def test_empty_input_gives_empty_output():
    q, k, v = tensors(1, 1, 0, 16)
    out, lse = run(BlockWindow(4, 8), q, k, v, scale=0.25)
    assert out.shape == (2, 1, 0, 16)
    assert lse.shape == (2, 1, 0)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("history", [0, 1, 5, 30, 64, 200])
@pytest.mark.parametrize(
    ("block_size", "window", "sink", "first_block"), [(8, 40, 0, 0), (7, 33, 5, 2), (16, 40, 37, 3), (30, 30, 7, 0)]
)
def test_prefill_sees_the_ring_history_of_its_lane_and_nothing_else(
    history, block_size, window, sink, first_block, bounded
):
    pattern = BlockWindow(block_size, window, sink, first_block)
    capacity, n = sink + window, 37
    q, k, v = tensors(2, 1, n, 16)
    position = torch.tensor([history, max(0, history - 3)])
    lanes = torch.tensor([2, 0])
    rings = [torch.full((3, 1, capacity, 16), float("nan")) for _ in range(2)]
    for ring in rings:
        for b in range(2):
            written = min(int(position[b]), capacity)
            ring[lanes[b], :, :written] = torch.randn(1, written, 16)
    ring = Ring(embed(rings[0]), embed(rings[1]), position, lanes)
    own, oracle = second(q, bounded and sink > 0)
    out, lse = run(pattern, embed(q), embed(k), embed(v), scale=0.25, tile=TILE, ring=ring, q_sink=own)
    double = [x.double() for x in (q, k, v)]
    expected, expected_lse = prefill_reference(
        *double, pattern, rings[0].double(), rings[1].double(), position, lanes=lanes, q_sink=oracle, return_lse=True
    )
    assert relative_error(out, expected) < 2e-6
    assert relative_error(lse, expected_lse) < 2e-6


def test_prefill_without_lanes_reads_the_lane_of_its_row_and_serves_positions_past_int32():
    pattern = BlockWindow(8, 24, sink=3)
    q, k, v = tensors(1, 1, 16, 16)
    rings = [torch.randn(2, 1, 27, 16) for _ in range(2)]
    far = 2**40 * 24
    out, lse = run(pattern, q, k, v, scale=0.25, tile=TILE, ring=Ring(*rings, torch.tensor([far + 50, far + 7])))
    near = torch.tensor([24 * 9 + 50, 24 * 9 + 7])
    expected, expected_lse = run(pattern, q, k, v, scale=0.25, tile=TILE, ring=Ring(*rings, near, torch.tensor([0, 1])))
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
