from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from tiny_world import ACTIONS, SIZE, tiny_config, tiny_dit, tiny_stream

from swba_infer import VideoGenerator
from swba_infer.checkpoint import load_context, load_model, read_config, read_shards, resolve_directory, save_model
from swba_infer.errors import CheckpointError, ConfigError

CONFIG = {
    "architecture": "video_dit",
    "model": {},
    "stream": {"tokens_per_frame": 4, "frames_per_block": 1, "window_frames": 4},
    "sampler": {},
    "actions": ["none", "left"],
}


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer{i}.weight": torch.randn(16, 9, generator=generator) for i in range(5)}


@pytest.fixture
def directory(tmp_path, tensors):
    save_model(tmp_path / "model", CONFIG, tensors, max_shard_bytes=2 * 16 * 9 * 4)
    return tmp_path / "model"


def test_shards_hold_every_tensor_once(directory, tensors):
    names = sorted(p.name for p in directory.iterdir())
    assert names == ["config.json", *(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3))]
    back = read_shards(directory)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert read_config(directory) == {**CONFIG, "format": 1, "dtype": "float32"}


def test_transposed_and_shared_tensors_are_saved_by_value(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    save_model(tmp_path / "m", CONFIG, {"a": base.t(), "b": base})
    back = read_shards(tmp_path / "m")
    assert torch.equal(back["a"], base.t())
    assert torch.equal(back["b"], base)


def test_saving_onto_an_existing_directory_needs_overwrite_and_keeps_foreign_files(directory, tensors):
    (directory / "MODEL_CARD.md").write_text("card")
    with pytest.raises(ConfigError, match="existing"):
        save_model(directory, CONFIG, tensors)
    save_model(directory, CONFIG, tensors, overwrite=True)
    assert sorted(p.name for p in directory.iterdir()) == [
        "MODEL_CARD.md",
        "config.json",
        "model-00001-of-00001.safetensors",
    ]
    assert [p.name for p in directory.parent.iterdir()] == ["model"]


def test_a_failed_save_leaves_nothing(tmp_path, tensors, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("swba_infer.checkpoint.save_file", full)
    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path / "m", CONFIG, tensors)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 5, 60, -7])
def test_a_truncated_shard_is_named(directory, size):
    shard = directory / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        read_shards(directory)


def test_a_shard_with_trailing_bytes_is_named(directory):
    shard = directory / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="model-00001-of-00003"):
        read_shards(directory)


def test_a_missing_shard_is_named(directory):
    (directory / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00003-of-00003"):
        read_shards(directory)


def test_two_sets_of_shards_are_refused(directory, tensors):
    save_file(tensors, directory / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="one set"):
        read_shards(directory)


def test_no_shards_at_all_is_an_error(directory):
    for path in directory.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="none"):
        read_shards(directory)


def test_a_tensor_in_two_shards_is_refused(directory):
    shard = directory / "model-00003-of-00003.safetensors"
    save_file({**load_file(shard), "layer0.weight": torch.zeros(16, 9)}, shard)
    with pytest.raises(CheckpointError, match=r"layer0\.weight.*model-00001"):
        read_shards(directory)


def test_a_duplicate_key_inside_a_header_is_refused(directory):
    shard = directory / "model-00001-of-00003.safetensors"
    data = save({"layer0.weight": torch.zeros(2, 2), "layer9.weight": torch.ones(2, 2)})
    shard.write_bytes(data.replace(b"layer9", b"layer0"))
    with pytest.raises(CheckpointError, match=r"layer0\.weight.*twice"):
        read_shards(directory)


def test_a_header_nested_too_deeply_is_refused(directory):
    shard = directory / "model-00001-of-00003.safetensors"
    shard.write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)
    with pytest.raises(CheckpointError, match="model-00001-of-00003"):
        read_shards(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"format": 2}, "format"),
        ({"architecture": "wan"}, "architecture"),
        ({"dtype": "float8"}, "dtype"),
        ({"dtype": ["float32"]}, "dtype"),
        ({"model": None}, "missing"),
        ({"actions": "left"}, "actions"),
        ({"fps": -1}, "fps"),
        ({"fps": float("inf")}, "fps"),
    ],
)
def test_config_is_read_strictly(directory, change, message):
    config = {**read_config(directory), **change}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ConfigError, match=message):
        read_config(directory)


@pytest.mark.parametrize("text", ["", "[1]", '{"format": 1, "format": 1}', "{not json", "[" * 100_000])
def test_malformed_config_is_a_config_error(directory, text):
    (directory / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(directory)


def test_state_dict_needs_one_floating_dtype(tmp_path, tensors):
    tensors["layer0.weight"] = tensors["layer0.weight"].half()
    with pytest.raises(ConfigError, match="one floating dtype"):
        save_model(tmp_path / "m", CONFIG, tensors)


def test_unknown_model_names_are_explained(tmp_path, directory):
    assert resolve_directory(directory) == directory
    for name in (tmp_path, "no-such-model", ".."):
        with pytest.raises(ConfigError, match="model"):
            resolve_directory(name)


def test_a_model_loads_as_it_was_saved(tiny_model):
    model, stream, config = load_model(tiny_model, check_finite=True)
    assert stream == tiny_stream()
    assert config["actions"] == list(ACTIONS)
    expected = tiny_dit().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_loading_converts_and_leaves_the_random_state_alone(tiny_model):
    before = torch.random.get_rng_state()
    model = load_model(tiny_model, dtype=torch.bfloat16).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(torch.random.get_rng_state(), before)


def rename(tensors):
    tensors["surprise"] = tensors.pop("embed.bias")


def reshape(tensors):
    tensors["embed.bias"] = tensors["embed.bias"][:-1].clone()


def recast(tensors):
    tensors["embed.bias"] = tensors["embed.bias"].half()


def poison(tensors):
    tensors["embed.bias"][3] = float("nan")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename, r"missing.*embed\.bias.*extra.*surprise"),
        (reshape, r"embed\.bias"),
        (recast, r"embed\.bias"),
        (poison, "NaN"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path, damage, message):
    tensors = tiny_dit().state_dict()
    save_model(tmp_path / "m", tiny_config(), tensors)
    damage(tensors)
    save_file(tensors, tmp_path / "m" / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "m", check_finite=True)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {**SIZE.to_dict(), "surprise": 1}},
        {"model": {**SIZE.to_dict(), "dim": "wide"}},
        {"model": {**SIZE.to_dict(), "heads": 5}},
        {"model": [1]},
        {"stream": {"tokens_per_frame": 12}},
        {"stream": {**tiny_stream().to_dict(), "surprise": 1}},
        {"sampler": {"steps": 0}},
        {"sampler": {"surprise": 1}},
        {"actions": ["left"]},
        {"actions": ["left", "left", "left", "left"]},
    ],
)
def test_a_config_with_bad_values_is_a_config_error(tmp_path, change):
    save_model(tmp_path / "m", {**tiny_config(), **change}, tiny_dit().state_dict())
    with pytest.raises(ConfigError):
        VideoGenerator.from_pretrained(tmp_path / "m", device="cpu")


def test_recorded_context_is_read_and_checked(tiny_model, directory):
    context = load_context(tiny_model)
    assert context.frames.dtype == torch.uint8
    assert len(context.frames) == len(context.actions)
    with pytest.raises(ConfigError, match=r"context\.safetensors"):
        load_context(directory)
    save_file({"frames": torch.zeros(1)}, directory / "context.safetensors")
    with pytest.raises(CheckpointError, match="actions"):
        load_context(directory)
