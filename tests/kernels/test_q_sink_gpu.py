"""A second query for the sinks' columns in the portable kernels on a GPU, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Case, check_backward, check_decode, check_forward, check_prefill, qkv, second_query

import swba_kernels
from swba_kernels import BlockWindow

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ODD = [
    Case(BlockWindow(1, 40, 3), 131, head_dim=64),
    Case(BlockWindow(7, 9, 3), 200, heads=6, kv_heads=2, head_dim=8),
    Case(BlockWindow(63, 200, 75, 20), 1000, heads=4, kv_heads=1, head_dim=24),
    Case(BlockWindow(256, 600, 31), 1111, heads=3, kv_heads=3, head_dim=128),
    Case(BlockWindow(144, 432, 144), 144 * 7, head_dim=40),
    Case(BlockWindow(300, 777, 605, 17), 900, head_dim=128, batch=1),
    Case(BlockWindow(100, 250, 500), 777, heads=4, kv_heads=2, head_dim=256, batch=1),
    Case(BlockWindow(500, 500, 200), 130, head_dim=64, batch=3),
    Case(BlockWindow(129, 1290, 128), 1300, heads=2, kv_heads=1, head_dim=64, batch=1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_forward_and_gradients_equal_the_reference(case, dtype) -> None:
    check_forward(case, dtype, "triton", "cuda", bounded=True)
    check_backward(case, dtype, "triton", "cuda", bounded=True)


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_prefill_and_decode_equal_the_reference(case, dtype, impl) -> None:
    def decode(q, k_ring, v_ring, valid, lanes, **options):
        return swba_kernels.window_decode_attention(
            q, k_ring, v_ring, valid, lanes=lanes, return_lse=True, impl=impl, **options
        )

    fused = impl == "sdpa"
    for seed in range(3):
        check_prefill(case, dtype, impl, "cuda", seed=seed, spare=seed, bounded=True, fused=fused)
        check_decode(case, dtype, decode, "cuda", seed=seed, bounded=True, fused=fused)


@pytest.mark.parametrize("splits", [1, 2, 7, 64])
def test_any_number_of_splits(splits) -> None:
    from swba_kernels.portable import decode as kernel

    def call(q, k_ring, v_ring, valid, lanes, **options):
        return kernel.decode(q, k_ring, v_ring, valid, lanes, scale=q.shape[-1] ** -0.5, splits=splits, **options)

    for case in (ODD[3], ODD[5], ODD[8]):
        check_decode(case, torch.bfloat16, call, "cuda", bounded=True)


def test_repeats_are_bitwise_equal() -> None:
    p = BlockWindow(130, 500, 133)
    q, k, v = qkv(Case(p, 2000, heads=8, kv_heads=2, head_dim=128), torch.bfloat16, "cuda")
    inputs = [x.requires_grad_() for x in (q, k, v, second_query(q, p.sink)) if x is not None]
    seed = torch.randn_like(q)

    def run():
        q, k, v, q_sink = inputs
        out = swba_kernels.block_window_attention(q, k, v, p, q_sink=q_sink, impl="triton")
        valid = torch.tensor([1999, 700], device="cuda")
        rows = slice(130)
        one = swba_kernels.window_decode_attention(
            q[:, :, rows], k, v, valid, q_sink=q_sink[:, :, rows], sink=p.sink, impl="triton"
        )
        return (out, one, *torch.autograd.grad(out, inputs, seed))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)
