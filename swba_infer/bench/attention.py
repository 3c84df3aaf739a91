"""Measure this project's attention beside its peers: same tensors, same process, gate first, A B B A.

One run with `--shapes all` makes the tables of docs/benchmarks; `--shapes odd` measures what no kernel was tuned to.
Forward, prefill and decode count 4 D FLOPs per visible pair and head, the backward 2.5 times the forward.
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
from .clock import Timing, as_graph, check_budget, interleave, rulers
from .gate import Expected, check, expect
from .peers import OURS
from .report import header, plot_attention, summary, write_json
from .sensors import sensors
from .shapes import Shape, select

BACKWARD = 2.5
METHOD = (
    "random data; four turns of a quarter of the budget in A B B A order, each repeats one variant without a pause and "
    "counts from its middle on; medians per call, and of clock and power meanwhile (power: NVML's mean over its last "
    "period, up to a second, so in short turns that of all variants); caches not flushed; CUDA graph replay, 20 calls "
    "a graph below 0.2 ms; a training variant that cannot be captured is called eagerly (replayed: false); the forward "
    "keeps what a backward needs; loop-*: a dense call per block; rings are full unless the shape says how far they "
    "are filled; a prefill's peers get the keys that are seen in the order of time, not on a ring"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `swba-infer bench attention`."""
    parser.add_argument(
        "--shapes",
        help="comma-separated: all, training, prefill, decode, odd, odd-training, odd-decode, tiny, or parts of shape "
        "names (default: all on CUDA, else tiny)",
    )
    parser.add_argument("--peers", default="all", help="comma-separated variants, all, or none (default: %(default)s)")
    parser.add_argument(
        "--ours", default="all", help=f"comma-separated: {', '.join(OURS)}, or all (default: %(default)s)"
    )
    parser.add_argument("--impl", default="auto", help="what swba runs (default: %(default)s)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument(
        "--budget",
        type=float,
        default=1.6,
        help="seconds per variant and pass, in four turns; clocks settle in turns of 0.4 s (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, help="JSON to write; the plot goes beside it as .png")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; return 1 if one of our own variants fails its gate."""
    device = pick_device(args.device)
    shapes = select(args.shapes or ("all" if device.type == "cuda" else "tiny"))
    budget = check_budget(args.budget)
    out = check_writable(args.out) if args.out else None
    variants = {shape: _wanted(args.ours, args.peers, shape) for shape in shapes}
    report = {**header(device, args.argv), "method": METHOD, "no_sensors": sensors(device)[1], "rulers": rulers(device)}
    report |= {"results": [], "skipped": []}
    print(f"{report['device']}: " + ", ".join(f"{k} {v:.4g}" for k, v in report["rulers"].items()))
    if device.type == "cuda" and report["no_sensors"]:
        print(f"clock and power are not reported: {report['no_sensors']}")
    for shape in shapes:
        measure(shape, device, variants[shape], args.impl, budget, report)
        print(_table(shape, report), flush=True)
        if out:
            write_json(out, report)
    print("\n" + summary(report, OURS))
    if out and plot_attention(out.with_suffix(".png"), report):
        print(f"wrote {out} and {out.with_suffix('.png')}")
    failed = [row for row in report["skipped"] if row["variant"] in OURS and not row["unavailable"]]
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
        except peers.Unavailable as error:
            _skip(report, shape, "all", name, str(error), unavailable=True)
            continue
        except Exception as error:
            # Any peer may fail in its own way, to compile included, on a shape it does not serve: a finding, no crash.
            _skip(report, shape, "all", name, describe(error))
            continue
        if max(errors[name].values()) > 1:
            _skip(report, shape, "all", name, f"failed the correctness gate: error / bound = {errors[name]}")
            continue
        functions[name] = function
    if not functions:
        return
    if shape.kind != "training":
        makers = {name: partial(_forward, function, tensors, False) for name, function in functions.items()}
        _time(report, shape, shape.kind, makers, errors, device, budget, shape.flops)
        return
    makers = {name: partial(_forward, function, tensors, True) for name, function in functions.items()}
    makers.pop("hopper-fast", None)  # its forward is that of "hopper"
    _time(report, shape, "forward", makers, errors, device, budget, shape.flops)
    makers = {name: partial(_backward, function, tensors) for name, function in functions.items()}
    _time(report, shape, "backward", makers, errors, device, budget, BACKWARD * shape.flops)


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


def _forward(function: peers.Forward, tensors: Mapping[str, Tensor], requires_grad: bool) -> Callable[[], object]:
    return partial(function, *(tensors[name].detach().requires_grad_(requires_grad) for name in "qkv"))


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


def _calls(
    makers: Mapping[str, Callable[[], Callable[[], object]]], device: torch.device, report: dict[str, Any],
    shape: Shape, which: str,
) -> tuple[dict[str, tuple[Callable[[], object], int]], set[str]]:  # fmt: skip
    """Return what to time, and the names among it that replay a CUDA graph."""
    if device.type != "cuda":
        return {name: (make(), 1) for name, make in makers.items()}, set()
    calls, replayed = {}, set()
    for name, make in makers.items():
        try:
            calls[name] = as_graph(make)
            replayed.add(name)
        except Exception as error:  # as above: a peer may fail in its own way
            reason = f"cannot be captured: {describe(error)}"
            if which == "decode" or name in OURS:
                _skip(report, shape, which, name, reason)  # the launches of a short decode are not what is compared
            else:
                calls[name] = make(), 1
                print(f"{shape.name} {which} {name}: {reason}; called eagerly")
    return calls, replayed


def _time(
    report: dict[str, Any],
    shape: Shape,
    which: str,
    makers: Mapping[str, Callable[[], Callable[[], object]]],
    errors: Mapping[str, dict[str, float]],
    device: torch.device,
    budget: float,
    flops: float,
) -> None:
    calls, replayed = _calls(makers, device, report, shape, which)
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
                "sm_mhz": timing.sm_mhz,
                "watts": timing.watts,
                "replayed": name in replayed,
                "tflops": flops / timing.median / 1e9,
                "best_peer_over_this": best_peer / timing.median if best_peer else None,
                "error_over_bound": errors[name],
            }
        )


