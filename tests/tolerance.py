"""The bound every result has to keep: a small multiple of what torch's eager attention errs in the same dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ulp(dtype: torch.dtype, value: float) -> float:
    """Return the distance between neighbouring numbers of `dtype` at `value`."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.tiny)))


def rms(x: Tensor) -> float:
    """Return the root mean square."""
    return x.double().square().mean().sqrt().item()


def assert_close(actual: Tensor, oracle: Tensor, eager: Tensor, what: str = "out") -> None:
    """Compare with a float64 oracle.

    The RMS error may be twice that of `eager` (naive softmax in the dtype of `actual`, same input) plus one ulp at the
    RMS of the oracle; the largest error three times that of `eager` plus two ulp at the oracle's largest number. In
    float64, where eager is the oracle, torch's default tolerance holds instead.
    """
    assert oracle.dtype == torch.float64
    assert actual.dtype == eager.dtype
    assert actual.shape == oracle.shape == eager.shape, (what, actual.shape, oracle.shape, eager.shape)
    assert torch.isfinite(oracle).all(), f"{what}: the oracle is not finite"
    assert torch.isfinite(actual).all(), f"{what}: {int((~torch.isfinite(actual)).sum())} numbers are not finite"
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, oracle, msg=lambda m: f"{what}: {m}")
        return
    error, eager_error = actual.double() - oracle, eager.double() - oracle
    rms_bound = 2 * rms(eager_error) + ulp(actual.dtype, rms(oracle))
    max_bound = 3 * eager_error.abs().max().item() + 2 * ulp(actual.dtype, oracle.abs().max().item())
    assert rms(error) <= rms_bound, f"{what}: RMS error {rms(error):.3e}, allowed {rms_bound:.3e}"
    largest = error.abs().max().item()
    assert largest <= max_bound, f"{what}: largest error {largest:.3e}, allowed {max_bound:.3e}"


def assert_lse_close(actual: Tensor, oracle: Tensor) -> None:
    """Compare a float32 log-sum-exp with a float64 one: they come from exact products, summed in float32."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), oracle.double(), atol=3e-5, rtol=3e-6)
