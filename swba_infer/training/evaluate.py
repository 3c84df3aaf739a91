"""Measure a trained world on held-out episodes and draw contact sheets.

Next frame: the model continues real history by one frame at a time, against copying the last frame. Rollouts: many
streams at once run on their own pictures, half with the actions of the held-out episodes, half with random turns.

L lanes, F frames, T frames of a rollout.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bench.report import device_name, write_json
from ..checkpoint import load_model, resolve_directory
from ..device import pick_device
from ..engine import StreamingEngine
from ..errors import ConfigError
from ..files import replacing
from ..models.video_dit import patchify, unpatchify
from ..sampling import FlowSampler
from . import metrics
from .data import Episodes
from .record import FORWARD, FORWARD_LEFT, FORWARD_RIGHT, LEFT, RIGHT, WAIT

DESCRIPTION = """Measure a trained world on held-out episodes and draw contact sheets.

Next frame: the model continues real history by one frame at a time, against copying the last frame. Rollouts: many
streams at once run on their own pictures, half with the actions of the held-out episodes, half with random turns."""
SWEEP_STEPS = (1, 2, 3, 4)
SWEEP_SHIFTS = (1.0, 3.0)
SWEEP_NOISE = (0.0, 0.1)


class World:
    """Several streams of one model that run side by side.

    Args:
        engine: the streams, one a lane.
        sampler: how frames are drawn.
        seed: of the noise.
    """

    def __init__(self, engine: StreamingEngine, sampler: FlowSampler, seed: int = 0) -> None:
        self.engine, self.sampler, self.seed, self.block = engine, sampler, seed, 0
        self.size = engine.model.config
        self.weight = next(engine.model.parameters())
        self.lanes = len(engine.position)

    def start(self, frames: Tensor, actions: Tensor) -> None:
        """Begin again from history: uint8 frames [L, F, H, W, 3] and the action before each, [L, F]."""
        self.engine.reset()
        self.block = frames.shape[1]
        tokens = self._soil(patchify(frames, self.size.patch), -1)
        self.engine.prefill(tokens, timestep=self.sampler.context_noise, action=actions)

    def draw(self, actions: Tensor) -> Tensor:
        """Return the next frame of every lane after `actions` [L], uint8 [L, H, W, 3]; history stays as it is."""
        return self._pixels(self._draw(actions))

    def commit(self, frames: Tensor, actions: Tensor) -> None:
        """Append uint8 frames [L, H, W, 3] to the history."""
        self._commit(patchify(frames[:, None], self.size.patch), actions)

    def advance(self, actions: Tensor) -> Tensor:
        """Draw the next frame of every lane and append it; return it as uint8 [L, H, W, 3]."""
        tokens = self._draw(actions)
        self._commit(tokens, actions)
        return self._pixels(tokens)

    def _draw(self, actions: Tensor) -> Tensor:
        x = self._noise(0)
        times = self.sampler.times()
        for t, s in itertools.pairwise(times):
            clean = self.engine.step(x.to(self.weight.dtype), commit=False, timestep=t, action=actions).float()
            x = self.sampler.advance(x, clean, t, s)
        return x.clamp(-1, 1)

    def _commit(self, tokens: Tensor, actions: Tensor) -> None:
        self.engine.step(
            self._soil(tokens, self.sampler.steps), commit=True, timestep=self.sampler.context_noise, action=actions
        )
        self.block += 1

    def _noise(self, step: int, frames: int = 1) -> Tensor:
        shape = (frames * self.size.tokens_per_frame, self.size.token_channels)
        lanes = [
            self.sampler.noise(self.seed, i, self.block, step, shape, self.weight.device) for i in range(self.lanes)
        ]
        return torch.stack(lanes)

    def _soil(self, tokens: Tensor, step: int) -> Tensor:
        level = self.sampler.context_noise
        if level:
            tokens = torch.lerp(tokens, self._noise(step, tokens.shape[1] // self.size.tokens_per_frame), level)
        return tokens.to(self.weight.dtype)

    def _pixels(self, tokens: Tensor) -> Tensor:
        return unpatchify(tokens, self.size.height, self.size.width, self.size.patch, self.size.channels)[:, 0]


def history(episodes: Episodes, lanes: int, context: int, length: int) -> tuple[Tensor, Tensor]:
    """Cut one stretch of `context + length` frames for each lane from episodes long enough, in turn."""
    need = context + length
    fits = [(start, end) for start, end in episodes.bounds if end - start >= need]
    if not fits:
        raise ValueError(f"length: expected held-out episodes of at least {need} frames, got none")
    starts = []
    for lane in range(lanes):
        start, end = fits[lane % len(fits)]
        turns = -(-lanes // len(fits))
        starts.append(start + (end - start - need) * (lane // len(fits)) // max(1, turns - 1 or 1))
    index = torch.tensor(starts, device=episodes.frames.device)[:, None] + torch.arange(
        need, device=episodes.frames.device
    )
    return episodes.frames[index], episodes.actions[index]


def scripted_walk(lanes: int, length: int, seed: int, device: torch.device) -> Tensor:
    """Draw random segments of turns and steps ahead, int64 [L, T]."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.tensor([WAIT] + [FORWARD] * 7 + [LEFT] * 3 + [RIGHT] * 3 + [FORWARD_LEFT] * 3 + [FORWARD_RIGHT] * 3)
    walks = []
    for _ in range(lanes):
        walk: list[int] = []
        while len(walk) < length:
            kind = int(kinds[torch.randint(len(kinds), (1,), generator=generator)])
            walk += [kind] * int(torch.randint(3, 13, (1,), generator=generator))
        walks.append(walk[:length])
    return torch.tensor(walks, device=device)


