"""Prompts, windows and contexts change a lane to what a fresh stream would be, and a failure changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from generator_cases import (
    GUIDED,
    SAMPLER,
    STREAM,
    TOKENS,
    assert_same,
    clip,
    collect,
    embedding,
    fail_after,
    fresh_engine,
    latents_of,
    make_generator,
    started,
    state_of,
    tiny_autoencoder,
)

pytest.importorskip("diffusers")

from dataclasses import replace

from swba_infer.errors import CheckpointError, ConfigError
from swba_infer.models.wan import patchify
from swba_infer.wan.vae import WanVAE, to_pixels


def test_a_prompt_switch_equals_a_fresh_stream_of_the_same_latents_under_the_new_prompt():
    generator = started(6)
    generator.set_prompt(embedding(2), sinks="refresh")
    engine = fresh_engine(embedding(2))
    engine.prefill(patchify(latents_of(generator, 0, 1)), timestep=0)
    engine.prefill(patchify(latents_of(generator, 8, 12)), timestep=0, history_start=8 * TOKENS)
    assert_same(generator.engine.snapshot(), engine.snapshot())
    assert generator.position == (12,)


def test_kept_sinks_stay_as_they_were_encoded():
    generator = started(6)
    before = generator.engine.snapshot()
    generator.set_prompt(embedding(2))
    after = generator.engine.snapshot()
    for old, new in ((before.ring.k, after.ring.k), (before.ring.v, after.ring.v)):
        assert torch.equal(old[..., :TOKENS, :], new[..., :TOKENS, :])
        assert (old[1, ..., TOKENS:, :] - new[1, ..., TOKENS:, :]).abs().max() > 1e-3
    assert not torch.equal(before.state["text_k"], after.state["text_k"])


@pytest.mark.parametrize("sinks", ["keep", "refresh"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_the_same_prompt_again_changes_only_what_has_left_the_window(blocks, sinks):
    """While nothing has left it, encoding the latents again gives the ring that streaming them gave."""
    generator = started(blocks)
    before = generator.engine.snapshot()
    generator.set_prompt(embedding(1), sinks=sinks)
    after = generator.engine.snapshot()
    assert after.ring.position == before.ring.position
    first_layer = (before.ring.k[0] - after.ring.k[0]).abs().max()
    assert first_layer < 1e-4
    if blocks <= 2 and sinks == "refresh":
        torch.testing.assert_close(after.ring.v, before.ring.v, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("window", "sink"), [(2, 1), (4, 0), (6, 1), (8, 0), (3, 2)])
def test_another_window_equals_a_fresh_stream_of_the_same_latents(window, sink):
    generator = started(6, keep_frames=12)
    generator.reconfigure(window_frames=window, sink_frames=sink)
    stream = replace(STREAM, window_frames=window, sink_frames=sink)
    engine = fresh_engine(embedding(1), stream)
    if sink:
        engine.prefill(patchify(latents_of(generator, 0, sink)), timestep=0, history_start=0)
    start = 12 - window
    engine.prefill(patchify(latents_of(generator, start, 12)), timestep=0, history_start=start * TOKENS)
    assert_same(generator.engine.snapshot(), engine.snapshot())
    collect(generator, 2)
    assert generator.position == (16,)


def test_the_distance_of_the_sinks_changes_between_blocks_and_is_saved(tmp_path):
    generator = started(6)
    growing = generator.engine
    generator.reconfigure(sink_distance="bounded")
    stream = replace(STREAM, sink_distance="bounded")
    assert generator.engine.stream == stream
    engine = fresh_engine(embedding(1), stream)
    engine.prefill(patchify(latents_of(generator, 0, 1)), timestep=0, history_start=0)
    engine.prefill(patchify(latents_of(generator, 8, 12)), timestep=0, history_start=8 * TOKENS)
    bounded = generator.engine.snapshot()
    assert_same(bounded, engine.snapshot())
    assert (bounded.ring.k[1] - growing.snapshot().ring.k[1]).abs().max() > 1e-5
    generator.save(tmp_path / "stream.safetensors")
    again = make_generator(stream, sampler=SAMPLER)
    again.load(tmp_path / "stream.safetensors")
    assert np.array_equal(collect(again, 2), collect(generator, 2))
    with pytest.raises(CheckpointError, match="sink_distance 'growing', got 'bounded'"):
        make_generator(sampler=SAMPLER).load(tmp_path / "stream.safetensors")
    generator.reconfigure(sink_distance="growing")
    assert generator.engine.stream == STREAM
    with pytest.raises(ConfigError, match="sink_distance: expected one of"):
        generator.reconfigure(sink_distance="near")
    assert generator.engine.stream == STREAM


def test_step_counts_change_between_blocks_without_touching_the_rings():
    generator = started(3)
    before = generator.engine
    generator.reconfigure(sampler=replace(SAMPLER, timesteps=(1000, 750, 500, 250)))
    assert generator.engine is before
    assert len(collect(generator, 1)) == 8


def test_windows_and_noise_changed_at_once_give_what_the_noise_first_and_then_the_windows_give():
    noisy = replace(SAMPLER, context_noise=200)
    at_once, in_turn = started(6), started(6)
    at_once.reconfigure(window_frames=3, sampler=noisy)
    in_turn.reconfigure(sampler=noisy)
    in_turn.reconfigure(window_frames=3)
    assert_same(state_of(at_once), state_of(in_turn))


def test_a_failed_change_of_windows_leaves_the_stream_as_it_was():
    generator = started(8)
    before, engine = state_of(generator), generator.engine
    for bad in ({"window_frames": 12}, {"window_frames": 1}, {"sink_frames": -1}):
        with pytest.raises(ConfigError):
            generator.reconfigure(**bad, sampler=replace(SAMPLER, timesteps=(1000,)))
    with pytest.raises(ConfigError, match="guidance: expected it to stay off"):
        generator.reconfigure(sampler=GUIDED)
    assert generator.engine is engine
    assert generator.sampler == SAMPLER
    assert_same(state_of(generator), before)


def test_lanes_are_streams_of_their_own():
    alone = make_generator(sampler=SAMPLER)
    expected = collect(alone, 4, prompt=embedding(2), seed=7)
    generator = make_generator(sampler=SAMPLER, lanes=2)
    collect(generator, 3, prompt=embedding(1), lane=1)
    frames = [collect(generator, 2, prompt=embedding(2), seed=7)]
    collect(generator, 1, lane=1)
    generator.set_prompt(embedding(3), lane=1)
    frames.append(collect(generator, 2))
    assert np.array_equal(np.concatenate(frames), expected)
    assert generator.position == (8, 8)
    generator.reset(1)
    assert generator.position == (8, 0)
    with pytest.raises(ConfigError, match="expected lane 1 to have one"):
        collect(generator, 1, lane=1)


def test_a_finished_video_is_continued_as_if_its_latents_had_been_streamed():
    frames = clip(29)
    generator = make_generator(sampler=SAMPLER, keep_frames=16)
    made = collect(generator, 2, prompt=embedding(1), context=frames, seed=3)
    assert generator.position == (12,)
    vae = WanVAE(tiny_autoencoder())
    latents = vae.encode(2 * torch.from_numpy(frames).float().permute(3, 0, 1, 2)[None] / 255 - 1)[0]
    torch.testing.assert_close(latents_of(generator, 0, 8), latents, atol=1e-4, rtol=1e-4)
    engine = fresh_engine(embedding(1))
    for start in range(0, 12, 2):
        engine.step(patchify(latents_of(generator, start, start + 2)), timestep=0)
    torch.testing.assert_close(generator.engine.snapshot().ring.k, engine.snapshot().ring.k, atol=1e-4, rtol=1e-4)
    whole = to_pixels(vae.decode(latents_of(generator, 0, 12))[0])[0].numpy()
    assert np.abs(whole[29:].astype(int) - made.astype(int)).max() <= 1


@pytest.mark.parametrize(("sinks", "calls"), [("keep", 0), ("refresh", 0), ("refresh", 1)])
def test_a_prompt_switch_that_fails_leaves_the_stream_as_it_was(monkeypatch, sinks, calls):
    generator = started(6)
    before = state_of(generator)
    with monkeypatch.context() as patch:
        fail_after(patch, generator.engine.model.blocks[1], "forward", calls, RuntimeError("broken"))
        with pytest.raises(RuntimeError, match="broken"):
            generator.set_prompt(embedding(2), sinks=sinks)
    assert_same(state_of(generator), before)


def test_a_context_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    generator = started(4)
    before = state_of(generator)
    with monkeypatch.context() as patch:
        fail_after(patch, generator.decoder, "decode", 2, RuntimeError("broken"))
        with pytest.raises(RuntimeError, match="broken"):
            collect(generator, 1, prompt=embedding(2), context=clip(29))
    assert_same(state_of(generator), before)
