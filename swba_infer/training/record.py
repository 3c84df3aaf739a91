"""Record first-person gameplay with ViZDoom: frames, and the action that led to each.

Frame t is the picture AFTER action t: a model that is to draw frame t knows the frames before it and action t. Frame 0
of an episode follows one no-op, so its action is 0 as well.

Everything is keyed by the episode's seed (spawn point, walk), so the same seeds give the same pictures, in however many
processes. Seeds from `HELD_OUT_SEED` on are never used for training.

T frames, H height, W width.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError

TICS_PER_SECOND = 35
DESCRIPTION = """Record first-person gameplay with ViZDoom, without a window or a network: frames, and the action
that led to each of them.

The same seeds give the same pictures. Training episodes take seeds from 0 on, held-out episodes from 1,000,000 on."""
HELD_OUT_SEED = 1_000_000
ACTIONS = ("wait", "forward", "left", "right", "forward_left", "forward_right")
WAIT, FORWARD, LEFT, RIGHT, FORWARD_LEFT, FORWARD_RIGHT = range(6)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordConfig:
    """What is recorded.

    Args:
        scenario: name of a scenario in the ViZDoom wheel.
        width, height: size of the recorded frames in pixels; the screen is drawn at 320x240 and reduced by area, which
            spares the model the flicker of unfiltered textures.
        frame_skip: game tics (1/35 s) per frame; the action is held for all of them.
        turn_degrees: degrees a turning action turns per tic.
        frames: frames of an episode; an episode that reaches the goal before is shorter.
    """

    scenario: str = "my_way_home"
    width: int = 96
    height: int = 72
    frame_skip: int = 3
    turn_degrees: float = 2.5
    frames: int = 600

    def __post_init__(self) -> None:
        for name in ("width", "height", "frame_skip", "frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")


def _check_scenario(name: str) -> None:
    import vizdoom

    known = sorted(path.stem for path in Path(vizdoom.scenarios_path).glob("*.cfg"))
    if name not in known:
        raise ConfigError(f"scenario: expected one of {known}, got {name!r}")


def open_game(config: RecordConfig) -> Any:
    """Return an initialised, windowless `vizdoom.DoomGame`; close it after use."""
    import vizdoom

    game = vizdoom.DoomGame()
    game.load_config(os.path.join(vizdoom.scenarios_path, f"{config.scenario}.cfg"))
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X240)
    game.set_depth_buffer_enabled(True)
    for switch in (
        game.set_render_hud,
        game.set_render_weapon,
        game.set_render_crosshair,
        game.set_render_decals,
        game.set_render_particles,
        game.set_render_messages,
    ):
        switch(False)
    game.set_available_buttons([vizdoom.Button.MOVE_FORWARD, vizdoom.Button.TURN_LEFT_RIGHT_DELTA])
    game.set_episode_timeout(0)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.init()
    return game


class Walk:
    """Choose actions: random segments that favour walking ahead, steered away from walls by the depth buffer.

    Each episode draws its own temper (how often it stands and turns, how boldly it walks into things), so that the
    recordings hold walks of many kinds, a few blocked ones included.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.turning = float(rng.uniform(0.15, 0.45))
        self.caution = float(rng.uniform(0.75, 0.98))
        self.near = float(rng.uniform(6.0, 18.0))
        self.action = WAIT
        self.left_over = 0
        self.escaping = False

    def next(self, depth: np.ndarray) -> int:
        """Return the next action from the depth picture [H, W], which grows with distance."""
        rows = depth[depth.shape[0] // 2 - 8 : depth.shape[0] // 2 + 8]
        left, ahead, right = (float(part.mean()) for part in np.array_split(rows, 3, axis=1))
        ahead = min(ahead, float(rows[:, rows.shape[1] // 2 - 16 : rows.shape[1] // 2 + 16].mean()))
        if self.escaping:
            if ahead > 1.5 * self.near or self.left_over <= 0:
                self.escaping, self.left_over = False, 0
        elif ahead < self.near and self.action not in (LEFT, RIGHT) and self.rng.random() < self.caution:
            self.escaping, self.left_over = True, int(self.rng.integers(8, 25))
            toward_left = left > right if self.rng.random() < 0.8 else self.rng.random() < 0.5
            self.action = LEFT if toward_left else RIGHT
        if self.left_over <= 0:
            self.draw(left, right)
        self.left_over -= 1
        return self.action

    def draw(self, left: float, right: float) -> None:
        """Draw the next segment's action and length."""
        rng, kind = self.rng, self.rng.random()
        toward_left = left > right if rng.random() < 0.4 else rng.random() < 0.5
        if kind < 0.04:
            self.action, self.left_over = WAIT, int(rng.integers(1, 5))
        elif kind < 0.04 + 0.5 * self.turning:
            self.action, self.left_over = (LEFT if toward_left else RIGHT), int(rng.integers(3, 16))
        elif kind < 0.04 + 1.3 * self.turning:
            self.action, self.left_over = (FORWARD_LEFT if toward_left else FORWARD_RIGHT), int(rng.integers(2, 9))
        else:
            self.action, self.left_over = FORWARD, int(rng.integers(3, 18))


def record_episode(game: Any, config: RecordConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Play one episode.

    Returns:
        uint8 frames [T, H, W, 3] and int64 actions [T], T at most `config.frames`.
    """
    from PIL import Image

    game.set_seed(seed)
    game.new_episode()
    walk = Walk(np.random.default_rng(seed))
    frames = np.empty((config.frames, config.height, config.width, 3), np.uint8)
    actions = np.zeros(config.frames, np.int64)
    action, size = WAIT, (config.width, config.height)
    for t in range(config.frames):
        turn = config.turn_degrees * ((action in (RIGHT, FORWARD_RIGHT)) - (action in (LEFT, FORWARD_LEFT)))
        game.make_action([float(action in (FORWARD, FORWARD_LEFT, FORWARD_RIGHT)), turn], config.frame_skip)
        if game.is_episode_finished():
            return frames[:t], actions[:t]
        state = game.get_state()
        frames[t] = np.asarray(Image.fromarray(state.screen_buffer).resize(size, Image.Resampling.BOX))
        actions[t] = action
        action = walk.next(state.depth_buffer)
    return frames, actions


def record_shard(path: str, config: RecordConfig, seeds: list[int], scratch: str) -> int:
    """Record the episodes of `seeds` into one safetensors file and return the number of frames.

    The file holds frames uint8 [T, H, W, 3], actions int64 [T], starts int64 [E + 1] (episode e is starts[e] to
    starts[e + 1]) and seeds int64 [E].
    """
    from safetensors.numpy import save_file

    os.makedirs(scratch, exist_ok=True)
    os.chdir(scratch)
    game = open_game(config)
    try:
        episodes = [record_episode(game, config, seed) for seed in seeds]
    finally:
        game.close()
    starts = np.cumsum([0] + [len(actions) for _, actions in episodes]).astype(np.int64)
    tensors = {
        "frames": np.concatenate([frames for frames, _ in episodes]),
        "actions": np.concatenate([actions for _, actions in episodes]),
        "starts": starts,
        "seeds": np.asarray(seeds, np.int64),
    }
    save_file(tensors, f"{path}.part")
    os.replace(f"{path}.part", path)
    return int(starts[-1])


def shards(
    out: Path, config: RecordConfig, episodes: int, held_out: int, per_shard: int
) -> Iterator[tuple[str, list[int]]]:
    """Yield the (path, seeds) of each file: `train-*.safetensors`, `held-*.safetensors`."""
    for name, first, count in (("train", 0, episodes), ("held", HELD_OUT_SEED, held_out)):
        for index, start in enumerate(range(0, count, per_shard)):
            seeds = list(range(first + start, first + min(start + per_shard, count)))
            yield str(out / f"{name}-{index:04d}.safetensors"), seeds


def record(
    out: Path | str,
    config: RecordConfig,
    *,
    episodes: int,
    held_out: int,
    workers: int | None = None,
    per_shard: int = 8,
) -> dict[str, Any]:
    """Record `episodes` training and `held_out` held-out episodes into the folder `out`, in `workers` processes.

    Returns:
        the counts and speeds that are also written to `out/record.json`.
    """
    import json
    import tempfile

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if episodes < 0 or held_out < 0 or episodes + held_out < 1:
        raise ConfigError(f"episodes: expected at least 1, training or held out, got {episodes} and {held_out}")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers: expected at least 1, got {workers}")
    _check_scenario(config.scenario)
    out = Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    workers = workers or os.cpu_count() or 1
    work = list(shards(out, config, episodes, held_out, per_shard))
    start, frames = time.perf_counter(), {"train": 0, "held": 0}
    columns = (
        TextColumn("record"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[fps]:.0f} frames/s"),
    )
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool,
        Progress(*columns) as progress,
    ):
        bar = progress.add_task("record", total=len(work), fps=0.0)
        futures = {
            pool.submit(record_shard, path, config, seeds, os.path.join(scratch, str(index))): path
            for index, (path, seeds) in enumerate(work)
        }
        for future in as_completed(futures):
            frames[Path(futures[future]).name.split("-")[0]] += future.result()
            progress.update(bar, advance=1, fps=sum(frames.values()) / (time.perf_counter() - start))
    seconds = time.perf_counter() - start
    summary = {
        "config": {name: getattr(config, name) for name in RecordConfig.__slots__},
        "actions": list(ACTIONS),
        "vizdoom": importlib.metadata.version("vizdoom"),
        "episodes": episodes,
        "held_out_episodes": held_out,
        "held_out_first_seed": HELD_OUT_SEED,
        "frames": frames["train"],
        "held_out_frames": frames["held"],
        "seconds": round(seconds, 2),
        "workers": workers,
        "frames_per_second": round(sum(frames.values()) / seconds, 1),
    }
    (out / "record.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the recorder's options."""
    parser.add_argument(
        "--out", type=Path, default=Path("runs/data"), help="folder for the shards (default: %(default)s)"
    )
    parser.add_argument("--episodes", type=int, default=64, help="training episodes (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=8, help="held-out episodes (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=600, help="frames of an episode (default: %(default)s)")
    parser.add_argument("--scenario", default="my_way_home", help="ViZDoom scenario (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")


def run(args: argparse.Namespace) -> int:
    """Record what the parsed options ask for."""
    config = RecordConfig(scenario=args.scenario, frames=args.frames)
    summary = record(args.out, config, episodes=args.episodes, held_out=args.held_out, workers=args.workers)
    print(
        f"{summary['frames']} training and {summary['held_out_frames']} held-out frames in {summary['seconds']} s "
        f"({summary['frames_per_second']} frames/s, {summary['workers']} processes): {args.out}"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the recorder from the command line."""
    parser = argparse.ArgumentParser(
        "swba-infer record", description="Record gameplay with ViZDoom, without a window or a network."
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
