"""The bounds of gradients: they admit what float32 sums have to cost, and no error of 1%."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Case, qkv
from tolerance import assert_close, cancellation, rms, ulp
from torch import Tensor

from swba_kernels import BlockWindow, reference

ONE_KEY = [Case(BlockWindow(64, 64), 1, head_dim=128, batch=3), Case(BlockWindow(1, 1), 200, head_dim=128)]
MANY_KEYS = [
    Case(BlockWindow(64, 192), 640, head_dim=64),
    Case(BlockWindow(256, 600, 31), 700, heads=4, kv_heads=2, head_dim=128, batch=1),
    Case(BlockWindow(63, 200, 75, 20), 500, heads=4, kv_heads=1, head_dim=24),
]
PARAMETERS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


def draw(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    inputs = qkv(case, dtype)
    return *inputs, torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9)).to(dtype)


def gradients(case: Case, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return dq and dk of the reference."""
    *inputs, dout = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(reference.block_window_reference(*leaves, case.pattern), leaves, dout)[:2]


def floors(case: Case, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return cancellation(*tensors, case.pattern, case.head_dim**-0.5)


def sum_in_turn(a: Tensor, b: Tensor, terms: int) -> Tensor:
    """Return the sum of a * b over the head dim in float32: exact sums of `terms` products, added one after another."""
    parts = (a.double() * b.double()).unflatten(-1, (-1, terms)).sum(-1).float()
    total = torch.zeros_like(parts[..., 0])
    for i in range(parts.shape[-1]):
        total = total + parts[..., i]
    return total


@PARAMETERS
@pytest.mark.parametrize("case", ONE_KEY, ids=str)
def test_gradients_of_a_lone_key_may_be_what_two_orders_of_a_sum_leave(case, dtype) -> None:
    q, k, v, dout = tensors = draw(case, dtype)
    left = sum_in_turn(dout, v, 16) - sum_in_turn(dout, v, 1)
    scaled = case.head_dim**-0.5 * left[..., None]
    exact, eager = gradients(case, *(x.double() for x in tensors)), gradients(case, *tensors)
    for name, x, other, oracle, e, floor in zip(
        ("dq", "dk"), (q, k), (k, q), exact, eager, floors(case, tensors), strict=True
    ):
        actual = (scaled * other).to(dtype)
        assert rms(actual)
        assert_close(actual, oracle, e, name, floor)
        with pytest.raises(AssertionError, match=f"{name}: RMS error"):
            assert_close(actual, oracle, e, name)
        with pytest.raises(AssertionError, match=f"{name}: RMS error"):
            assert_close(actual + 1e-5 * x, oracle, e, name, floor)


@PARAMETERS
@pytest.mark.parametrize("case", MANY_KEYS, ids=str)
def test_among_many_keys_it_admits_no_more_than_eager_attention_does(case, dtype) -> None:
    """An error of 1%, in bfloat16 of 2%, is refused; the floor is 1/1000 of an ulp of bfloat16 at most."""
    tensors = draw(case, dtype)
    exact, eager = gradients(case, *(x.double() for x in tensors)), gradients(case, *tensors)
    error = {torch.bfloat16: 0.02, torch.float16: 0.01, torch.float32: 1e-5}[dtype]
    for name, oracle, e, floor in zip(("dq", "dk"), exact, eager, floors(case, tensors), strict=True):
        assert_close(e, oracle, e, name, floor)
        assert rms(floor) < 1e-3 * ulp(torch.bfloat16, rms(oracle))
        with pytest.raises(AssertionError, match=f"{name}: RMS error"):
            assert_close((e.double() * (1 + error)).to(dtype), oracle, e, name, floor)


@pytest.mark.parametrize("heads", [2, 4])
def test_the_floor_is_what_float32_sums_are_seen_to_cost(heads) -> None:
    """float32 sums in turn stand for a kernel's: their error is below the floor's deviation, and not far below."""
    case = Case(BlockWindow(16, 48, 5), 200, heads=heads, kv_heads=2, head_dim=128)
    q, k, v, dout = tensors = draw(case, torch.float32)
    group, scale = heads // 2, case.head_dim**-0.5
    keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
    hidden = ~case.pattern.mask(case.n)
    p = torch.softmax((q.double() @ keys.double().mT * scale).masked_fill(hidden, float("-inf")), dim=-1)
    out = (p @ values.double()).float()
    dp = sum_in_turn(dout[:, :, :, None], values[:, :, None], 16)
    delta = sum_in_turn(dout, out, 1)
    exact = dout.double() @ values.double().mT - (dout.double() * out.double()).sum(-1, keepdim=True)
    error = p * ((dp - delta[..., None]).double() - exact) * scale
    dq = error @ keys.double()
    dk = (error.mT @ q.double()).unflatten(1, (2, group)).sum(2)
    for actual, floor in zip((dq, dk), floors(case, tensors), strict=True):
        assert 0.1 < rms(actual) / rms(floor) < 1
        assert actual.abs().max() < 3 * floor.max()
