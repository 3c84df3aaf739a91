from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from swba_infer.checkpoint import load_context, load_model
from swba_infer.config import StreamConfig
from swba_infer.engine import StreamingEngine
from swba_infer.errors import CheckpointError, ConfigError, NumericsError
from swba_infer.models.video_dit import VideoDiTConfig, patchify
from swba_infer.training.config import TrainConfig, preset
from swba_infer.training.data import Episodes, Windows
from swba_infer.training.evaluate import World
from swba_infer.training.loop import Trainer
from swba_infer.training.loss import (
    LossConfig,
    add_noise,
    draw_levels,
    flow_loss,
    penalty,
    self_context,
    weights,
)
from swba_infer.training.optim import orthogonalise

SMALL = TrainConfig(
    model=VideoDiTConfig(height=24, width=36, dim=32, depth=2, heads=2, mlp=64, cell_dim=8, actions=6),
    stream=StreamConfig(tokens_per_frame=6, frames_per_block=1, window_frames=4),
    frames=6,
    batch=8,
    steps=40,
    warmup=3,
    ema=0.8,
)


@pytest.fixture
def folder(tmp_path):
    """Moving stripes whose direction is the action: a world that a few steps begin to learn."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    actions = rng.integers(0, 3, 120).astype(np.int64)
    offset = np.cumsum(actions - 1)
    columns = (np.arange(36)[None] + 3 * offset[:, None]) // 6 % 2 * 160 + 40
    frames = np.broadcast_to(columns[:, None, :, None], (120, 24, 36, 3)).astype(np.uint8).copy()
    for name in ("train", "held"):
        tensors = {
            "frames": frames,
            "actions": actions,
            "starts": np.array([0, 50, 54, 120]),
            "seeds": np.array([0, 1, 2]),
        }
        save_file(tensors, tmp_path / f"{name}-0000.safetensors")
    return tmp_path


def test_loss_falls_checkpoint_loads_and_the_model_streams(folder):
    out = folder / "run"
    summary = Trainer(SMALL, Episodes(folder), out).run(log_every=1, quiet=True)
    losses = [json.loads(line)["mean"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(losses) == summary["steps"] == 40
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert (out / "loss.png").stat().st_size > 1000

    loaded = load_model(out / "model", dtype=torch.float32, check_finite=True)
    assert len(load_context(out / "model").frames) == loaded.stream.window_frames
    frames, actions = Episodes(folder, "held").episode(2)
    world = World(StreamingEngine(loaded.model, loaded.stream, lanes=2), SMALL.sampler)
    world.start(frames[None, :5].repeat(2, 1, 1, 1, 1), actions[:5].repeat(2, 1))
    first = [world.advance(actions[5 + i].repeat(2)) for i in range(6)]
    assert first[0].shape == (2, 24, 36, 3)
    assert world.engine.position == (66, 66)


def test_a_resumed_run_is_bit_identical(folder):
    episodes = Episodes(folder)
    config = replace(SMALL, steps=12, own_from=0.5)
    whole = Trainer(config, episodes, folder / "whole")
    whole.run(quiet=True)

    half = Trainer(config, episodes, folder / "half")
    for _ in range(7):
        half.advance()
    half.save()
    rest = Trainer(config, episodes, folder / "half", resume=True)
    rest.run(quiet=True)
    assert rest.step == 12
    for (name, a), b in zip(whole.model.state_dict().items(), rest.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for name, a in whole.average.tensors.items():
        assert torch.equal(a, rest.average.tensors[name]), name


def test_a_run_goes_on_from_the_weights_of_a_model(folder):
    episodes = Episodes(folder)
    Trainer(replace(SMALL, steps=3), episodes, folder / "first").run(quiet=True)
    config = replace(SMALL, steps=2, seed=5, init=str(folder / "first" / "model"))
    trainer = Trainer(config, episodes, folder / "second")
    given = load_model(folder / "first" / "model", torch.float32).model.state_dict()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, given[name]), name
        assert torch.equal(trainer.average.tensors[name], given[name]), name
    assert not any(optimizer.state for optimizer in trainer.optimizers)
    before = trainer.average.tensors["embed.weight"].clone()
    trainer.advance()
    moved = (trainer.average.tensors["embed.weight"] - before).norm()
    whole = (trainer.model.state_dict()["embed.weight"] - before).norm()
    assert 0 < moved < 1.01 * (1 - config.ema) * whole
    trainer.run(quiet=True)
    runs = json.loads((folder / "second" / "model" / "training.json").read_text())["runs"]
    assert [run["steps"] for run in runs] == [3, 2]


def test_weights_of_another_architecture_are_refused_before_anything_is_written(folder):
    episodes = Episodes(folder)
    Trainer(replace(SMALL, steps=1), episodes, folder / "first").run(quiet=True)
    other = replace(SMALL, model=replace(SMALL.model, mlp=48), init=str(folder / "first" / "model"))
    with pytest.raises(ConfigError, match=r"init: expected a model with \{'mlp': 48\}, got \{'mlp': 64\}"):
        Trainer(other, episodes, folder / "second")
    with pytest.raises(ConfigError, match="shipped"):
        Trainer(replace(SMALL, init="nope"), episodes, folder / "second")
    assert not (folder / "second").exists()


def test_an_earlier_run_is_replaced_only_when_asked(folder):
    episodes, out = Episodes(folder), folder / "run"
    Trainer(replace(SMALL, steps=2), episodes, out).run(quiet=True)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"out: .*--resume.*--overwrite"):
        Trainer(SMALL, episodes, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    config = replace(SMALL, steps=3, init=str(out / "model"))
    trainer = Trainer(config, episodes, out, overwrite=True)
    assert not (out / "state.safetensors").exists()
    assert trainer.run(quiet=True)["steps"] == 3


def test_a_killed_run_leaves_a_usable_model_and_a_state(folder, monkeypatch):
    config = replace(SMALL, steps=10_000, export_minutes=1e-6)
    trainer = Trainer(config, Episodes(folder), folder / "run")
    advance = trainer.advance

    def killed_at_step_4():
        if trainer.step == 4:
            raise KeyboardInterrupt
        return advance()

    monkeypatch.setattr(trainer, "advance", killed_at_step_4)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(log_every=1, quiet=True)
    exported = load_model(folder / "run" / "model", check_finite=True).model.state_dict()
    for name, value in trainer.average.tensors.items():
        assert torch.equal(exported[name], value.bfloat16()), name
    assert len(load_context(folder / "run" / "model").frames) == 4
    assert json.loads((folder / "run" / "train.json").read_text())["steps"] == 4
    assert Trainer(config, Episodes(folder), folder / "run", resume=True).step == 4


def test_a_session_ends_early_and_the_clock_ends_a_run(folder):
    episodes = Episodes(folder)
    early = Trainer(replace(SMALL, steps=10_000), episodes, folder / "early").run(session=0.02, quiet=True)
    assert early["steps"] < 10_000
    timed = Trainer(replace(SMALL, steps=10_000, minutes=0.02), episodes, folder / "timed")
    assert timed.run(quiet=True)["steps"] < 10_000
    assert timed.progress == 1


def test_state_of_another_model_is_refused(folder):
    episodes = Episodes(folder)
    Trainer(SMALL, episodes, folder / "run").save()
    other = replace(SMALL, model=replace(SMALL.model, depth=1))
    with pytest.raises(CheckpointError, match="another"):
        Trainer(other, episodes, folder / "run", resume=True)
    (folder / "run" / "state.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="state"):
        Trainer(SMALL, episodes, folder / "run", resume=True)


def test_windows_stay_inside_episodes(folder):
    windows = Windows(Episodes(folder), 6)
    assert windows.starts.tolist() == [*range(45), *range(54, 115)]
    tokens, actions = windows.draw(5, 12, torch.Generator().manual_seed(0))
    assert tokens.shape == (5, 36, 432)
    assert actions.shape == (5, 6)
    with pytest.raises(ConfigError, match="length"):
        Windows(Episodes(folder), 80)


def test_missing_data_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="held"):
        Episodes(tmp_path, "held")


def test_levels_cover_history_and_noise():
    config = LossConfig()
    t, learns = draw_levels(4000, 16, config, torch.Generator().manual_seed(0))
    assert learns[:, -1].all()
    assert t[~learns].max() <= config.context_noise
    assert 0.4 < (t[~learns] == 0).float().mean() < 0.6
    assert t[learns].min() >= 0.02
    assert 0.2 < (t[learns] == 1).float().mean() < 0.3
    assert (learns[:, :-1].sum(1) == 0).any()
    assert learns.all(1).any()
    assert 0.55 < (~(learns[:, 1:] & learns[:, :-1]).any(1) & (learns.sum(1) > 4)).float().mean() < 0.7


def test_frames_that_learn_apart_follow_a_clean_one():
    config = replace(LossConfig(), apart=1.0, context_noise_rate=0.0)
    t, learns = draw_levels(500, 16, config, torch.Generator().manual_seed(0))
    assert (t[:, :-1][learns[:, 1:]] == 0).all()
    assert set(learns.sum(1).tolist()) == {6, 8}


def test_weights_are_one_at_pure_noise_and_capped():
    config = LossConfig()
    w = weights(torch.tensor([1.0, 0.75, 0.02]), config)
    assert w.tolist() == pytest.approx([1.0, 4 / 3, 2.0])


def test_small_errors_weigh_quadratically_and_large_ones_linearly():
    error = torch.tensor([0.0, 1e-3, 1.0, 2.0, -2.0], dtype=torch.float64)
    values = penalty(error, 0.03)
    assert values[0] == 0
    assert float(values[1]) == pytest.approx(1e-6 / 0.06, rel=1e-3)
    assert float(values[3] - values[2]) == pytest.approx(1.0, rel=1e-3)
    assert values[4] == values[3]


def test_of_many_places_for_an_edge_a_sharp_one_in_the_middle_costs_less_than_their_soft_mean():
    edges = torch.stack([(torch.arange(12) >= place).float() for place in (4, 5, 6, 7, 8)])
    middle, soft = edges[2], edges.mean(0)
    assert penalty(middle - edges, LossConfig().bend).sum() < 0.9 * penalty(soft - edges, LossConfig().bend).sum()
    assert (middle - edges).square().sum() > (soft - edges).square().sum()


def test_a_perfect_model_has_no_loss_and_history_brings_none():
    tokens, actions = torch.rand(3, 8, 4), torch.zeros(3, 4, dtype=torch.int64)
    perfect = flow_loss(lambda x, t, a: tokens, tokens, actions, 6, LossConfig(), torch.Generator().manual_seed(0))
    assert perfect.loss == 0
    seen = {}

    def wrong_on_history(x, t, a):
        seen["history"] = t.repeat_interleave(2, 1)[..., None] == 0
        return torch.where(seen["history"], 100.0, tokens)

    config = replace(LossConfig(), context_noise_rate=0.0)
    assert flow_loss(wrong_on_history, tokens, actions, 6, config, torch.Generator().manual_seed(0)).loss == 0
    assert seen["history"].any()


def test_noise_has_the_right_ends():
    tokens = torch.rand(1, 4, 3)
    noisy = add_noise(tokens, torch.tensor([[0.0, 1.0]]), torch.Generator().manual_seed(0))
    assert torch.equal(noisy[:, :2], tokens[:, :2])
    again = add_noise(tokens * 0, torch.tensor([[0.0, 1.0]]), torch.Generator().manual_seed(0))
    torch.testing.assert_close(noisy[:, 2:], again[:, 2:])


def test_self_context_replaces_some_frames_and_carries_no_gradient():
    tokens = torch.rand(64, 16, 2, requires_grad=True)
    actions = torch.zeros(64, 8, dtype=torch.int64)
    for passes, low, high in ((1, 0.2, 0.6), (2, 0.5, 0.8)):
        config = replace(LossConfig(), self_passes=passes)
        out, imagined = self_context(
            lambda x, t, a: x * 0 + 0.5, tokens, actions, config, torch.Generator().manual_seed(0)
        )
        replaced = (out == 0.5).all(-1)
        assert not out.requires_grad
        assert low < replaced.float().mean() < high
        assert torch.equal(out[~replaced], tokens[~replaced])
        assert torch.equal(imagined.repeat_interleave(2, 1), replaced)


@pytest.mark.parametrize("refine", [0.0, 1.0])
def test_noise_lies_over_the_models_own_picture_where_it_refines(refine):
    config = replace(LossConfig(), refine=refine, context_noise_rate=0.0, self_pure=1.0)
    tokens, actions = torch.zeros(16, 12, 900), torch.zeros(16, 6, dtype=torch.int64)
    calls = []

    def predict(x, t, a):
        calls.append((x, t))
        return torch.full_like(x, 0.5)

    flow_loss(predict, tokens, actions, 6, config, torch.Generator().manual_seed(0), own=16)
    replaced, (x, t) = calls[0][1] > 0, calls[1]
    mean = x.unflatten(1, (6, -1)).mean((2, 3))
    partly = replaced & (t > 0) & (t < 0.6)
    assert partly.any()
    torch.testing.assert_close(mean[partly], 0.5 * refine * (1 - t[partly]), atol=0.08, rtol=0)
    history = replaced & (t == 0)
    assert history.any()
    torch.testing.assert_close(mean[history], torch.full_like(mean[history], 0.5))


def test_orthogonalised_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (3, 40, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert values.min() > 0.6
        assert values.max() < 1.3


@pytest.mark.parametrize(
    ("change", "message"), [({"width": 48}, "data.*36"), ({"actions": 2}, "data.*0 to 1, got 0 to 2")]
)
def test_episodes_of_another_size_or_with_unknown_actions_are_refused(folder, change, message):
    stream = replace(SMALL.stream, tokens_per_frame=8) if "width" in change else SMALL.stream
    config = replace(SMALL, model=replace(SMALL.model, **change), stream=stream)
    with pytest.raises(ConfigError, match=message):
        Trainer(config, Episodes(folder), folder / "run")
    assert not (folder / "run").exists()


def test_a_damaged_shard_is_named(folder):
    path = folder / "train-0000.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=path.name):
        Episodes(folder)


@pytest.mark.parametrize("log_every", [1, 1000])
def test_a_diverged_run_stops_and_leaves_the_older_model(folder, log_every):
    run = folder / "run"
    Trainer(replace(SMALL, steps=2), Episodes(folder), run).run(quiet=True)
    before = {path: path.read_bytes() for path in (run / "state.safetensors", *(run / "model").iterdir())}
    trainer = Trainer(replace(SMALL, steps=4), Episodes(folder), run, resume=True)
    with torch.no_grad():
        trainer.model.embed.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="finite"):
        trainer.run(log_every=log_every, quiet=True)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("change", [{"minutes": float("nan")}, {"muon_lr": -1.0}, {"adam_lr": float("inf")}])
def test_rates_and_limits_are_finite(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(SMALL, **change)


def test_presets_survive_json():
    for name in ("tiny", "world", "further"):
        config = preset(name, seed=3)
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="preset"):
        preset("huge")


def test_patchify_matches_the_models_tokens():
    frames = torch.zeros(1, 2, 24, 36, 3, dtype=torch.uint8)
    assert patchify(frames, 12).shape[-1] == SMALL.model.token_channels
