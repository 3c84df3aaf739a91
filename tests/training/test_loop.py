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
from swba_infer.training.loss import LossConfig, add_noise, draw_levels, flow_loss, self_context, weights
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
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
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


def test_weights_are_one_at_pure_noise_and_capped():
    config = LossConfig()
    w = weights(torch.tensor([1.0, 0.75, 0.02]), config)
    assert w.tolist() == pytest.approx([1.0, 4 / 2.25, 4.0])


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
    out = self_context(lambda x, t, a: x * 0 + 0.5, tokens, actions, LossConfig(), torch.Generator().manual_seed(0))
    replaced = (out == 0.5).all(-1)
    assert not out.requires_grad
    assert 0.2 < replaced.float().mean() < 0.6
    assert torch.equal(out[~replaced], tokens[~replaced])


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
    for name in ("tiny", "world"):
        config = preset(name, seed=3)
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match="preset"):
        preset("huge")


def test_patchify_matches_the_models_tokens():
    frames = torch.zeros(1, 2, 24, 36, 3, dtype=torch.uint8)
    assert patchify(frames, 12).shape[-1] == SMALL.model.token_channels
