"""The training loop: one call trains, logs, saves its state, and leaves a model directory with the averaged weights.

Files in the output folder: model/ (config.json, bfloat16 safetensors, a few recorded frames to start from),
state.safetensors (to resume), log.jsonl (one line every few steps), train.json (configuration and outcome), loss.png.
All but the curve are written every few minutes as well, each as a whole, so that a killed run leaves a usable model.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bench.report import write_json
from ..checkpoint import load_model, resolve_directory, save_context, save_model
from ..context import FullSequence
from ..device import pick_device
from ..errors import ConfigError, NumericsError
from ..files import replacing
from ..models.video_dit import VideoDiT, compile_layers
from .config import PRESETS, TrainConfig, preset
from .data import Episodes, Windows
from .loss import flow_loss
from .optim import Average, build_optimizers
from .record import ACTIONS, TICS_PER_SECOND, RecordConfig
from .state import load_state, save_state


class Trainer:
    """A training run on one device.

    Args:
        config: the run.
        episodes: recorded episodes, on the device that trains.
        out: folder of the run.
        resume: go on from the state in `out`; weights, averages and optimisers are those of the state.
        overwrite: replace the run that `out` holds.

    Raises:
        ConfigError: data or weights of another shape, or `out` holds a run and neither `resume` nor `overwrite` is set.
        CheckpointError: damaged weights or state.
    """

    def __init__(
        self,
        config: TrainConfig,
        episodes: Episodes,
        out: Path | str,
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        _check_episodes(config, episodes)
        self.config, self.out = config, Path(out)
        if not resume:
            _check_vacant(self.out, overwrite)
        self.device = episodes.frames.device
        self.windows = Windows(episodes, config.frames)
        torch.manual_seed(config.seed)
        self.model = VideoDiT(config.model)
        if config.init and not resume:
            self.model.load_state_dict(initial_weights(config))
        self.model.to(self.device)
        self.out.mkdir(parents=True, exist_ok=True)
        if not resume:
            _clear(self.out)
        self.history = training_history(config.init) if config.init else []
        self.average = Average(self.model, config.ema, seeded=bool(config.init))
        self.optimizers = build_optimizers(self.model, config.muon_lr, config.adam_lr)
        self.generator = torch.Generator(self.device).manual_seed(config.seed + 1)
        self.step, self.seconds, self.warm_seconds, self.resumed = 0, 0.0, 0.0, resume
        if resume:
            numbers = load_state(
                self.out / "state.safetensors", self.model, self.optimizers, self.average, self.generator
            )
            self.step, self.seconds = numbers["step"], numbers["seconds"]
        if config.compile:
            compile_layers(self.model)

    def predict(self, tokens: Tensor, t: Tensor, actions: Tensor) -> Tensor:
        """Run the model over whole sequences."""
        context = FullSequence(self.config.stream, tokens.shape[0], tokens.shape[1], self.device)
        mixed = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        with mixed:
            return self.model(tokens, context, timestep=t, action=actions)

    @property
    def progress(self) -> float:
        """How far the run is, from 0 to 1, by steps or by the clock, whichever is further."""
        by_clock = self.seconds / (60 * self.config.minutes) if self.config.minutes else 0.0
        return min(1.0, max(self.step / self.config.steps, by_clock))

    def loss(self, own: int) -> Any:
        """Draw a batch and compute its losses."""
        config = self.config
        tokens, actions = self.windows.draw(config.batch, config.model.patch, self.generator)
        return flow_loss(self.predict, tokens, actions, config.model.actions, config.loss, self.generator, own)

    def warm_up(self) -> None:
        """Compile everything before the clock starts; weights and random state stay as they were."""
        state = self.generator.get_state()
        self.loss(self._own()).loss.backward()
        self.model.zero_grad(set_to_none=True)
        self.generator.set_state(state)

    def _own(self) -> int:
        return round(self.config.own * self.config.batch)

    def advance(self) -> dict[str, Tensor]:
        """Take one optimiser step and return its losses and gradient norm, still on the device."""
        config, progress = self.config, self.progress
        rate = min(1.0, (self.step + 1) / max(1, config.warmup)) * (1 - progress)
        losses = self.loss(self._own() if progress >= config.own_from else 0)
        losses.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.average.update(self.model, self.step)
        self.step += 1
        return {**{name: value.detach() for name, value in losses._asdict().items()}, "gradient": norm}

    def run(self, *, session: float | None = None, log_every: int = 20, quiet: bool = False) -> dict[str, Any]:
        """Train to the end, or for `session` minutes, and write the outcome; return what train.json holds.

        The averaged model and the state are also written every `export_minutes`. A run that stopped early goes on
        with `resume`; what it left is a model in the middle of its schedule.
        """
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        started = time.perf_counter()
        self.warm_up()
        self._wait()
        self.warm_seconds = time.perf_counter() - started
        begin, saved = time.perf_counter() - self.seconds, self.seconds
        every = 60 * self.config.export_minutes
        stop = self.seconds + 60 * session if session else float("inf")
        columns = (
            TextColumn("train"),
            BarColumn(),
            TextColumn("step {task.fields[step]} loss {task.fields[loss]:.4f} {task.fields[rate]:.1f} steps/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with (
            (self.out / "log.jsonl").open("a" if self.resumed else "w") as log,
            Progress(*columns, disable=quiet, refresh_per_second=0.5) as bar,
        ):
            task = bar.add_task("train", total=1.0, step=0, loss=float("nan"), rate=0.0)
            first, mark = self.step, time.perf_counter()
            while self.progress < 1 and self.seconds < stop:
                values = self.advance()
                if self.step % log_every == 0 or self.progress >= 1:
                    line = {name: round(float(value), 6) for name, value in values.items()}
                    if not math.isfinite(line["loss"]):
                        raise NumericsError(
                            f"step {self.step}: expected a finite loss, got {line['loss']}; "
                            "the state and the model are as they were last saved"
                        )
                    self.seconds = time.perf_counter() - begin
                    rate = (self.step - first) / max(1e-9, time.perf_counter() - mark)
                    line = {
                        "step": self.step,
                        "seconds": round(self.seconds, 2),
                        **line,
                        "steps_per_second": round(rate, 2),
                    }
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    if not quiet and not bar.console.is_terminal and self.step % (25 * log_every) == 0:
                        print(json.dumps(line), flush=True)
                    bar.update(task, completed=self.progress, step=self.step, loss=line["loss"], rate=rate)
                    if every and self.seconds - saved > every and self.progress < 1:
                        self.export()
                        self.save()
                        saved = self.seconds
                self.seconds = time.perf_counter() - begin
        self._wait()
        self.seconds = time.perf_counter() - begin
        summary = self.export()
        self.save()
        plot(self.out / "log.jsonl", self.out / "loss.png")
        return summary

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def save(self) -> None:
        """Write the state from which the run can go on."""
        numbers = {"step": self.step, "seconds": self.seconds, "config": self.config.to_dict()}
        save_state(self.out / "state.safetensors", self.model, self.optimizers, self.average, self.generator, numbers)

    def export(self) -> dict[str, Any]:
        """Write the averaged weights as a model directory, and train.json; return what that holds.

        Raises:
            NumericsError: NaN or infinity in the weights; what was written before stays.
        """
        finite = torch.stack([torch.isfinite(p).all() for p in self.average.tensors.values()])
        if not bool(finite.all()):
            raise NumericsError(f"step {self.step}: expected finite weights, got NaN or infinity; nothing was written")
        export(self.out / "model", self.config, self.average)
        if not (self.out / "model" / "context.safetensors").exists():
            frames, actions = self.windows.episodes.episode(0)
            first = self.config.stream.window_frames
            save_context(self.out / "model", frames[:first].cpu(), actions[:first].cpu())
        summary = self.summary()
        write_json(self.out / "model" / "training.json", {"runs": [*self.history, summary]})
        write_json(self.out / "train.json", summary)
        return summary

    def summary(self) -> dict[str, Any]:
        """Return the run's configuration and how far it came, as plain JSON."""
        episodes, cuda = self.windows.episodes, self.device.type == "cuda"
        return {
            "config": self.config.to_dict(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "warm_up_seconds": round(self.warm_seconds, 1),
            "training_frames": int(episodes.actions.numel()),
            "training_episodes": len(episodes.bounds),
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "torch": torch.__version__,
            "peak_gigabytes": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        }


def initial_weights(config: TrainConfig) -> dict[str, Tensor]:
    """Read the weights of `config.init` as float32; raise ConfigError unless its model is the one `config` trains."""
    loaded = load_model(resolve_directory(config.init), torch.float32, check_finite=True)
    theirs, ours = loaded.config["model"], config.model.to_dict()
    if different := {name: theirs[name] for name in ours if theirs[name] != ours[name]}:
        wanted = {name: ours[name] for name in different}
        raise ConfigError(f"init: expected a model with {wanted}, got {different} in {config.init}")
    return loaded.model.state_dict()


def training_history(name_or_dir: str) -> list[dict[str, Any]]:
    """Return the runs that made a model, oldest first, from its training.json; none if it has no such file."""
    path = resolve_directory(name_or_dir) / "training.json"
    return json.loads(path.read_text())["runs"] if path.is_file() else []


RUN_FILES = ("state.safetensors", "log.jsonl", "train.json", "loss.png")


def _check_vacant(out: Path, overwrite: bool) -> None:
    """Raise ConfigError if `out` holds a run that nobody asked to replace."""
    found = [name for name in (*RUN_FILES, "model") if (out / name).exists()]
    if found and not overwrite:
        raise ConfigError(
            f"out: expected a folder without a run, got {out} with {', '.join(found)}; "
            "--resume goes on with that run, --overwrite replaces it"
        )


def _clear(out: Path) -> None:
    """Remove what an older run could be taken up from; its model stays until this run has one."""
    for name in RUN_FILES:
        (out / name).unlink(missing_ok=True)


def _check_episodes(config: TrainConfig, episodes: Episodes) -> None:
    """Raise ConfigError unless the model is one for these frames and actions."""
    size = [config.model.height, config.model.width, config.model.channels]
    if list(episodes.frames.shape[1:]) != size:
        raise ConfigError(f"data: expected frames of the model's {size}, got {list(episodes.frames.shape[1:])}")
    low, high = (int(x) for x in episodes.actions.aminmax())
    if low < 0 or high >= config.model.actions:
        raise ConfigError(f"data: expected actions from 0 to {config.model.actions - 1}, got {low} to {high}")


def export(directory: Path, config: TrainConfig, average: Average, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the averaged weights as a model directory that `VideoGenerator.from_pretrained` reads."""
    content = {
        "architecture": "video_dit",
        "model": config.model.to_dict(),
        "stream": config.stream.to_dict(),
        "sampler": config.sampler.to_dict(),
        "actions": list(ACTIONS),
        "fps": round(TICS_PER_SECOND / RecordConfig().frame_skip, 2),
    }
    save_model(directory, content, {name: p.to(dtype) for name, p in average.tensors.items()}, overwrite=True)


def plot(log: Path, path: Path) -> None:
    """Draw the curves of a log, smoothed, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), constrained_layout=True)
    for name, label in (("loss", "weighted loss"), ("pure", "squared error at pure noise"), ("mean", "squared error")):
        smooth, values = None, []
        for line in lines:
            smooth = line[name] if smooth is None else 0.9 * smooth + 0.1 * line[name]
            values.append(smooth)
        axes.plot([line["step"] for line in lines], values, label=label)
    axes.set(xlabel="step", ylabel="squared error, pixels in [-1, 1]", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the trainer's options."""
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="recorded episodes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/world"), help="folder of the run (default: %(default)s)")
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default="world", help="configuration (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=None, help="wall-clock limit of the training itself")
    parser.add_argument("--session", type=float, default=None, help="stop after these minutes; --resume goes on")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps")
    parser.add_argument("--batch", type=int, default=None, help="sequences of a step")
    parser.add_argument("--muon-lr", type=float, default=None, help="peak learning rate of the hidden matrices")
    parser.add_argument("--adam-lr", type=float, default=None, help="peak learning rate of everything else")
    parser.add_argument("--seed", type=int, default=None, help="seed of weights, batches and noise")
    parser.add_argument("--device", default=None, help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    parser.add_argument("--init", default=None, help="start from the weights of a shipped model or a model directory")
    parser.add_argument("--export-minutes", type=float, default=None, help="write the model this often (0: at the end)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out, with the same options")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")


def run(args: argparse.Namespace) -> int:
    """Train what the parsed options ask for."""
    if args.resume and args.overwrite:
        raise ConfigError("resume: expected it without --overwrite, got both")
    device = pick_device(args.device)
    names = ("minutes", "steps", "batch", "muon_lr", "adam_lr", "seed", "init", "export_minutes")
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = preset(args.preset, **changes)
    if args.no_compile or device.type != "cuda":
        config = preset(args.preset, **changes, compile=False)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    started = time.perf_counter()
    episodes = Episodes(args.data, "train", device)
    print(
        f"{len(episodes.bounds)} episodes, {len(episodes.actions)} frames on {device} "
        f"({time.perf_counter() - started:.1f} s)",
        flush=True,
    )
    trainer = Trainer(config, episodes, args.out, resume=args.resume, overwrite=args.overwrite)
    summary = trainer.run(session=args.session)
    print(f"{summary['steps']} steps in {summary['seconds']} s, {summary['parameters']} parameters: {args.out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the training loop from the command line."""
    parser = argparse.ArgumentParser("swba-infer train", description="Train a world model on recorded episodes.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
