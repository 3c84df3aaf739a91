"""The correctness gate: compare a variant with float64 before its clock starts.

One key/value head of one batch entry, with the query heads that share it, is computed block by block in float64, and
once more in the variant's own dtype: eager attention's error on this very input is the yardstick.
G query heads of the key/value head, N tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .shapes import Shape


class Expected(NamedTuple):
    """float64 tensors [N, D] per name, and the root-mean-square error a variant may have."""

    exact: dict[str, Tensor]
    bound: dict[str, float]


def expect(shape: Shape, tensors: Mapping[str, Tensor]) -> Expected:
    """Compute the expectation for the last head of the last batch entry of q, k, v (and dout for training)."""
    group = tensors["q"].shape[1] // tensors["k"].shape[1]
    head = {name: tensor[-1, -1] if name in "kv" else tensor[-1, -group:] for name, tensor in tensors.items()}
    exact = _attention(shape, {name: tensor.double() for name, tensor in head.items()})
    eager = _attention(shape, head)
    bound = {}
    for name, value in exact.items():
        ulp = torch.finfo(head["q"].dtype).eps * float(_rms(value))
        bound[name] = 2 * float(_rms(eager[name].double() - value)) + ulp
    return Expected(exact, bound)


def check(expected: Expected, got: Mapping[str, Tensor]) -> dict[str, float]:
    """Return error / bound per tensor; at most 1 passes. NaN compares as infinite."""
    ratios = {}
    for name, tensor in got.items():
        error = float(_rms(tensor[-1, -1].double() - expected.exact[name])) / expected.bound[name]
        ratios[name] = error if error == error else float("inf")
    return ratios


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _attention(shape: Shape, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    q, k, v = x["q"], x["k"], x["v"]  # [G, N, D], [N, D], [N, D]
    scale = shape.head_dim**-0.5
    if shape.kind == "decode":
        q, k, v = q[-1], k[: shape.visible], v[: shape.visible]
        return {"out": torch.softmax(q @ k.T * scale, dim=-1) @ v}
    out, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for start, end, spans in shape.blocks_and_keys():
        keys = torch.cat([torch.arange(*span, device=k.device) for span in spans])
        p = torch.softmax(q[:, start:end] @ k[keys].T * scale, dim=-1)
        out[:, start:end] = p @ v[keys]
        if "dout" in x:
            dout = x["dout"][:, start:end]
            dv[keys] += (p.mT @ dout).sum(0)
            ds = p * (dout @ v[keys].T - (dout * out[:, start:end]).sum(-1, keepdim=True)) * scale
            dq[:, start:end] = ds @ k[keys]
            dk[keys] += (ds.mT @ q[:, start:end]).sum(0)
    return {"out": out[-1], "dq": dq[-1], "dk": dk, "dv": dv} if "dout" in x else {"out": out[-1]}
