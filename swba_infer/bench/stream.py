"""Measure a model in the engine: milliseconds a frame over a long stream, and whether they stay flat.

A frame is everything from its noise to its pixels in host memory: the denoising steps, the commit, the copy.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..files import check_writable
from ..generator import VideoGenerator
from ..progress import track
from .clock import percentile
from .report import header, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `swba-infer bench stream`."""
    parser.add_argument("--model", default="freedoom", help="shipped model or model directory (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=200, help="frames to measure (default: %(default)s)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--steps", type=int, help="denoising steps a frame (default: the model's)")
    parser.add_argument("--impl", default="auto", help="implementation of our kernels (default: %(default)s)")
    parser.add_argument("--no-graph", action="store_true", help="do not capture the step in a CUDA graph")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--out", type=Path, help="JSON to write")


def run(args: argparse.Namespace) -> int:
    """Stream, print and write the measurement."""
    if args.frames < 10:
        raise ConfigError(f"frames: expected at least 10, got {args.frames}")
    out = check_writable(args.out) if args.out else None
    generator = VideoGenerator.from_pretrained(
        args.model,
        device=args.device,
        steps=args.steps,
        impl=args.impl,
        compile=args.compile,
        cuda_graph=not args.no_graph,
    )
    device = generator.engine.device
    report = {**header(device, args.argv), **measure(generator, args.frames)}
    print(
        f"{report['device']}: {report['frames_per_second']:.1f} frames/s, p50 {report['ms_p50']:.3f} ms, "
        f"p99 {report['ms_p99']:.3f} ms, first frame {report['ms_first']:.0f} ms"
    )
    print(
        f"last tenth / first tenth of the run: {report['last_over_first']:.3f}; cache {report['cache_bytes']:,} bytes"
        + (f"; reserved memory grew by {report['reserved_growth']:,} bytes" if device.type == "cuda" else "")
    )
    if out:
        write_json(out, report)
        print(f"wrote {out}")
    return 0


def measure(generator: VideoGenerator, frames: int) -> dict[str, Any]:
    """Return the timings of `frames` frames after the ring has filled."""
    stream_config, device = generator.engine.stream, generator.engine.device
    stream = generator.stream(actions=itertools.cycle(range(len(generator.actions))))
    started = time.perf_counter()
    next(stream)
    first = (time.perf_counter() - started) * 1e3
    for _ in range(stream_config.window_frames + stream_config.sink_frames + 3):
        next(stream)
    reserved = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
    milliseconds = []
    marks = time.perf_counter()
    for _ in track(itertools.islice(stream, frames), frames, "measuring"):
        now = time.perf_counter()
        milliseconds.append((now - marks) * 1e3)
        marks = time.perf_counter()
    tenth = max(1, frames // 10)
    first_tenth, last_tenth = percentile(milliseconds[:tenth], 0.5), percentile(milliseconds[-tenth:], 0.5)
    return {
        "frames": frames,
        "steps": generator.sampler.steps,
        "dtype": str(generator.engine.dtype).removeprefix("torch."),
        "frames_per_second": 1e3 * frames / sum(milliseconds),
        "ms_first": first,
        "ms_p50": percentile(milliseconds, 0.5),
        "ms_p99": percentile(milliseconds, 0.99),
        "ms_p50_first_tenth": first_tenth,
        "ms_p50_last_tenth": last_tenth,
        "last_over_first": last_tenth / first_tenth,
        "cache_bytes": generator.engine.cache.bytes,
        "reserved_growth": (torch.cuda.memory_reserved(device) if device.type == "cuda" else 0) - reserved,
    }