def next_frame(world: World, frames: Tensor, actions: Tensor, context: int) -> dict[str, float]:
    """Measure one-frame predictions from real history: frames [L, F, H, W, 3], actions [L, F]."""
    world.start(frames[:, :context], actions[:, :context])
    ours, copied, moved = [], [], []
    for f in range(context, frames.shape[1]):
        ours.append(metrics.psnr(world.draw(actions[:, f]), frames[:, f]))
        copied.append(metrics.psnr(frames[:, f - 1], frames[:, f]))
        moved.append(actions[:, f] != WAIT)
        world.commit(frames[:, f], actions[:, f])
    model, copy, moving = torch.stack(ours), torch.stack(copied), torch.stack(moved) & (torch.stack(copied) < 45)
    return {
        "psnr": round(float(model.mean()), 3),
        "copy_psnr": round(float(copy.mean()), 3),
        "gain": round(float((model - copy).mean()), 3),
        "moving_psnr": round(float(model[moving].mean()), 3),
        "moving_copy_psnr": round(float(copy[moving].mean()), 3),
        "better_than_copy": round(float((model > copy).float().mean()), 4),
        "frames": model.numel(),
    }


def rollout(world: World, frames: Tensor, past: Tensor, actions: Tensor) -> Tensor:
    """Run every lane on its own pictures: context frames [L, F, ...], their actions [L, F], then actions [L, T].

    Returns:
        uint8 [L, T, H, W, 3]
    """
    world.start(frames, past)
    return torch.stack([world.advance(actions[:, t]) for t in range(actions.shape[1])], dim=1)


def statistics(frames: Tensor, bank: Tensor, real: Tensor) -> dict[str, Any]:
    """Describe streams [L, T, H, W, 3] against the thumbnails `bank` and the brightness distribution `real`."""
    flat = frames.flatten(0, 1)
    pixels = flat.float() / 255
    distance = metrics.nearest(flat, bank)
    lanes = torch.stack([(metrics.histogram(lane) - real).abs().sum() / 2 for lane in frames])
    return {
        "mean": [round(float(x), 4) for x in pixels.mean((0, 1, 2))],
        "deviation": [round(float(x), 4) for x in pixels.std((0, 1, 2))],
        "edge_energy": round(float(metrics.edge_energy(flat).mean()), 5),
        "histogram_distance": round(float(lanes.mean()), 4),
        "nearest_real": round(float(distance.mean()), 5),
        "nearest_real_p95": round(float(distance.quantile(0.95)), 5),
        "motion": round(float((frames[:, 1:].float() - frames[:, :-1].float()).abs().mean() / 255), 5),
    }


