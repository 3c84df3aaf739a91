"""Measure this project's attention beside its peers: same tensors, same process, gate first, A B B A.

Forward and decode count 4 D FLOPs per visible pair and head, the backward 2.5 times the forward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..device import pick_device
from ..errors import ConfigError
from ..files import check_writable
from . import peers
from .clock import Timing, as_graph, interleave, rulers
from .gate import Expected, check, expect
from .report import header, plot_attention, write_json
from .shapes import Shape, select

BACKWARD = 2.5
OURS = ("swba", "swba-full")
METHOD = (
    "random data; interleaved rounds in A B B A order; medians per call; caches not flushed; training: eager calls "
    "between CUDA events, the forward keeps what a backward needs; decode: CUDA graph replay with a full ring, 20 "
    "calls a graph below 0.2 ms"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `swba-infer bench attention`."""
    parser.add_argument(
        "--shapes",
        help="comma-separated: all, training, decode, tiny, or parts of shape names (default: all on CUDA, else tiny)",
    )
    parser.add_argument("--peers", default="all", help="comma-separated variants, all, or none (default: %(default)s)")
    parser.add_argument("--impl", default="auto", help="implementation of our kernels (default: %(default)s)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--budget", type=float, default=0.3, help="seconds per variant and pass (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON to write; the plot goes beside it as .png")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; return 1 if one of our own variants fails its gate."""
    device = pick_device(args.device)
    shapes = select(args.shapes or ("all" if device.type == "cuda" else "tiny"))
    out = check_writable(args.out) if args.out else None
    report = {**header(device, args.argv), "method": METHOD, "rulers": rulers(device), "results": [], "skipped": []}
    print(f"{report['device']}: " + ", ".join(f"{k} {v:.4g}" for k, v in report["rulers"].items()))
    for shape in shapes:
        measure(shape, device, _wanted(args.peers, shape), args.impl, args.budget, report)
        print(_table(shape, report), flush=True)
        if out:
            write_json(out, report)
    if out and plot_attention(out.with_suffix(".png"), report):
        print(f"wrote {out} and {out.with_suffix('.png')}")
    failed = [row for row in report["skipped"] if row["variant"] in OURS]
    for row in failed:
        print(f"FAILED {row['shape']} {row['pass']} {row['variant']}: {row['reason']}")
    return 1 if failed else 0


def measure(
    shape: Shape, device: torch.device, variants: Sequence[str], impl: str, budget: float, report: dict[str, Any]
) -> None:
    """Gate and time every variant of one shape; append rows to report["results"] and report["skipped"]."""
    torch.compiler.reset()  # FlexAttention compiles per shape; past Dynamo's limit it would silently run eagerly
    tensors = make_tensors(shape, device)
    expected = expect(shape, tensors)
    functions: dict[str, peers.Forward] = {}
    errors: dict[str, dict[str, float]] = {}
    for name in variants:
        try:
            function = peers.make(name, shape, tensors, impl)
            errors[name] = _gate(function, expected, tensors)
        except Exception as error:
            # Any peer may fail in its own way on a shape it does not serve: that is a finding, not our crash.
            _skip(report, shape, "all", name, f"{type(error).__name__}: {error}".splitlines()[0][:300])
            continue
        if max(errors[name].values()) > 1:
            _skip(report, shape, "all", name, f"failed the correctness gate: error / bound = {errors[name]}")
            continue
        functions[name] = function
    if not functions:
        return
    if shape.kind == "decode":
        calls = {name: partial(function, *(tensors[x] for x in "qkv")) for name, function in functions.items()}
        _time(report, shape, "decode", _graphs(calls, device, report, shape), errors, device, budget, shape.flops)
        return
    inputs = [tensors[x].detach().requires_grad_() for x in "qkv"]
    calls = {name: (partial(function, *inputs), 1) for name, function in functions.items()}
    _time(report, shape, "forward", calls, errors, device, budget, shape.flops)
    calls = {name: (_backward(function, tensors), 1) for name, function in functions.items()}
    _time(report, shape, "backward", calls, errors, device, budget, BACKWARD * shape.flops)


def make_tensors(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """Return random q, k, v (and dout for training) of a shape, from a fixed seed."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def random(heads: int, tokens: int) -> Tensor:
        sizes = (shape.batch, heads, tokens, shape.head_dim)
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    kv_heads = shape.kv_heads or shape.heads
    tensors = {"q": random(shape.heads, shape.tokens), "k": random(kv_heads, shape.keys)}
    tensors["v"] = random(kv_heads, shape.keys)
    if shape.kind == "training":
        tensors["dout"] = random(shape.heads, shape.tokens)
    return tensors


