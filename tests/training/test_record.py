from __future__ import annotations

import numpy as np
import pytest

from swba_infer.errors import ConfigError
from swba_infer.training.data import Episodes, Windows
from swba_infer.training.record import (
    HELD_OUT_SEED,
    LEFT,
    RIGHT,
    RecordConfig,
    Walk,
    open_game,
    record,
    record_episode,
)

CONFIG = RecordConfig(frames=40)


@pytest.fixture(scope="module")
def game():
    pytest.importorskip("vizdoom")
    pytest.importorskip("PIL")
    game = open_game(CONFIG)
    yield game
    game.close()


def test_same_seed_gives_the_same_episode_whatever_was_played_before(game):
    frames, actions = record_episode(game, CONFIG, 3)
    record_episode(game, CONFIG, 4)
    again, actions_again = record_episode(game, CONFIG, 3)
    assert np.array_equal(frames, again)
    assert np.array_equal(actions, actions_again)


def test_other_seeds_give_other_episodes(game):
    a, _ = record_episode(game, CONFIG, 3)
    b, _ = record_episode(game, CONFIG, HELD_OUT_SEED)
    assert a.shape[1:] == (72, 96, 3)
    assert len(a) != len(b) or not np.array_equal(a, b)


def test_a_frame_shows_the_result_of_its_own_action(game):
    import torch

    from swba_infer.training.metrics import horizontal_motion

    shifts = {LEFT: [], RIGHT: []}
    for seed in range(6):
        frames, actions = record_episode(game, CONFIG, seed)
        motion = horizontal_motion(torch.from_numpy(frames[:-1].copy()), torch.from_numpy(frames[1:].copy()))
        for kind in shifts:
            chosen = torch.from_numpy(actions[1:] == kind) & (motion.texture > 0.06)
            shifts[kind] += motion.shift[chosen].tolist()
    assert np.median(shifts[LEFT]) == pytest.approx(8, abs=0.5)
    assert np.median(shifts[RIGHT]) == pytest.approx(-8, abs=0.5)


def test_shards_of_a_parallel_recording_load_as_episodes_and_windows(tmp_path):
    pytest.importorskip("vizdoom")
    summary = record(tmp_path, RecordConfig(frames=20), episodes=3, held_out=1, workers=2, per_shard=2)
    train, held = Episodes(tmp_path, "train"), Episodes(tmp_path, "held")
    assert summary["frames"] == len(train.actions) == train.bounds[-1][1]
    assert train.seeds == [0, 1, 2]
    assert held.seeds == [HELD_OUT_SEED]
    windows = Windows(train, 8)
    for start in windows.starts.tolist():
        assert any(low <= start and start + 8 <= high for low, high in train.bounds)


def test_walk_turns_away_from_a_near_wall():
    walk = Walk(np.random.default_rng(0))
    walk.caution = 1.1
    near = np.full((240, 320), 1.0)
    near[:, :100] = 30.0
    actions = [walk.next(near) for _ in range(200)]
    assert sum(a in (LEFT, RIGHT) for a in actions) > 150


@pytest.mark.parametrize(
    ("change", "message"),
    [({"episodes": -3}, "episodes"), ({"episodes": 0}, "episodes"), ({"workers": -1}, "workers")],
)
def test_bad_counts_are_named(tmp_path, change, message):
    pytest.importorskip("vizdoom")
    with pytest.raises(ConfigError, match=message):
        record(tmp_path / "new", RecordConfig(frames=5), **{"episodes": 1, "held_out": 0, **change})
    assert not (tmp_path / "new").exists()


def test_an_unknown_scenario_is_refused_with_the_known_ones(tmp_path):
    pytest.importorskip("vizdoom")
    with pytest.raises(ConfigError, match=r"scenario.*my_way_home.*nope"):
        record(tmp_path / "new", RecordConfig(scenario="nope"), episodes=1, held_out=0)
    assert not (tmp_path / "new").exists()


def test_bad_sizes_are_named():
    with pytest.raises(ConfigError, match="frame_skip: expected at least 1, got 0"):
        RecordConfig(frame_skip=0)