def contact_sheet(rows: list[tuple[str, Tensor]], path: Path, scale: int = 2) -> None:
    """Write labelled rows of frames [T, H, W, 3] as one picture."""
    from PIL import Image, ImageDraw

    height, width = (scale * x for x in rows[0][1].shape[1:3])
    count = max(len(frames) for _, frames in rows)
    sheet = Image.new("RGB", (110 + count * (width + 2), len(rows) * (height + 2)), (24, 24, 24))
    pen = ImageDraw.Draw(sheet)
    for r, (label, frames) in enumerate(rows):
        pen.multiline_text((6, r * (height + 2) + 6), label, fill=(230, 230, 230))
        for c, frame in enumerate(frames):
            image = Image.fromarray(frame.cpu().numpy()).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (110 + c * (width + 2), r * (height + 2)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        sheet.save(temporary)


class Evaluation:
    """Everything measured about one model directory.

    Args:
        model: directory of the model.
        data: folder with `held-*` and `train-*` shards.
        lanes, length, context: streams side by side, frames of the long rollout, real frames before it.
    """

    def __init__(
        self,
        model: Path,
        data: Path,
        out: Path,
        device: torch.device,
        dtype: torch.dtype,
        *,
        lanes: int = 16,
        length: int = 1000,
        context: int = 16,
        bank: int = 40_000,
    ) -> None:
        loaded = load_model(model, dtype=dtype, device=device)
        self.out, self.device, self.lanes, self.length, self.context = out, device, lanes, length, context
        self.sampler = FlowSampler.from_dict(loaded.config["sampler"])
        self.engine = StreamingEngine(loaded.model, loaded.stream, lanes=lanes, device=device, dtype=dtype)
        self.held = Episodes(data, "held", device)
        train = Episodes(data, "train", device)
        generator = torch.Generator().manual_seed(0)
        pick = torch.randperm(len(train.actions), generator=generator)[:bank].to(device)
        sample = train.frames.index_select(0, pick)
        self.bank, self.real = metrics.thumbnails(sample), metrics.histogram(sample[:5000])
        longest = max(end - start for start, end in self.held.bounds)
        self.stretch = min(length, longest - context, 400)
        self.facts = {
            "lanes": lanes,
            "frames": length,
            "context": context,
            "bank": len(pick),
            "device": device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
        }

    def references(self) -> dict[str, Any]:
        """Measure the real held-out episodes with the same instruments."""
        frames, actions = history(self.held, self.lanes, self.context, self.stretch)
        return {
            "turn_agreement": metrics.turn_agreement(frames, actions)._asdict(),
            **statistics(frames, self.bank, self.real),
        }

    def next_frame(self, sampler: FlowSampler, frames: int) -> dict[str, float]:
        """Measure next-frame predictions over `frames` frames a lane."""
        real, actions = history(self.held, self.lanes, self.context, min(frames, self.stretch))
        return next_frame(World(self.engine, sampler), real, actions, self.context)

    def rollout(self, sampler: FlowSampler, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Run all lanes for `length` frames; the first half replays real actions, the second half a scripted walk."""
        real, past = history(self.held, self.lanes, self.context, self.stretch)
        actions = scripted_walk(self.lanes, length, seed, self.device)
        replay = self.lanes // 2
        looped = past[:replay, self.context :].repeat(1, -(-length // self.stretch))
        actions[:replay] = looped[:, :length]
        world = World(self.engine, sampler, seed)
        return rollout(world, real[:, : self.context], past[:, : self.context], actions), actions

    def describe(self, frames: Tensor, actions: Tensor, pieces: int) -> dict[str, Any]:
        """Describe a rollout, as a whole and over time."""
        parts = frames.split(-(-frames.shape[1] // pieces), dim=1)
        half = self.lanes // 2
        return {
            "turn_agreement": metrics.turn_agreement(frames, actions)._asdict(),
            "turn_agreement_last": metrics.turn_agreement(parts[-1], actions[:, -parts[-1].shape[1] :])._asdict(),
            "replayed": statistics(frames[:half], self.bank, self.real),
            "scripted": statistics(frames[half:], self.bank, self.real),
            "over_time": [statistics(part, self.bank, self.real) for part in parts],
        }

    def sweep(
        self, samplers: Sequence[FlowSampler], length: int = 300, frames: int = 40, seconds: float = float("inf")
    ) -> list[dict[str, Any]]:
        """Compare samplers on short runs, with a sheet of two lanes each; start none after so many `seconds`."""
        table, rows = [], []
        columns = [int(x) for x in torch.linspace(0, length - 1, 10)]
        started = time.perf_counter()
        for sampler in samplers:
            begin = time.perf_counter()
            if table and begin - started > seconds:
                break
            run, actions = self.rollout(sampler, length)
            table.append(
                {
                    **sampler.to_dict(),
                    **{name: value for name, value in self.next_frame(sampler, frames).items() if "psnr" in name},
                    "turn_agreement": metrics.turn_agreement(run, actions).overall,
                    **statistics(run[:, length // 2 :], self.bank, self.real),
                    "seconds": round(time.perf_counter() - begin, 2),
                }
            )
            label = f"{sampler.steps} steps\nshift {sampler.shift}\nnoise {sampler.context_noise}"
            rows += [(f"{label}\nlane {i}", run[i, columns]) for i in (1, self.lanes - 1)]
        contact_sheet(rows, self.out / "sweep.png", scale=1)
        return table

    def run(self, *, sweep: bool = True) -> dict[str, Any]:
        """Measure everything and write metrics.json, contact.png, rollouts.png (and sweep.png)."""
        self.out.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {**self.facts, "real": self.references()}
        result["sampler"] = self.sampler.to_dict()
        result["next_frame"] = self.next_frame(self.sampler, 200)
        result["next_frame_one_step"] = self.next_frame(replace(self.sampler, steps=1), 100)
        begin = time.perf_counter()
        frames, actions = self.rollout(self.sampler, self.length)
        result["rollout_seconds"] = round(time.perf_counter() - begin, 2)
        result["rollout"] = self.describe(frames, actions, 10)
        self._sheets(frames)
        self._write(result)
        if sweep:
            choices = itertools.product(SWEEP_STEPS, SWEEP_SHIFTS, SWEEP_NOISE)
            result["sweep"] = self.sweep(
                [FlowSampler(steps=steps, shift=shift, context_noise=noise) for steps, shift, noise in choices]
            )
            self._write(result)
        return result

    def _write(self, result: dict[str, Any]) -> None:
        write_json(self.out / "metrics.json", result)

    def _sheets(self, frames: Tensor) -> None:
        real, _ = history(self.held, self.lanes, self.context, self.stretch)
        after = [t for t in (0, 1, 3, 7, 15, 31, 63, 127, 255) if t < min(self.stretch, self.length)]
        rows = []
        for lane in range(min(4, self.lanes // 2)):
            rows.append((f"real\nepisode {lane}", real[lane, [self.context + t for t in after]]))
            rows.append((f"generated\nsame actions\nafter {[t + 1 for t in after][:4]}...", frames[lane, after]))
        contact_sheet(rows, self.out / "contact.png")
        columns = [int(x) for x in torch.linspace(0, frames.shape[1] - 1, 12)]
        contact_sheet(
            [(f"stream {i}\nof {self.length} frames", frames[i, columns]) for i in range(self.lanes)],
            self.out / "rollouts.png",
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the evaluation's options."""
    parser.add_argument(
        "--model", default="runs/world/model", help="shipped model or model directory (default: %(default)s)"
    )
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="recorded episodes (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/world/eval"), help="folder for results (default: %(default)s)"
    )
    parser.add_argument("--lanes", type=int, default=16, help="streams side by side (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=1000, help="frames of the long rollout (default: %(default)s)")
    parser.add_argument("--context", type=int, default=16, help="real frames before it (default: %(default)s)")
    parser.add_argument("--no-sweep", action="store_true", help="leave out the comparison of samplers")
    parser.add_argument("--device", default=None, help="cuda or cpu (default: cuda if there is one)")


def run(args: argparse.Namespace) -> int:
    """Measure what the parsed options ask for."""
    for name in ("lanes", "frames", "context"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name}: expected at least 1, got {getattr(args, name)}")
    model = resolve_directory(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    device = pick_device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    evaluation = Evaluation(
        model, args.data, args.out, device, dtype, lanes=args.lanes, length=args.frames, context=args.context
    )
    with torch.inference_mode():
        result = evaluation.run(sweep=not args.no_sweep)
    print(json.dumps({name: result[name] for name in ("next_frame", "real", "rollout")}, indent=2))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the evaluation from the command line."""
    parser = argparse.ArgumentParser("swba-infer evaluate", description="Measure a trained world on held-out episodes.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
