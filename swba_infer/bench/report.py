"""Benchmarks produce data: a JSON with the machine, versions and command, and plots made from it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from ..files import replacing

PACKAGES = ("torch", "triton", "flash-attn", "flash-attn-4", "nvidia-cutlass-dsl", "nvidia-cudnn-frontend")


def versions() -> dict[str, str]:
    """Return the installed versions of what a result may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def device_name(device: torch.device) -> str:
    """Return the marketing name of a GPU, or the CPU's architecture and thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def header(device: torch.device, argv: Sequence[str]) -> dict[str, Any]:
    """Return what every report starts with."""
    return {
        "device": device_name(device),
        "versions": versions(),
        "command": shlex.join(["swba-infer", *argv]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report so that it appears whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def summary(report: Mapping[str, Any], ours: Sequence[str]) -> str:
    """Return a Markdown table: for each shape and pass the peers, then ours with its ratio, best peer's time / ours."""
    rows = report["results"]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    order = [name for name in variants if name not in ours] + [name for name in variants if name in ours]
    lines = ["| shape | pass | unit | " + " | ".join(order) + " |", "|---" * (3 + len(order)) + "|"]
    for shape, which in dict.fromkeys((row["shape"], row["pass"]) for row in rows):
        found = {row["variant"]: row for row in rows if (row["shape"], row["pass"]) == (shape, which)}
        cells = [_cell(found.get(name), which, name in ours) for name in order]
        lines.append(f"| {shape} | {which} | {'ms' if which == 'decode' else 'TFLOP/s'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None, which: str, with_ratio: bool) -> str:
    if row is None:
        return "-"
    value = f"{row['ms']:.4f}" if which == "decode" else f"{row['tflops']:.0f}"
    ratio = row["best_peer_over_this"]
    return f"{value} x{ratio:.2f}" if with_ratio and ratio else value


def plot_attention(path: Path, report: Mapping[str, Any]) -> bool:
    """Draw one bar per variant and shape in TFLOP/s; return False, with a line on stderr, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install swba-infer[train] brings matplotlib", file=sys.stderr)
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["results"]
    passes = [name for name in ("forward", "backward", "prefill", "decode") if any(row["pass"] == name for row in rows)]
    if not passes:
        return False
    known = list(dict.fromkeys(row["variant"] for row in rows))  # a variant has one colour in all panels
    most = max(len({row["shape"] for row in rows if row["pass"] == which}) for which in passes)
    size = (max(12.0, 1.5 * most), 3.6 * len(passes))
    figure, axes = pyplot.subplots(len(passes), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, which in zip(axes[:, 0], passes, strict=True):
        chosen = [row for row in rows if row["pass"] == which]
        shapes = list(dict.fromkeys(row["shape"] for row in chosen))
        variants = list(dict.fromkeys(row["variant"] for row in chosen))
        width = 0.8 / len(variants)
        for i, variant in enumerate(variants):
            points = [(shapes.index(row["shape"]), row["tflops"]) for row in chosen if row["variant"] == variant]
            xs = [x - 0.4 + (i + 0.5) * width for x, _ in points]
            color = f"C{known.index(variant)}"
            axis.bar(xs, [y for _, y in points], width, label=variant, color=color, zorder=2)
        axis.set_xticks(range(len(shapes)), [s.split("-", 1)[1].replace("-bs", "\nbs") for s in shapes], fontsize=7)
        axis.set_ylabel("TFLOP/s, visible pairs")
        axis.set_title(which, loc="left")
        axis.grid(axis="y", alpha=0.3, zorder=0)
        axis.legend(fontsize=8, ncols=4)
        axis.set_ylim(top=1.25 * max(row["tflops"] for row in chosen))
    figure.suptitle(f"{report['device']}, torch {report['versions'].get('torch')}", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
    return True
