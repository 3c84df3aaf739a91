"""A stream in a file goes on bit for bit, and what is not one is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from generator_cases import (
    GUIDED,
    SAMPLER,
    STREAM,
    assert_same,
    collect,
    embedding,
    latents_of,
    make_generator,
    started,
    state_of,
)

pytest.importorskip("diffusers")

from dataclasses import replace

from swba_infer.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("sampler", [SAMPLER, GUIDED], ids=["plain", "guided"])
def test_a_saved_stream_goes_on_bit_for_bit(tmp_path, sampler):
    generator = started(5, sampler=sampler, lanes=2)
    generator.set_prompt(embedding(2))
    generator.save(tmp_path / "stream.safetensors")
    expected = collect(generator, 3)
    again = make_generator(sampler=replace(sampler, timesteps=(900,)), lanes=2)
    again.load(tmp_path / "stream.safetensors")
    assert np.array_equal(collect(again, 3), expected)
    assert again.sampler == sampler
    assert_same(state_of(again), state_of(generator))
    again.set_prompt(embedding(1))
    generator.set_prompt(embedding(1))
    assert_same(state_of(again), state_of(generator))


def test_files_of_other_generators_are_refused_and_change_nothing(tmp_path):
    generator = started(2)
    before = state_of(generator)
    generator.engine.save(tmp_path / "engine")
    make_generator(sampler=SAMPLER, lanes=2).save(tmp_path / "lanes")
    make_generator(replace(STREAM, window_frames=6), sampler=SAMPLER).save(tmp_path / "window")
    for name in ("engine", "lanes", "window", "missing"):
        with pytest.raises(CheckpointError):
            generator.load(tmp_path / name)
    generator.save(tmp_path / "stream")
    with pytest.raises(CheckpointError, match="expected no tensors of a caller"):
        generator.engine.load(tmp_path / "stream")
    assert_same(state_of(generator), before)


def test_a_stream_loaded_with_fewer_latents_does_not_pass_later_ones_off_as_its_first(tmp_path):
    short = started(5, keep_frames=5)
    short.save(tmp_path / "short")
    generator = make_generator(sampler=SAMPLER, keep_frames=12)
    generator.load(tmp_path / "short")
    collect(generator, 3)
    collect(short, 3)
    assert torch.equal(latents_of(generator, 0, 5), latents_of(short, 0, 5))
    assert torch.equal(latents_of(generator, 11, 16), latents_of(short, 11, 16))
    with pytest.raises(ConfigError, match="expected frames of the first 5 or the last 11 of 16"):
        latents_of(generator, 3, 7)


@pytest.mark.parametrize(
    "damage",
    [
        lambda extra, tensors: extra.pop("wan.lanes"),
        lambda extra, tensors: extra.update({"wan.lanes": "{}"}),
        lambda extra, tensors: extra.update({"wan.lanes": '["x"]'}),
        lambda extra, tensors: extra.update({"wan.sampler": '{"colour": 1}'}),
        lambda extra, tensors: tensors.pop("latents.0.last"),
        lambda extra, tensors: tensors.update({"latents.0.first": torch.zeros(1, 4, 2, 4, 8)}),
        lambda extra, tensors: tensors.pop("decoder.lane.0.02"),
    ],
)
def test_a_damaged_file_is_refused_and_changes_nothing(tmp_path, monkeypatch, damage):
    generator = started(2)
    before, real = state_of(generator), generator.engine.save

    def save(path: Any, extra: dict, tensors: dict) -> None:
        damage(extra, tensors)
        real(path, extra, tensors)

    monkeypatch.setattr(generator.engine, "save", save)
    generator.save(tmp_path / "damaged")
    with pytest.raises(CheckpointError):
        generator.load(tmp_path / "damaged")
    assert_same(state_of(generator), before)
