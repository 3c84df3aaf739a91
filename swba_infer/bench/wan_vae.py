"""Time Wan's autoencoder as a stream decodes with it: milliseconds for a block of latent frames, random weights.

Variants run side by side: eager and compiled, one or all frames of a block at once, both memory layouts. Before the
clock starts the frames of each are compared with those of the first, which computes what diffusers does.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..device import pick_device
from ..errors import ConfigError, NumericsError
from ..files import check_writable
from ..wan.extra import require
from ..wan.vae import FRAMES_PER_LATENT, WanVAE
from .clock import check_budget, interleave, rulers
from .report import header, write_json

WAN_2_2: dict[str, Any] = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2, "in_channels": 12,
    "out_channels": 12, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {"wan2.1": {}, "wan2.2": WAN_2_2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the benchmark."""
    parser.add_argument("--model", choices=sorted(MODELS), default="wan2.1", help="which sizes (default: %(default)s)")
    parser.add_argument("--height", type=int, default=480, help="of the video (default: %(default)s)")
    parser.add_argument("--width", type=int, default=832, help="of the video (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=3, help="latent frames of a block (default: %(default)s)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled variants out")
    parser.add_argument(
        "--only", default="", help='variants with this in their name, such as "compiled, channels last"'
    )
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each variant (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON to write")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    device = pick_device(args.device)
    check_budget(args.budget)
    if args.frames < 1:
        raise ConfigError(f"frames: expected at least 1, got {args.frames}")
    _variants(args.frames, not args.no_compile, args.only)
    out = check_writable(args.out) if args.out else None
    report = {**header(device, args.argv), **measure(args, device)}
    for row in report["results"]:
        print(
            f"{row['variant']:<28} {row['ms']:8.2f} ms a block (p10 {row['p10']:.2f}, p90 {row['p90']:.2f}), "
            f"{row['frames_per_second']:.1f} frames/s, {row['fraction_of_floor']:.2f} of the floor, "
            f"compile {row['compile_s']:.0f} s, error {row['error']:.1e}"
        )
    print(f"{report['tflop']:.1f} TFLOP a block; a lane's cache {report['cache_bytes'] / 2**30:.2f} GiB")
    if out:
        write_json(out, report)
        print(f"wrote {out}")
    return 0


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return a block's time for each variant, its FLOPs, and the bytes of a lane's cache."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        module = require("diffusers").AutoencoderKLWan(**MODELS[args.model]).to(dtype).eval()
    modules = {False: module, True: copy.deepcopy(module)}
    scale = WanVAE(module, channels_last=False).scale
    for name in ("height", "width"):
        if (pixels := getattr(args, name)) < 1 or pixels % scale:
            raise ConfigError(f"{name}: expected a positive multiple of {scale} pixels, got {pixels}")
    shape = (1, module.config.z_dim, 1 + 2 * args.frames, args.height // scale, args.width // scale)
    latents = torch.randn(shape, device=device)
    calls: dict[str, tuple[Callable[[], object], int]] = {}
    notes: dict[str, dict[str, float]] = {}
    cache_bytes, flops = 0, 0
    for name, options in _variants(args.frames, not args.no_compile, args.only).items():
        vae = WanVAE(modules[options["channels_last"]], **options)
        first, cache = vae.decode(latents[:, :, :1])
        block, more = latents[:, :, 1 : 1 + args.frames], latents[:, :, 1 + args.frames :]
        started = time.perf_counter()
        second, cache = vae.decode(block, cache)
        if device.type == "cuda":
            torch.cuda.synchronize()
        compile_seconds = time.perf_counter() - started
        third, _ = vae.decode(more, cache)
        if not calls:
            exact = torch.cat((first, second, third), dim=2).float()
            cache_bytes = cache.bytes
            with FlopCounterMode(display=False) as counter:
                vae.decode(more, cache)
            flops = counter.get_total_flops()
        error = _error(torch.cat((first, second, third), dim=2), exact)
        if not error < 0.1:
            raise NumericsError(
                f"{name}: expected the frames of the first variant, got a relative error of {error:.2g}"
            )
        notes[name] = {"compile_s": compile_seconds, "error": error}
        calls[name] = (lambda vae=vae, block=more, cache=cache: vae.decode(block, cache), 1)
    timings = interleave(calls, device, budget=args.budget)
    ruler = rulers(device)
    floor = flops / ruler["matmul_bf16_tflops"] / 1e9
    rows = [
        {
            "variant": name, "ms": timing.median, "p10": timing.p10, "p90": timing.p90,
            "frames_per_second": 1e3 * FRAMES_PER_LATENT * args.frames / timing.median,
            "fraction_of_floor": floor / timing.median, **notes[name],
        }
        for name, timing in timings.items()
    ]  # fmt: skip
    return {
        "model": args.model,
        "size": [args.height, args.width],
        "latent_frames": args.frames,
        "dtype": str(dtype).removeprefix("torch."),
        "tflop": flops / 1e12,
        "floor_ms": floor,
        "cache_bytes": cache_bytes,
        "rulers": ruler,
        "results": rows,
    }


def _variants(frames: int, compiled: bool, only: str) -> dict[str, dict[str, Any]]:
    """Return the options of each variant, eager and contiguous first, which is always among them."""
    found: dict[str, dict[str, Any]] = {}
    names: list[str] = []
    for layout in (False, True):
        for compile_ in (False, True)[: 1 + compiled]:
            for at_once in dict.fromkeys((1, frames)):
                how = "compiled" if compile_ else "eager"
                name = f"{how}, {'channels last' if layout else 'contiguous'}, {at_once} at once"
                names.append(name)
                if not found or only in name:
                    found[name] = {"compile": compile_, "channels_last": layout, "frames_at_once": at_once}
    if not any(only in name for name in names):
        raise ConfigError(f"only: expected a part of one of {names}, got {only!r}")
    return found


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()
