"""Training checkpoints become model folders: the EMA, without wrappers, without running what a pickle carries."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from wan_files import SIZES, official, weights, write_folder

from swba_infer.cli import main
from swba_infer.errors import CheckpointError, ConfigError
from swba_infer.wan import load_wan
from swba_infer.wan.convert import convert

WRAPPED = "model._fsdp_wrapped_module."


@pytest.fixture(scope="module")
def ema() -> dict[str, torch.Tensor]:
    return weights(seed=1)


@pytest.fixture
def pickled(tmp_path, ema) -> Path:
    """Return a file as Self-Forcing writes it: generator, EMA and critic, each wrapped."""
    content = {
        "generator": OrderedDict(official(weights(seed=2), WRAPPED)),
        "generator_ema": OrderedDict(official(ema, "model.")),
        "critic": {"model.x": torch.zeros(2)},
        "step": 600,
    }
    torch.save(content, tmp_path / "self_forcing.pt")
    return tmp_path / "self_forcing.pt"


def same(model, tensors) -> bool:
    return all(torch.equal(value, tensors[name].to(value.dtype)) for name, value in model.state_dict().items())


def test_the_ema_is_preferred_and_written_as_a_folder_that_loads(pickled, tmp_path, ema, capsys):
    assert main(["convert", str(pickled), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "2 layers" in said
    assert "'generator_ema'" in said
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    model = load_wan(tmp_path / "out", device="cpu", latent_size=(4, 6))
    assert model.config == SIZES
    assert same(model, ema)


def test_another_entry_is_taken_by_name(pickled, tmp_path):
    assert convert(pickled, tmp_path / "out", key="generator").key == "generator"
    assert same(load_wan(tmp_path / "out", device="cpu"), weights(seed=2))
    torch.save({"state": {"now": official(weights(seed=2))}, "generator": {}}, tmp_path / "nested.pt")
    assert convert(tmp_path / "nested.pt", tmp_path / "nested", key="state.now").key == "state.now"
    with pytest.raises(CheckpointError, match=r"expected the key 'generater', got \['critic', 'generator'"):
        convert(pickled, tmp_path / "other", key="generater")
    with pytest.raises(CheckpointError, match=r"missing tensors|patch_embedding"):
        convert(pickled, tmp_path / "other", key="critic")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"state_dict": t},
        lambda t: {"ema": {"model": t}},
        lambda t: {"generator": t, "step": torch.tensor(600)},
        lambda t: {"generator": t, "generator_ema": {}},
    ],
)
def test_the_tensors_are_found_where_trainers_put_them(tmp_path, ema, wrap):
    torch.save(wrap(official(ema)), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "out")
    assert same(load_wan(tmp_path / "out", device="cpu"), ema)


def test_the_older_file_format_of_torch_converts_too(tmp_path, ema):
    torch.save(official(ema), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    convert(tmp_path / "a.pt", tmp_path / "out")
    assert same(load_wan(tmp_path / "out", device="cpu"), ema)


def test_dtype_and_shards_are_as_asked(pickled, tmp_path, ema):
    done = convert(pickled, tmp_path / "out", dtype=torch.bfloat16, max_shard_bytes=100_000)
    files = sorted(path for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ema.keys()
    assert index["metadata"]["total_size"] == done.bytes
    model = load_wan(tmp_path / "out", device="cpu")
    assert model.proj_out.weight.dtype == torch.bfloat16
    assert model.scale_shift_table.dtype == torch.float32
    assert same(model, ema)


def test_official_safetensors_convert_too(tmp_path, ema):
    folder = write_folder(tmp_path / "wan", None, official(ema), 3)
    convert(folder, tmp_path / "out")
    assert same(load_wan(tmp_path / "out", device="cpu"), ema)
    with pytest.raises(ConfigError, match="key"):
        convert(folder, tmp_path / "other", key="generator")


class Intruder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_that_carries_code_is_refused_and_does_not_run(tmp_path, ema):
    torch.save({"generator": official(ema), "extra": Intruder(tmp_path / "intruded")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a.pt: expected a readable file of tensors only"):
        convert(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "intruded").exists()
    assert sorted(os.listdir(tmp_path)) == ["a.pt"]


@pytest.mark.parametrize("cut", [10, 1000, 100_000])
def test_a_truncated_pickle_is_refused(pickled, tmp_path, cut):
    pickled.write_bytes(pickled.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match=r"self_forcing.pt: expected a readable file"):
        convert(pickled, tmp_path / "out")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle_is_refused_or_read_but_never_breaks(tmp_path, ema, zipped):
    torch.save(official(ema), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "a.pt").read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for i, place in enumerate(torch.randint(0, 3000, (40,), generator=generator).tolist()):
        damaged = bytearray(whole)
        damaged[place : place + 4] = b"\xff\x00R."
        (tmp_path / "b.pt").write_bytes(damaged)
        try:
            convert(tmp_path / "b.pt", tmp_path / f"out{i}")
        except CheckpointError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"step": 3}, r"expected tensors under one of .* got \['step'\]"),
        ([torch.zeros(2)], "got list"),
        ({"generator": {"a": torch.zeros(2), "b": 3}}, "'b': expected a floating tensor, got int"),
        ({"generator": {"a": torch.zeros(2, dtype=torch.int64)}}, "'a': expected a floating tensor, got torch.int64"),
        ({"generator": {"blocks.0.x": torch.zeros(2)}}, "expected a Wan transformer"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "a.pt", tmp_path / "out")


def test_failures_leave_nothing_behind(tmp_path, ema):
    bad = official({**ema, "blocks.1.attn1.to_v.bias": torch.full((128,), float("inf"))})
    torch.save(bad, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"blocks.1.self_attn.v.bias.*infinity"):
        convert(tmp_path / "a.pt", tmp_path / "out", max_shard_bytes=100_000)
    assert sorted(os.listdir(tmp_path)) == ["a.pt"]
    large = official({**ema, "proj_out.bias": torch.full((16,), 1e6)})
    torch.save(large, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"head.head.bias': expected values within torch.float16"):
        convert(tmp_path / "a.pt", tmp_path / "out", dtype=torch.float16)
    assert sorted(os.listdir(tmp_path)) == ["a.pt"]
    save_file(ema, tmp_path / "b.safetensors")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="existing"):
        convert(tmp_path / "b.safetensors", tmp_path / "out")
    assert main(["convert", str(tmp_path / "nowhere.pt"), str(tmp_path / "new")]) == 2
