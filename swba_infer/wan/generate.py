"""`swba-infer generate` with a prompt: stream a causal Wan checkpoint into a video file, which grows as it streams."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..bench.clock import percentile
from ..device import pick_device
from ..errors import ConfigError
from ..progress import track
from ..video import VideoWriter, read_frames, resize_frames
from .generator import DEFAULT_FPS, WanGenerator
from .load import check_wan
from .options import parse_size
from .prompts import PromptSchedule, read_prompts
from .sampler import RenoisingSampler
from .text import EmbeddedPrompts, TextEncoder, read_embeds
from .vae import FRAMES_PER_LATENT

DEFAULT_SECONDS = 10.0
MAX_FRAMES = 10**12  # 2,000 years


class BlockClock:
    """Time blocks as they are made.

    Args:
        device: whose memory to show.
    """

    def __init__(self, device: torch.device) -> None:
        self.milliseconds: list[float] = []
        self.frames: list[int] = []
        self._device = device

    def time(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the blocks; what their reader does with them is not counted."""
        while True:
            before = time.perf_counter()
            block = next(blocks, None)
            if block is None:
                return
            self.milliseconds.append((time.perf_counter() - before) * 1e3)
            self.frames.append(len(block))
            yield block

    @property
    def rate(self) -> float:
        """Frames per second of the blocks after the first, or of the only one."""
        from_block = 1 if len(self.frames) > 1 else 0
        return 1e3 * sum(self.frames[from_block:]) / sum(self.milliseconds[from_block:])

    def note(self) -> str:
        """Return the median and the worst hundredth of the blocks after the first, and the device's memory."""
        steady = self.milliseconds[1:] or self.milliseconds
        if not steady:
            return ""
        text = f"p50 {percentile(steady, 0.5):.0f} ms, p99 {percentile(steady, 0.99):.0f} ms a block"
        if self._device.type == "cuda":
            text += f", {torch.cuda.max_memory_allocated(self._device) / 2**30:.1f} GiB"
        return text


def run_prompt(args: argparse.Namespace) -> int:
    """Generate; everything that can be refused is refused before the first block is drawn."""
    fps = DEFAULT_FPS if args.fps is None else args.fps
    scale = 1 if args.scale is None else args.scale
    video = VideoWriter(args.out, fps=fps, scale=scale, keep_partial=True)
    frames = _count_frames(args, fps)
    sampler = _sampler(args)
    if args.sink_distance == "bounded" and args.sinks in (None, 0):
        raise ConfigError("sinks: expected at least 1 with --sink-distance bounded, got 0")
    size = parse_size(args.size)
    check_wan(args.model)
    device = pick_device(args.device)
    base = Path(args.model) if args.base is None else args.base
    schedule = _read_schedule(args)
    started = time.perf_counter()
    prompts, negative = _encode_texts(args, schedule, base, device)
    generator = WanGenerator.from_pretrained(
        args.model, base, device=device, size=size, frames_per_block=_given(args.frames_per_block, 3),
        window_frames=_given(args.window, 21), sink_frames=_given(args.sinks, 0),
        sink_distance=args.sink_distance or "growing", compile=args.compile,
        sampler=sampler, fps=fps, check_finite=args.check,
    )  # fmt: skip
    if prompts is None:
        prompts = _read_embedded(args.prompt_embeds, generator)
    if _is_file(args.negative):
        negative = _read_embedded(Path(args.negative), generator).embeds[0]
    context = _context(args, generator)
    prompts.schedule.check_blocks(_block_begins(generator, frames, context), frames, fps)
    print(
        f"{args.model}: {generator.width}x{generator.height} pixels, {sampler.steps} steps a block, on {device} in "
        f"{str(generator.engine.dtype)[6:]}, loaded in {time.perf_counter() - started:.1f} s"
    )
    clock = BlockClock(generator.engine.device)
    blocks = generator.blocks(prompts, frames, seed=args.seed, context=context, negative=negative)
    try:
        with video, ThreadPoolExecutor(1) as pool:
            for _ in track(_written(clock.time(blocks), video, pool), frames, "streaming", note=clock.note):
                pass
    except BaseException:
        if video.frames and video.partial is not None and video.partial.is_file():
            print(f"kept {video.frames} frames in {video.partial}", file=sys.stderr)
        raise
    first = clock.milliseconds[0]
    print(f"{frames} frames: {clock.note()}, {clock.rate:.1f} frames/s; first block {first:.0f} ms")
    print(f"wrote {args.out}")
    return 0


