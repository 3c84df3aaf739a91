"""Write a world's model card from what was measured: config.json, training.json and metrics.json beside the weights.

What no file says (the purpose, the licence of the assets, the limits) is the text below; everything with a number in it
is filled in, so that a card cannot disagree with its model.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import read_config, resolve_directory
from ..errors import ConfigError
from ..files import replacing

DATA = """Recorded by `swba-infer record` with ViZDoom{version} on its scenario `{scenario}`: rooms and corridors with
different walls. HUD, weapon and crosshair off; rendered at 320 x 240 and area-averaged to {width} x {height};
{frame_skip} game tics a frame; turns of {turn_degrees} degrees a tic; a random walk that keeps away from walls by the
depth buffer. Training: {episodes} episodes, {frames:,} frames, seeds 0 to {last}. Held out: {held_out_episodes}
episodes, {held_out_frames:,} frames, seeds from {held_out_first_seed:,} on. `context.safetensors` holds recorded frames
for a stream to start from."""
METHOD = """Flow matching on the clean frame (x-prediction), a noise level of its own for every frame; the other frames
of a sequence are its clean history, history with a little noise, or the model's own predictions. Attention and its
gradients by this project's kernels. The averaged weights ship. Every setting of every run is in `training.json`."""
LIMITS = """The model remembers its window; a room that has left it is invented again. Fine floor and wall texture is
softer than in the game (edge energy above). Walking into a wall for long ends in a plain picture until the next
turn. Nothing in it is suited to anything but demonstration and tests."""
LICENCE = """Weights: Apache-2.0, as the code. The recordings come from ViZDoom (code under the MIT licence), whose
wheel carries the Freedoom game data, "freely redistributable under the terms of the modified BSD license" (Freedoom
project). No licence statement was found for the scenario file `{scenario}.wad` itself."""


