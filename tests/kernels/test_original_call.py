"""`attention(q, k, v, bs, ws, sm_scale)`: the call of the project this one grew from, and the limits it lifts."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close

import swba_kernels
from swba_kernels import BlockWindow, reference


def naive(q, k, v, bs: int, ws: int, sm_scale: float):
    """Masked softmax with the mask written as block numbers, independent of BlockWindow."""
    block = torch.arange(q.shape[2], device=q.device) // bs
    hidden = (block[None, :] > block[:, None]) | (block[None, :] <= block[:, None] - ws)
    scores = (q @ k.transpose(-1, -2) * sm_scale).masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def compare(shape, bs: int, ws: int, sm_scale: float, dtype: torch.dtype, device: str = "cpu") -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v, dout = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))

    def run(function, cast):
        inputs = [cast(x).requires_grad_() for x in (q, k, v)]
        out = function(*inputs, bs, ws, sm_scale)
        return (out.detach(), *torch.autograd.grad(out, inputs, cast(dout)))

    actual = run(swba_kernels.attention, lambda x: x.clone())
    oracle = run(naive, lambda x: x.double())
    eager = run(naive, lambda x: x.clone())
    for name, a, o, e in zip(("out", "dq", "dk", "dv"), actual, oracle, eager, strict=True):
        assert_close(a, o, e, name)


@pytest.mark.slow
def test_the_original_parameters_with_one_head() -> None:
    compare((1, 1, 4096, 64), 256, 4, 64**-0.5, torch.float16)


@pytest.mark.gpu
def test_the_original_parameters() -> None:
    compare((4, 12, 4096, 64), 256, 4, 64**-0.5, torch.float16, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_dtype_and_block_size(dtype) -> None:
    compare((2, 3, 102, 40), 17, 3, 0.3, dtype)


def test_a_short_last_block_sees_the_same_number_of_tokens() -> None:
    q, k, v = (torch.randn(2, 3, 101, 40) for _ in range(3))
    out = swba_kernels.attention(q, k, v, 17, 3, 0.3)
    whole = naive(q[:, :, :85], k[:, :, :85], v[:, :, :85], 17, 3, 0.3)
    torch.testing.assert_close(out[:, :, :85], whole)
    weights = torch.softmax(q[:, :, 85:] @ k[:, :, 50:].transpose(-1, -2) * 0.3, dim=-1)
    torch.testing.assert_close(out[:, :, 85:], weights @ v[:, :, 50:])


def test_the_same_call_with_a_pattern() -> None:
    q, k, v = (torch.randn(1, 2, 50, 16) for _ in range(3))
    a = swba_kernels.attention(q, k, v, 8, 3, 0.5)
    b = swba_kernels.block_window_attention(q, k, v, BlockWindow(8, 24), sm_scale=0.5)
    assert torch.equal(a, b)
    torch.testing.assert_close(a, reference.block_window_reference(q, k, v, BlockWindow(8, 24), sm_scale=0.5))


def test_bad_block_sizes_are_named() -> None:
    x = torch.randn(1, 1, 8, 8)
    with pytest.raises(ValueError, match="bs: expected at least 1, got 0"):
        swba_kernels.attention(x, x, x, 0, 1, 1.0)
    with pytest.raises(TypeError, match="ws: expected an int"):
        swba_kernels.attention(x, x, x, 4, 1.5, 1.0)  # type: ignore[arg-type]
