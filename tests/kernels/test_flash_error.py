"""What we err beside what FlashAttention-2 errs (torch's own) on the same input, both against float64.

The bound is an RMS error of 1.1 times FlashAttention's plus one ulp of the dtype. On a CPU torch's backend, beside
torch's FlashAttention for CPUs.

B batch, H heads, N tokens, S slots of the ring, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import Case, qkv
from tolerance import rms, ulp
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import swba_kernels
from swba_kernels import BlockWindow, reference

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")]
PATTERN = BlockWindow(333, 999)
TOKENS = 333 * 4 + 1  # a tail of one token
VALID = [1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 1000]

Tensors = tuple[Tensor, Tensor, Tensor]


def ordinary(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    return q, k, v


def large(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    return q * 30, k, v


def dominant(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    """Let one key of each 200 decide for many queries."""
    k[:, :, ::200] = 20 * q[:, :, :1].sign()
    return q, k, v


def equal(q: Tensor, k: Tensor, v: Tensor) -> Tensors:
    return q, torch.zeros_like(k), v


CASES = [  # device, implementation, dtype, inputs
    *(
        pytest.param("cuda", "hopper", dtype, change, marks=ON_GPU, id=f"hopper-{dtype}-{change.__name__}")
        for dtype in (torch.bfloat16, torch.float16)
        for change in (ordinary, large, dominant, equal)
    ),
    pytest.param("cpu", "sdpa", torch.bfloat16, ordinary, id="cpu-bfloat16-ordinary"),
    pytest.param("cpu", "sdpa", torch.float16, dominant, id="cpu-float16-dominant"),
]


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def assert_no_worse(ours: Tensor, theirs: Tensor, oracle: Tensor, what: str = "out") -> None:
    assert oracle.dtype == torch.float64
    assert ours.dtype == theirs.dtype != torch.float64
    assert ours.shape == theirs.shape == oracle.shape
    mine, flashs = (rms(x.double() - oracle) for x in (ours, theirs))
    bound = 1.1 * flashs + ulp(ours.dtype, rms(oracle))
    assert mine <= bound, f"{what}: RMS error {mine:.3e}, FlashAttention's {flashs:.3e}"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("device", "impl", "dtype", "change"), CASES)
def test_forward(device, impl, head_dim, dtype, change) -> None:
    q, k, v = change(*qkv(Case(PATTERN, TOKENS, head_dim=head_dim), dtype, device))
    ours = swba_kernels.block_window_attention(q, k, v, PATTERN, impl=impl)
    blocks = [(start, stop, max(0, stop - PATTERN.window)) for start, stop in PATTERN.blocks(TOKENS)]
    theirs = torch.cat([flash(q[:, :, a:b], k[:, :, low:b], v[:, :, low:b]) for a, b, low in blocks], dim=2)
    assert_no_worse(ours, theirs, reference.block_window_reference(*(x.double() for x in (q, k, v)), PATTERN))


@pytest.mark.parametrize(("head_dim", "n"), [(64, 333), (64, 64), (128, 333), (128, 64)])
@pytest.mark.parametrize(("device", "impl", "dtype", "change"), CASES)
def test_decode_of_lanes_of_every_length(device, impl, head_dim, n, dtype, change) -> None:
    """Row b sees VALID[b] slots: at the edges of key tiles, and one."""
    lanes = len(VALID)
    case = Case(BlockWindow(1000, 1000), 1000, head_dim=head_dim, batch=lanes)
    q, k, v = change(*qkv(case, dtype, device))
    q, k, v = q[:, :, :n], k.contiguous(), v.contiguous()
    valid = torch.tensor(VALID, device=device)
    ours = swba_kernels.window_decode_attention(q, k, v, valid, impl=impl)
    for b, filled in enumerate(VALID):
        row = (q[b : b + 1], k[b : b + 1, :, :filled], v[b : b + 1, :, :filled])
        oracle = F.scaled_dot_product_attention(*(x.double() for x in row))
        assert_no_worse(ours[b : b + 1], flash(*row), oracle, f"{filled} slots")


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("device", "impl", "dtype", "change"), CASES)
def test_gradients_of_one_block(device, impl, head_dim, dtype, change, deterministic) -> None:
    """One block that sees itself: FlashAttention-2 has no block windows, and sums over calls would round once more."""
    n = 700
    pattern = BlockWindow(n, n)
    inputs = change(*qkv(Case(pattern, n, head_dim=head_dim), dtype, device))
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9)).to(device, dtype)

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> Tensors:
        leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves), leaves, dout.to(dtype))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return swba_kernels.block_window_attention(q, k, v, pattern, impl=impl, deterministic=deterministic)

    oracle = gradients(F.scaled_dot_product_attention, torch.float64)
    for name, a, b, c in zip(("dq", "dk", "dv"), gradients(call, dtype), gradients(flash, dtype), oracle, strict=True):
        assert_no_worse(a, b, c, name)
