"""`swba-infer generate`: stream a model into a video file."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from .actions import read_actions
from .bench.clock import percentile
from .checkpoint import load_context, resolve_directory
from .errors import ConfigError
from .files import check_writable
from .generator import VideoGenerator
from .progress import track
from .video import RESIZE, VideoWriter, contact_sheet, read_frames, require, resize_frames
from .wan.options import add_prompt_arguments, takes_prompt

DEMO_WALK = (
    "right*10, forward*16, left*12, forward*18, forward_left*8, forward*14, right*16, forward*16, forward_right*10, "
    "forward*16, left*20, forward*20, right*8, forward*20, left*16, forward*20"
)
SHEET_FRAMES, SHEET_COLUMNS = 24, 6

EXAMPLES = """examples:
  swba-infer generate --model freedoom --context demo --frames 240 --out out/stream.mp4 --sheet out/stream.png
  swba-infer generate --model freedoom --actions "forward*24, left*12, forward+right*8" --seed 7 --out walk.mp4
  swba-infer generate --model runs/world/model --context clip.mp4 --resize area --actions walk.txt --out walk.mp4
  swba-infer generate --model self-forcing --base Wan2.1-T2V-1.3B-Diffusers --prompt "a cat runs" --seconds 60
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `swba-infer generate`."""
    parser.add_argument("--model", default="freedoom", help="shipped model or model directory (default: %(default)s)")
    parser.add_argument(
        "--context",
        help="frames that come before: a video, an image, a directory of images (of these as many of the last as can "
        "matter), demo (recorded frames that ship with the model) or none (default: demo; none with a prompt)",
    )
    parser.add_argument("--resize", choices=RESIZE, help="resize context of another size (default: refuse it)")
    parser.add_argument(
        "--actions",
        help='script such as "forward*24, left*12", or a file with one script per line; repeated to fill --frames '
        "(default: a walk)",
    )
    parser.add_argument("--frames", type=int, help="frames to generate (default: the length of --actions, --seconds)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/stream.mp4"),
        help="video file; with a prompt it grows as NAME.partial.mp4 until it is complete (default: %(default)s)",
    )
    parser.add_argument("--sheet", type=Path, help="also write a contact sheet, a PNG")
    parser.add_argument("--scale", type=int, help="enlarge each pixel this many times (default: 4; 1 with a prompt)")
    parser.add_argument("--fps", type=float, help="of the video file (default: the model's)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--steps", type=int, help="denoising steps a frame (default: the model's)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile: slower to start, faster to run")
    parser.add_argument("--check", action="store_true", help="stop with an error at the first NaN or infinite number")
    add_prompt_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Generate; everything that can be refused is refused before the first frame is computed."""
    if takes_prompt(args):
        from .wan.generate import run_prompt

        return run_prompt(args)
    return _run_world(args)


def _run_world(args: argparse.Namespace) -> int:
    args.context = "demo" if args.context is None else args.context
    args.scale = 4 if args.scale is None else args.scale
    if args.frames is not None and args.frames < 1:
        raise ConfigError(f"frames: expected at least 1, got {args.frames}")
    sheet = None if args.sheet is None else check_writable(args.sheet)
    check_writable(args.out)
    if sheet is not None:
        require("PIL.Image")
        if sheet.resolve() == args.out.resolve():
            raise ConfigError(f"sheet: expected another file than the video, got {sheet} for both")
    directory = resolve_directory(args.model)
    started = time.perf_counter()
    generator = VideoGenerator.from_pretrained(
        directory, device=args.device, steps=args.steps, compile=args.compile, check_finite=args.check
    )
    script = read_actions(args.actions, generator.actions) if args.actions else _demo_walk(generator)
    frames = len(script) if args.frames is None else args.frames
    context, context_actions = _context(args, directory, generator)
    video = VideoWriter(args.out, fps=generator.fps if args.fps is None else args.fps, scale=args.scale)
    engine = generator.engine
    print(
        f"{args.model}: {generator.width}x{generator.height} pixels, {generator.sampler.steps} steps a frame, "
        f"on {engine.device} in {str(engine.dtype)[6:]}, loaded in {time.perf_counter() - started:.1f} s"
    )

    shown = {i * frames // SHEET_FRAMES for i in range(SHEET_FRAMES)}
    kept, labels, milliseconds = [], [], []
    stream = generator.stream(context, context_actions, actions=itertools.cycle(script), frames=frames, seed=args.seed)
    with video:
        before = time.perf_counter()
        for i, frame in enumerate(track(stream, frames, "streaming")):
            milliseconds.append((time.perf_counter() - before) * 1e3)
            video.write(frame)
            if i in shown:
                kept.append(frame)
                labels.append(f"{i} {generator.actions[script[i % len(script)]]}")
            before = time.perf_counter()
    if sheet is not None:
        contact_sheet(kept, SHEET_COLUMNS, sheet, labels, scale=max(1, args.scale // 2))

    first, rest = milliseconds[0], milliseconds[1:] or milliseconds
    print(
        f"{frames} frames: p50 {percentile(rest, 0.5):.2f} ms, p99 {percentile(rest, 0.99):.2f} ms a frame "
        f"({1e3 * len(rest) / sum(rest):.1f} frames/s), first frame {first:.0f} ms with the context's prefill"
    )
    print(f"cache: {engine.cache.bytes:,} bytes, the same at every frame")
    print("wrote " + " and ".join(str(path) for path in (args.out, sheet) if path is not None))
    return 0


def _demo_walk(generator: VideoGenerator) -> list[int]:
    try:
        return read_actions(DEMO_WALK, generator.actions)
    except ConfigError:
        return list(range(len(generator.actions)))


def _context(
    args: argparse.Namespace, directory: Path, generator: VideoGenerator
) -> tuple[np.ndarray | Tensor | None, Sequence[int] | Tensor | None]:
    if args.context == "none":
        return None, None
    if args.context == "demo":
        if not (directory / "context.safetensors").is_file():
            raise ConfigError(
                f"context: expected a model with recorded frames, got {directory}, which has none; "
                "--context takes a video, images or none"
            )
        return load_context(directory)
    frames = read_frames(args.context, limit=generator.context_frames)
    if args.resize and frames.shape[1:3] != (generator.height, generator.width):
        frames = resize_frames(frames, generator.height, generator.width, args.resize)
    if frames.shape[1:3] != (generator.height, generator.width):
        raise ConfigError(
            f"context: expected frames of {generator.width}x{generator.height} pixels, "
            f"got {frames.shape[2]}x{frames.shape[1]}; --resize area resizes them"
        )
    return frames, None