def model_card(
    name: str,
    config: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Any],
    record: Mapping[str, Any],
    speeds: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the card as Markdown.

    Args:
        config: config.json of the model.
        runs: those of training.json: what `train` said about each run, oldest first.
        measured: metrics.json of `evaluate`; its "comparison", if any, holds shorter runs of several samplers.
        record: record.json of the recordings.
        speeds: reports of `bench stream`, each with a "remark" where it needs one.
    """
    scenario = record["config"]["scenario"]
    parts = [
        f"# {name}: a small first-person world",
        _fill(_introduction(config, runs[-1]["parameters"])),
        "![real against generated](contact.png)",
        "Rows alternate: a held-out recording, and the stream with the same actions, 1, 2, 4, 8, 16, ... frames after\n"
        "its recorded context. What was seen in the window is continued; rooms behind corners are invented.",
        "## Data",
        _fill(DATA.format(**{**record["config"], **_data(record)})),
        f"    swba-infer record --out runs/data --episodes {record['episodes']} "
        f"--held-out {record['held_out_episodes']}",
        "## Training",
        _fill(METHOD),
        "\n".join(_run(number, run) for number, run in enumerate(runs, start=1)),
        "## Measured on held-out episodes",
        _fill(_conditions(config, measured)),
        _table(measured),
        *(_comparison(measured["comparison"]) if "comparison" in measured else []),
        *(["## Speed", "\n".join(_speed(report) for report in speeds)] if speeds else []),
        "## Limits",
        _fill(LIMITS),
        "## Licence",
        _fill(LICENCE.format(scenario=scenario)),
    ]
    return "\n\n".join(parts) + "\n"


def _fill(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def _data(record: Mapping[str, Any]) -> dict[str, Any]:
    names = ("episodes", "frames", "held_out_episodes", "held_out_frames", "held_out_first_seed")
    version = f" {record['vizdoom']}" if "vizdoom" in record else ""
    return {name: record[name] for name in names} | {"last": record["episodes"] - 1, "version": version}


def _introduction(config: Mapping[str, Any], parameters: int) -> str:
    model, stream, sampler = config["model"], config["stream"], config["sampler"]
    window, fps = stream["window_frames"], config["fps"]
    sinks = f"{stream['sink_frames']} sink frames" if stream["sink_frames"] else "no sinks"
    if stream["sink_frames"] and stream.get("sink_distance") == "bounded":
        sinks += " at a bounded distance"
    return (
        f"A {parameters / 1e6:.0f} M parameter diffusion transformer (`VideoDiT`: dim {model['dim']}, depth "
        f"{model['depth']}, {model['heads']} heads of {model['dim'] // model['heads']}, patches of {model['patch']} x "
        f"{model['patch']} pixels, {stream['tokens_per_frame']} tokens a frame) that continues {model['width']} x "
        f"{model['height']} pixel video of a first-person 3-D game, one frame at a time, steered by one of "
        f"{model['actions']} actions a frame. Window {window} frames ({window / fps:.1f} s at {fps} frames/s), "
        f"{sinks}, {_sampler(sampler)} and one commit a frame."
    )


def _sampler(sampler: Mapping[str, Any]) -> str:
    noise = f", history at noise level {sampler['context_noise']:g}" if sampler["context_noise"] else ""
    return f"{sampler['steps']} denoising steps (shift {sampler['shift']:g}{noise})"


def _conditions(config: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    text = (
        f"`swba-infer evaluate --lanes {measured['lanes']} --frames {measured['frames']}` on {measured['device']} "
        f"in {measured['dtype']}, {_sampler(measured['sampler'])}; all numbers are in `metrics.json`. The bank of real "
        f"frames is {measured['bank']:,} frames of training episodes."
    )
    if measured["sampler"] != config["sampler"]:
        text += " The model ships with another sampler, which was not measured at this length."
    return text


def _comparison(comparison: Mapping[str, Any]) -> list[str]:
    text = (
        f"Weights and samplers side by side: {comparison['lanes']} streams of {comparison['frames']} frames on "
        f"{comparison['device']} in {comparison['dtype']}, with the same contexts, actions and seeds, half of them "
        f"replayed and half scripted. The bank here is {comparison['bank']:,} frames, so that these distances cannot "
        "be compared with those above."
    )
    lines = [
        "| weights and sampler | left / right / straight / all | judged | edge energy | nearest real |",
        "|---|---|---|---|---|",
    ]
    for row in comparison["rows"]:
        turns = row["turn_agreement"]
        name = f"{row['weights']}, {_sampler(row['sampler'])}" if "sampler" in row else row["weights"]
        numbers = f"{turns['judged']:,} | {row['edge_energy']:.4f} | {row['nearest_real']:.4f}"
        lines.append(f"| {name} | {_agreement(turns)} | {numbers} |")
    remark = [_fill(comparison["remark"])] if "remark" in comparison else []
    return [_fill(text), "\n".join(lines), *remark]


def _agreement(turns: Mapping[str, Any]) -> str:
    return " / ".join(f"{100 * turns[side]:.1f}" for side in ("left", "right", "straight", "overall")) + "%"


def _run(number: int, run: Mapping[str, Any]) -> str:
    config = run["config"]
    start = f"from the weights of `{Path(config['init']).name}`" if config.get("init") else "from fresh weights"
    memory = f", {run['peak_gigabytes']} GiB at peak" if run["peak_gigabytes"] else ""
    rate = run["steps"] / run["seconds"]
    text = (
        f"{number}. {run['steps']:,} steps in {run['seconds']:,.1f} s ({rate:.1f} steps/s) on {run['device']}, torch "
        f"{run['torch']}, {start}: {run['training_frames']:,} recorded frames, sequences of {config['frames']} frames, "
        f"batch {config['batch']}, Muon {config['muon_lr']:g} and AdamW {config['adam_lr']:g} falling linearly to zero"
        f", EMA {config['ema']:g}, seed {config['seed']}; {run['warm_up_seconds']:.0f} s of compilation before{memory}."
    )
    return textwrap.fill(text, 120, subsequent_indent="   ", break_on_hyphens=False)


def _table(measured: Mapping[str, Any]) -> str:
    real, next_frame, rollout = measured["real"], measured["next_frame"], measured["rollout"]
    replayed, scripted = rollout["replayed"], rollout["scripted"]
    ours, theirs, last = rollout["turn_agreement"], real["turn_agreement"], rollout["turn_agreement_last"]

    def both(key: str, digits: int = 3) -> str:
        return f"{replayed[key]:.{digits}f} / {scripted[key]:.{digits}f}"

    steps = measured["sampler"]["steps"]
    rows = [
        (
            f"next frame, {steps} steps, PSNR over {next_frame['frames']:,} frames",
            f"{next_frame['psnr']:.1f} dB",
            f"{next_frame['copy_psnr']:.1f} dB by copying the last frame",
        ),
        ("next frame, 1 step", f"{measured['next_frame_one_step']['psnr']:.1f} dB", ""),
        ("frames better than the copy", f"{100 * next_frame['better_than_copy']:.1f}%", ""),
        (
            f"action agrees with the picture's horizontal motion, {measured['frames']:,}-frame rollouts of "
            f"{measured['lanes']} streams: left / right / straight / all",
            _agreement(ours),
            f"{_agreement(theirs)} on real frames",
        ),
        ("the same in the last tenth", _agreement(last), ""),
        (
            "frames too plain to judge the motion of",
            f"{ours['skipped']:,} of {ours['judged'] + ours['skipped']:,}",
            f"{theirs['skipped']:,} of {theirs['judged'] + theirs['skipped']:,}",
        ),
        (
            "distance to the nearest real frame, replayed actions / scripted walk",
            both("nearest_real"),
            f"{real['nearest_real']:.3f} between real episodes",
        ),
        ("its 95th percentile", both("nearest_real_p95"), f"{real['nearest_real_p95']:.3f}"),
        ("brightness histogram distance", both("histogram_distance", 2), f"{real['histogram_distance']:.2f}"),
        ("edge energy", both("edge_energy"), f"{real['edge_energy']:.3f}"),
        ("motion between frames", both("motion"), f"{real['motion']:.3f}"),
    ]
    lines = ["| what | generated | real or baseline |", "|---|---|---|"]
    return "\n".join(lines + [f"| {what} | {generated} | {reference} |" for what, generated, reference in rows])


def _speed(report: Mapping[str, Any]) -> str:
    remark = f"; {report['remark']}" if "remark" in report else ""
    text = (
        f"- {report['device']}, {report['dtype']}, one stream, {report['steps']} steps and a commit, "
        f"`{report['command']}`: {report['frames_per_second']:.1f} frames/s (p50 {report['ms_p50']:.2f} ms, "
        f"p99 {report['ms_p99']:.2f} ms){remark}"
    )
    return textwrap.fill(text, 120, subsequent_indent="  ", break_on_hyphens=False)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a readable JSON file, got {error}") from error


def main(argv: list[str] | None = None) -> int:
    """Write MODEL_CARD.md into a model directory."""
    parser = argparse.ArgumentParser("python -m swba_infer.training.card", description="Write a world's model card.")
    parser.add_argument("--model", required=True, help="model directory with training.json and metrics.json")
    parser.add_argument("--name", default=None, help="title (default: the directory's name)")
    parser.add_argument("--data", type=Path, default=Path("runs/data"), help="recordings (default: %(default)s)")
    parser.add_argument("--speed", type=Path, nargs="*", default=[], help="reports of `swba-infer bench stream`")
    args = parser.parse_args(argv)
    folder = resolve_directory(args.model)
    card = model_card(
        args.name or folder.resolve().name,
        read_config(folder),
        _read(folder / "training.json")["runs"],
        _read(folder / "metrics.json"),
        _read(args.data / "record.json"),
        [_read(path) for path in args.speed],
    )
    with replacing(folder / "MODEL_CARD.md") as path:
        path.write_text(card, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