def _written(blocks: Iterator[np.ndarray], video: VideoWriter, pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
    """Yield the frames of the blocks; each block is written while the next is made."""
    pending: Future[None] | None = None

    def write(block: np.ndarray) -> None:
        for frame in block:
            video.write(frame)

    for block in blocks:
        if pending is not None:
            pending.result()
        pending = pool.submit(write, block)
        yield from block
    if pending is not None:
        pending.result()


def _count_frames(args: argparse.Namespace, fps: float) -> int:
    if args.frames is not None and args.seconds is not None:
        raise ConfigError(f"seconds: expected none beside --frames, got {args.seconds:g}")
    seconds = DEFAULT_SECONDS if args.seconds is None else args.seconds
    if not math.isfinite(seconds) or seconds <= 0:
        raise ConfigError(f"seconds: expected a positive number, got {seconds:g}")
    if args.frames is None and seconds * fps > MAX_FRAMES:
        raise ConfigError(f"seconds: expected at most {MAX_FRAMES / fps:g}, got {seconds:g}")
    frames = max(1, round(seconds * fps)) if args.frames is None else args.frames
    if not 1 <= frames <= MAX_FRAMES:
        raise ConfigError(f"frames: expected at least 1 and at most {MAX_FRAMES}, got {frames}")
    return frames


def _sampler(args: argparse.Namespace) -> RenoisingSampler:
    guidance = 1.0 if args.guidance is None else args.guidance
    if (guidance != 1) != (args.negative is not None):
        raise ConfigError("negative: expected a prompt with a --guidance other than 1, and none without")
    if args.steps is None:
        return RenoisingSampler(guidance=guidance)
    return RenoisingSampler.with_steps(args.steps, guidance=guidance)


def _read_schedule(args: argparse.Namespace) -> PromptSchedule | None:
    if args.prompts is not None:
        return read_prompts(args.prompts)
    return None if args.prompt is None else PromptSchedule.single(args.prompt)


def _encode_texts(
    args: argparse.Namespace, schedule: PromptSchedule | None, base: Path, device: torch.device
) -> tuple[EmbeddedPrompts | None, Tensor | None]:
    """Encode what is text, before the other models are loaded; the encoder is dropped again."""
    texts = list(schedule.texts) if schedule is not None else []
    refused = [] if args.negative is None or _is_file(args.negative) else [args.negative]
    if not texts and not refused:
        return None, None
    with TextEncoder.from_pretrained(base, device) as encoder:
        embeds = encoder.encode_all(texts + refused)
    prompts = None if schedule is None else EmbeddedPrompts(schedule, embeds[: len(texts)])
    return prompts, embeds[-1] if refused else None


def _read_embedded(path: Path, generator: WanGenerator) -> EmbeddedPrompts:
    size = generator.engine.model.config
    return read_embeds(path, size.text_dim, size.text_len)


def _is_file(negative: str | None) -> bool:
    return negative is not None and negative.endswith(".safetensors")


def _context(args: argparse.Namespace, generator: WanGenerator) -> np.ndarray | None:
    """Return the last 1 + 4 n frames of what comes before, as many as there are."""
    if args.context in (None, "none"):
        return None
    if args.context == "demo":
        raise ConfigError("context: expected a video, images or none with a prompt, got demo")
    frames = read_frames(args.context)
    frames = frames[(len(frames) - 1) % FRAMES_PER_LATENT :]
    if args.resize and frames.shape[1:3] != (generator.height, generator.width):
        frames = resize_frames(frames, generator.height, generator.width, args.resize)
    if frames.shape[1:3] != (generator.height, generator.width):
        raise ConfigError(
            f"context: expected frames of {generator.width}x{generator.height} pixels, "
            f"got {frames.shape[2]}x{frames.shape[1]}; --resize area resizes them"
        )
    return frames


def _block_begins(generator: WanGenerator, frames: int, context: np.ndarray | None) -> range:
    """Return the frames with which blocks begin, counted as if the first of a stream were as long as the others."""
    block = FRAMES_PER_LATENT * generator.engine.stream.frames_per_block
    return range(0 if context is not None else 1 - FRAMES_PER_LATENT, frames, block)


def _given(value: int | None, default: int) -> int:
    return default if value is None else value
