"""Time a whole Wan stream, decoder included, block by block for as long as asked: random weights of the full sizes.

A run may be saved at its end and gone on with by another, so that a long stream takes several short runs.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..config import SINK_DISTANCES, StreamConfig
from ..device import pick_device
from ..errors import ConfigError
from ..files import check_writable
from ..models.wan import compile_layers
from ..models.wan_config import PRESETS, WanConfig
from ..wan.extra import require
from ..wan.generator import WanGenerator
from ..wan.sampler import RenoisingSampler
from ..wan.synthetic import random_wan
from ..wan.vae import WanVAE
from .clock import percentile
from .report import header, write_json
from .wan_vae import MODELS

TINY = WanConfig(
    num_layers=2, num_attention_heads=1, attention_head_dim=16, ffn_dim=32, text_dim=8, text_len=4, freq_dim=16,
    latent_height=4, latent_width=6,
)  # fmt: skip
TINY_VAE = {"base_dim": 8, "num_res_blocks": 1}
SIZES = {**{name: preset() for name, preset in PRESETS.items()}, "tiny": TINY}
PARTS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the benchmark."""
    add_stream_arguments(parser)
    parser.add_argument("--blocks", type=int, default=100, help="blocks to draw (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    parser.add_argument("--decode-at-once", type=int, default=1, help="latent frames decoded together (default: 1)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--load", type=Path, help="go on with a stream that --save wrote")
    parser.add_argument("--save", type=Path, help="write the stream at the end")
    parser.add_argument("--out", type=Path, help="JSON to write")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    if args.blocks < 1:
        raise ConfigError(f"blocks: expected at least 1, got {args.blocks}")
    if args.load is not None and not args.load.is_file():
        raise ConfigError(f"load: expected a file that --save wrote, got {args.load}")
    stream = make_stream(args)
    for path in (args.save, args.out):
        if path is not None:
            check_writable(path)
    device = pick_device(args.device)
    generator, made_seconds = _make(args, stream, device)
    report = {**header(device, args.argv), "model": args.model, "load_s": made_seconds, **_measure(args, generator)}
    for part in report["parts"]:
        memory = f", {part['gpu_gib']:.2f} GiB on the GPU" if part["gpu_gib"] else ""
        print(
            f"blocks {part['first']} to {part['last']}: p50 {part['p50']:.2f} ms, p99 {part['p99']:.2f} ms, "
            f"{part['frames_per_second']:.2f} frames/s{memory}, {part['host_peak_gib']:.3f} GiB on the host"
        )
    print(
        f"{report['frames_per_second']:.2f} frames/s sustained; first frame {report['first_frame_ms']:.0f} ms after "
        f"loading, {report['warm_up_ms']:.0f} ms to warm up"
    )
    if args.out is not None:
        write_json(args.out, report)
        print(f"wrote {args.out}")
    return 0


def add_stream_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say which sizes and which stream, for `make_stream`."""
    parser.add_argument("--model", choices=sorted(SIZES), default="1.3B", help="which sizes (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=3, help="latent frames of a block (default: %(default)s)")
    parser.add_argument("--window", type=int, default=21, help="latent frames of the window (default: %(default)s)")
    parser.add_argument("--sinks", type=int, default=0, help="latent frames of the sinks (default: %(default)s)")
    parser.add_argument(
        "--sink-distance",
        choices=SINK_DISTANCES,
        default="growing",
        help="from which sinks are seen (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a block (default: %(default)s)")


def make_stream(args: argparse.Namespace) -> StreamConfig:
    """Return the stream of the options; raise ConfigError if it cannot be, or bounds the distance of no sinks."""
    if args.sink_distance != "growing" and not args.sinks:
        raise ConfigError(f"sink_distance: expected growing without sinks, got {args.sink_distance}")
    return StreamConfig(
        tokens_per_frame=SIZES[args.model].tokens_per_frame, frames_per_block=args.frames, window_frames=args.window,
        sink_frames=args.sinks, sink_distance=args.sink_distance,
    )  # fmt: skip


def _make(args: argparse.Namespace, stream: StreamConfig, device: torch.device) -> tuple[WanGenerator, float]:
    """Build the generator; return it with the seconds that took."""
    started = time.perf_counter()
    size = SIZES[args.model]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    compiled = not args.no_compile
    model = random_wan(size, device=device, dtype=dtype)
    if compiled:
        compile_layers(model)
    torch.manual_seed(0)
    fields: dict[str, Any] = TINY_VAE if args.model == "tiny" else MODELS["wan2.2" if size.channels == 48 else "wan2.1"]
    with torch.device(device):
        module = require("diffusers").AutoencoderKLWan(**fields).to(dtype)
    vae = WanVAE(module, compile=compiled, frames_at_once=args.decode_at_once)
    generator = WanGenerator(model, vae, stream, RenoisingSampler.with_steps(args.steps))
    return generator, time.perf_counter() - started


def _measure(args: argparse.Namespace, generator: WanGenerator) -> dict[str, Any]:
    """Warm up, fill the window, then time the blocks; what compiles does so before."""
    size = SIZES[args.model]
    prompt = torch.randn(size.text_len, size.text_dim, generator=torch.Generator().manual_seed(0))
    device = generator.engine.device
    started = time.perf_counter()
    _draw(generator, 2 + math.ceil((args.window + args.sinks) / args.frames), prompt)
    warm_up = 1e3 * (time.perf_counter() - started)
    generator.reset()
    first = _draw(generator, 1, prompt)[0]
    if args.load is not None:
        generator.load(args.load)
    else:
        _draw(generator, math.ceil((args.window + args.sinks) / args.frames), None)
    begin = generator.position[0] // args.frames
    parts = []
    total = 0.0
    size_of_part = max(1, math.ceil(args.blocks / PARTS))
    for start in range(0, args.blocks, size_of_part):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = _draw(generator, min(size_of_part, args.blocks - start), None)
        total += sum(times)
        parts.append(
            {
                "first": begin + start, "last": begin + start + len(times) - 1, "p50": percentile(times, 0.5),
                "p99": percentile(times, 0.99), "frames_per_second": 4e3 * args.frames * len(times) / sum(times),
                "gpu_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0,
                "host_peak_gib": _host_peak_bytes() / 2**30,
            }
        )  # fmt: skip
    if args.save is not None:
        generator.save(args.save)
    return {
        "pixels": [generator.height, generator.width],
        "stream": generator.engine.stream.to_dict(),
        "steps": args.steps,
        "warm_up_ms": warm_up,
        "first_frame_ms": first,
        "frames_per_second": 4e3 * args.frames * args.blocks / total,
        "memory": {**generator.engine.memory(), "decoder": generator.decoder.bytes},
        "parts": parts,
    }


def _draw(generator: WanGenerator, blocks: int, prompt: torch.Tensor | None) -> list[float]:
    """Return the milliseconds that each of the next blocks took until its frames were on the host."""
    made = generator.blocks(prompt)
    times = []
    for _ in range(blocks):
        before = time.perf_counter()
        next(made)
        times.append(1e3 * (time.perf_counter() - before))
    return times


def _host_peak_bytes() -> int:
    """Return the most memory that this process has held so far; a part that adds nothing leaves it as it was."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
