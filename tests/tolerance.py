"""The bound every result has to keep: a small multiple of what torch's eager attention errs in the same dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swba_kernels import BlockWindow


def ulp(dtype: torch.dtype, value: float) -> float:
    """Return the distance between neighbouring numbers of `dtype` at `value`."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.tiny)))


def rms(x: Tensor) -> float:
    """Return the root mean square."""
    return x.double().square().mean().sqrt().item()


def cancellation(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, pattern: BlockWindow, scale: float, q_sink: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Return the error of each number of dq [B, H, N, D] and dk [B, Hkv, N, D] that summing in float32 has to cost.

    With q_sink that of dq_sink [B, H, N, D] comes third.

    dS = P (dP - delta), where dP = dO V^T and delta = dO . O are sums of D products. Where a query sees one key, or
    weighs one alone, O is its V, and what is left of dP - delta = 0 is the rounding of two sums in different orders;
    eager attention sums P dP over keys instead, is exactly 0 there, and tells nothing of it.

    Each of D additions rounds by u = 2^-24 of the sum so far at most. With signs at random that sum is up to
    |dO| |V| / sqrt(D), and sqrt(D) such roundings are what D of them come to: u |dO| |V| for dP, u |dO| |O| for delta.
    Independent errors add up in squares, through dS and then through dq = scale dS K and dk = scale dS^T Q:
    var(dS) = P^2 u^2 |dO|^2 (|V|^2 + |O|^2), var(dq) = scale^2 var(dS) K^2, var(dk) = scale^2 var(dS)^T Q^2.
    """
    q, k, v, dout = (x.detach().double() for x in (q, k, v, dout))
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
    sinks = pattern.sink if q_sink is not None else 0
    second = q if q_sink is None else q_sink.detach().double()
    scores = torch.cat([second @ keys[:, :, :sinks].mT, q @ keys[:, :, sinks:].mT], dim=-1) * scale
    scores = scores.masked_fill(~pattern.mask(q.shape[2], q.device), float("-inf"))
    p = torch.softmax(scores, dim=-1)
    of_dout, of_v, of_out = (x.square().sum(-1) for x in (dout, values, p @ values))
    variance = p.square() * of_dout[..., None] * (of_v[..., None, :] + of_out[..., None])
    of_sinks, of_window = variance[..., :sinks], variance[..., sinks:]
    dq = (of_window @ keys[:, :, sinks:].square()).sqrt()
    dq_sink = (of_sinks @ keys[:, :, :sinks].square()).sqrt()
    dk = torch.cat([of_sinks.mT @ second.square(), of_window.mT @ q.square()], dim=2)
    dk = dk.unflatten(1, (k.shape[1], group)).sum(2).sqrt()
    unit = abs(scale) * torch.finfo(torch.float32).eps / 2
    return (unit * dq, unit * dk) if q_sink is None else (unit * dq, unit * dk, unit * dq_sink)


def assert_close(actual: Tensor, oracle: Tensor, eager: Tensor, what: str = "out", floor: Tensor | None = None) -> None:
    """Compare with a float64 oracle.

    The RMS error may be twice that of `eager` (naive softmax in the dtype of `actual`, same input) plus one ulp at the
    RMS of the oracle; the largest error three times that of `eager` plus two ulp at the oracle's largest number. An
    error that eager attention does not know, `floor`, counts like its own: see `cancellation`. In float64, where eager
    is the oracle, torch's default tolerance holds instead.
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
    known = torch.zeros_like(oracle) if floor is None else floor
    assert known.shape == oracle.shape, (what, known.shape, oracle.shape)
    rms_bound = 2 * (rms(eager_error) + rms(known)) + ulp(actual.dtype, rms(oracle))
    max_bound = 3 * (eager_error.abs().max().item() + known.max().item())
    max_bound += 2 * ulp(actual.dtype, oracle.abs().max().item())
    assert rms(error) <= rms_bound, f"{what}: RMS error {rms(error):.3e}, allowed {rms_bound:.3e}"
    largest = error.abs().max().item()
    assert largest <= max_bound, f"{what}: largest error {largest:.3e}, allowed {max_bound:.3e}"


def assert_lse_close(actual: Tensor, oracle: Tensor) -> None:
    """Compare a float32 log-sum-exp with a float64 one: they come from exact products, summed in float32."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), oracle.double(), atol=3e-5, rtol=3e-6)