def _skip(report: dict[str, Any], shape: Shape, which: str, name: str, reason: str, unavailable: bool = False) -> None:
    row = {"shape": shape.name, "pass": which, "variant": name, "reason": reason, "unavailable": unavailable}
    report["skipped"].append(row)


def describe(error: Exception) -> str:
    """Return one line about a variant's failure: the type and the first line of the message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def _wanted(ours: str, others: str, shape: Shape) -> list[str]:
    """Return the variants that the options name for a shape, ours first."""
    every = {name for kind in ("training", "prefill", "decode") for name in peers.names(kind)}
    known = peers.names(shape.kind)
    chosen = _listed("ours", ours, set(OURS)) | _listed("peers", others, every - set(OURS))
    small = shape.tokens * shape.keys < 1 << 20
    return [name for name in known if name in chosen and (small or not (others == "all" and name.endswith("math")))]


def _listed(name: str, option: str, known: set[str]) -> set[str]:
    if option in ("all", "none"):
        return known if option == "all" else set()
    wanted = {part.strip() for part in option.split(",")}
    if not wanted <= known:
        raise ConfigError(f"{name}: expected all, none or some of {sorted(known)}, got {sorted(wanted - known)}")
    return wanted


def _table(shape: Shape, report: Mapping[str, Any]) -> str:
    lines = [f"\n{shape.name} {shape.dtype}"]
    for row in report["results"]:
        if row["shape"] == shape.name:
            ratio = row["best_peer_over_this"]
            lines.append(
                f"  {row['pass']:<9}{row['variant']:<16}{row['ms']:10.4f} ms "
                f" [{row['ms_p10']:.4f}, {row['ms_p90']:.4f}]{row['tflops']:9.1f} TFLOP/s"
                + (f"  {row['sm_mhz']:.0f} MHz {row['watts']:.0f} W" if row["watts"] else "")
                + (f"  x{ratio:.3f} of the best peer" if ratio else "")
            )
    for row in report["skipped"]:
        if row["shape"] == shape.name:
            lines.append(f"  {row['pass']:<9}{row['variant']:<16}skipped: {row['reason']}")
    return "\n".join(lines)