def _backward(function: peers.Forward, tensors: Mapping[str, Tensor]) -> Callable[[], object]:
    inputs = [tensors[name].detach().requires_grad_() for name in "qkv"]
    out = function(*inputs)
    return lambda: torch.autograd.grad(out, inputs, tensors["dout"], retain_graph=True)


def _gate(function: peers.Forward, expected: Expected, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    if "dout" not in tensors:
        return check(expected, {"out": function(tensors["q"], tensors["k"], tensors["v"])})
    inputs = [tensors[name].detach().requires_grad_() for name in "qkv"]
    out = function(*inputs)
    grads = torch.autograd.grad(out, inputs, tensors["dout"])
    return check(expected, {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))})


def _graphs(
    calls: Mapping[str, Callable[[], object]], device: torch.device, report: dict[str, Any], shape: Shape
) -> dict[str, tuple[Callable[[], object], int]]:
    if device.type != "cuda":
        return {name: (call, 1) for name, call in calls.items()}
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = as_graph(call)
        except RuntimeError as error:
            _skip(report, shape, "decode", name, f"cannot be captured: {error}".splitlines()[0][:300])
    return graphs


def _time(
    report: dict[str, Any],
    shape: Shape,
    which: str,
    calls: Mapping[str, tuple[Callable[[], object], int]],
    errors: Mapping[str, dict[str, float]],
    device: torch.device,
    budget: float,
    flops: float,
) -> None:
    timings: dict[str, Timing] = interleave(calls, device, budget)
    best_peer = min((t.median for name, t in timings.items() if name not in OURS), default=None)
    for name, timing in timings.items():
        report["results"].append(
            {
                "shape": shape.name,
                "dtype": shape.dtype,
                "pass": which,
                "variant": name,
                "ms": timing.median,
                "ms_p10": timing.p10,
                "ms_p90": timing.p90,
                "samples": timing.samples,
                "tflops": flops / timing.median / 1e9,
                "best_peer_over_this": best_peer / timing.median if best_peer else None,
                "error_over_bound": errors[name],
            }
        )


def _skip(report: dict[str, Any], shape: Shape, which: str, name: str, reason: str) -> None:
    report["skipped"].append({"shape": shape.name, "pass": which, "variant": name, "reason": reason})


def _wanted(option: str, shape: Shape) -> list[str]:
    known = peers.names(shape.kind)
    ours = [name for name in known if name in OURS]
    if option == "none":
        return ours
    if option == "all":
        return [name for name in known if not name.endswith("math") or shape.tokens * shape.keys < 1 << 20]
    wanted = [name.strip() for name in option.split(",")]
    every = peers.names("training") + peers.names("decode")
    unknown = [name for name in wanted if name not in every]
    if unknown:
        raise ConfigError(f"peers: expected all, none or some of {sorted(set(every))}, got {unknown}")
    return ours + [name for name in known if name in wanted and name not in ours]


def _table(shape: Shape, report: Mapping[str, Any]) -> str:
    lines = [f"\n{shape.name} {shape.dtype}"]
    for row in report["results"]:
        if row["shape"] == shape.name:
            ratio = row["best_peer_over_this"]
            lines.append(
                f"  {row['pass']:<9}{row['variant']:<16}{row['ms']:10.4f} ms "
                f" [{row['ms_p10']:.4f}, {row['ms_p90']:.4f}]{row['tflops']:9.1f} TFLOP/s"
                + (f"  x{ratio:.2f} of the best peer" if ratio else "")
            )
    for row in report["skipped"]:
        if row["shape"] == shape.name:
            lines.append(f"  {row['pass']:<9}{row['variant']:<16}skipped: {row['reason']}")
    return "\n".join(lines)
