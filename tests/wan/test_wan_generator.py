"""The block-by-block loop over a tiny Wan: what it streams, and that prompts, windows and files change nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from generator_cases import (
    STREAM,
    TOKENS,
    assert_same,
    clip,
    collect,
    embedding,
    latents_of,
    make_generator,
    state_of,
    tiny_autoencoder,
    tiny_wan,
)

pytest.importorskip("diffusers")

from dataclasses import replace

from swba_infer import FullSequence, StreamConfig, StreamingEngine
from swba_infer.errors import CheckpointError, ConfigError, NumericsError
from swba_infer.models.wan import patchify, unpatchify
from swba_infer.sampling import draw_noise
from swba_infer.wan.prompts import PromptSchedule
from swba_infer.wan.sampler import RenoisingSampler
from swba_infer.wan.text import EmbeddedPrompts
from swba_infer.wan.vae import WanVAE, to_pixels

SAMPLER = RenoisingSampler(timesteps=(1000, 500))
GUIDED = RenoisingSampler(timesteps=(1000, 500), guidance=3.0)


def started(blocks: int = 4, **options: Any) -> Any:
    """Return a generator that has streamed some blocks."""
    generator = make_generator(**{"sampler": SAMPLER, **options})
    negative = embedding(9) if generator.sampler.guidance != 1 else None
    collect(generator, blocks, prompt=embedding(1), seed=3, negative=negative)
    return generator


@pytest.mark.parametrize("context_noise", [0.0, 100.0])
@pytest.mark.parametrize(
    "stream",
    [
        STREAM,
        replace(STREAM, sink_frames=0),
        replace(STREAM, window_frames=3),
        replace(STREAM, first_block_frames=1),
        replace(STREAM, sink_distance="bounded"),
    ],
    ids=["sinks", "no sinks", "odd window", "first block", "bounded sinks"],
)
def test_a_stream_is_what_full_recomputation_of_every_step_gives(stream, context_noise):
    """Without engine, rings or decoder cache: the whole sequence through the model for each denoising step."""
    sampler = replace(SAMPLER, context_noise=context_noise)
    generator = make_generator(stream, sampler=sampler, keep_frames=16)
    frames = collect(generator, 5, prompt=embedding(1), seed=3)
    model, state = tiny_wan(), generator.engine.model.encode_prompt(embedding(1)[None])
    clean: list[torch.Tensor] = []
    past: list[torch.Tensor] = []
    level = sampler.commit.timestep

    def predict(x: torch.Tensor, timestep: float) -> torch.Tensor:
        tokens = torch.cat([*past, patchify(x)], dim=1)
        count = tokens.shape[1] // TOKENS
        times = torch.full((1, count), level)
        times[:, -x.shape[2] :] = timestep
        with torch.no_grad():
            out = model(tokens, FullSequence(stream, 1, tokens.shape[1], state=state), timestep=times)
        return unpatchify(out[:, -x.shape[2] * TOKENS :], 4, 6)

    for block in range(5):
        size = stream.first_block_frames if block == 0 and stream.first_block_frames else 2
        key = (3, 0, sum(x.shape[2] for x in clean))
        x = draw_noise(*key, 0, (1, 4, size, 4, 6))
        steps = sampler.schedule()
        x0 = x - steps[0].level * predict(x, steps[0].timestep)
        x = torch.lerp(x0, draw_noise(*key, 1, x0.shape), steps[1].level)
        x0 = x - steps[1].level * predict(x, steps[1].timestep)
        clean.append(x0)
        noisy = torch.lerp(x0, draw_noise(*key, 2, x0.shape), context_noise / 1000) if context_noise else x0
        past.append(patchify(noisy))
    whole = torch.cat(clean, dim=2)
    torch.testing.assert_close(latents_of(generator, 0, whole.shape[2]), whole, atol=1e-4, rtol=1e-4)
    pixels = to_pixels(WanVAE(tiny_autoencoder()).decode(whole)[0])[0].numpy()
    assert frames.shape == pixels.shape == (1 + 4 * (whole.shape[2] - 1), 32, 48, 3)
    assert np.abs(frames.astype(int) - pixels.astype(int)).max() <= 1


def test_seeds_give_identical_videos_and_other_seeds_other_ones():
    a, b, c = (collect(make_generator(sampler=SAMPLER), 3, prompt=embedding(1), seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_a_stream_may_be_read_in_parts_and_frames_are_cut_only_at_its_end():
    whole = list(make_generator(sampler=SAMPLER).stream(embedding(1), frames=20))
    generator = make_generator(sampler=SAMPLER)
    parts = list(generator.stream(embedding(1), frames=5)) + list(generator.stream(frames=15))
    assert np.array_equal(np.stack(whole), np.stack(parts))
    assert len(list(generator.stream(frames=3))) == 3
    assert generator.position == (8,)


def fresh_engine(generator: Any, text: torch.Tensor, stream: StreamConfig = STREAM) -> StreamingEngine:
    engine = StreamingEngine(tiny_wan(), stream)
    for name, value in engine.model.encode_prompt(text[None]).items():
        engine.set_state(name, value)
    return engine


def test_a_prompt_switch_equals_a_fresh_stream_of_the_same_latents_under_the_new_prompt():
    generator = started(6)
    generator.set_prompt(embedding(2), sinks="refresh")
    engine = fresh_engine(generator, embedding(2))
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
    engine = fresh_engine(generator, embedding(1), stream)
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
    engine = fresh_engine(generator, embedding(1), stream)
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


def test_guidance_is_the_combination_of_two_streams_by_hand():
    generator = make_generator(sampler=GUIDED)
    collect(generator, 3, prompt=embedding(1), negative=embedding(9), seed=3)
    engines = [StreamingEngine(tiny_wan(), STREAM) for _ in range(2)]
    for engine, text in zip(engines, (embedding(1), embedding(9)), strict=True):
        for name, value in engine.model.encode_prompt(text[None]).items():
            engine.set_state(name, value)
    steps = GUIDED.schedule()
    for block in range(3):
        x = draw_noise(3, 0, 2 * block, 0, (1, 4, 2, 4, 6))
        for i, step in enumerate(steps):
            flows = [unpatchify(e.step(patchify(x), commit=False, timestep=step.timestep), 4, 6) for e in engines]
            clean = x - step.level * (flows[1] + 3 * (flows[0] - flows[1]))
            if i == 0:
                x = torch.lerp(clean, draw_noise(3, 0, 2 * block, 1, clean.shape), steps[1].level)
        for engine in engines:
            engine.step(patchify(clean), timestep=0.0)
        torch.testing.assert_close(latents_of(generator, 2 * block, 2 * block + 2), clean, atol=1e-4, rtol=1e-4)


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
    engine = fresh_engine(generator, embedding(1))
    for start in range(0, 12, 2):
        engine.step(patchify(latents_of(generator, start, start + 2)), timestep=0)
    torch.testing.assert_close(generator.engine.snapshot().ring.k, engine.snapshot().ring.k, atol=1e-4, rtol=1e-4)
    whole = to_pixels(vae.decode(latents_of(generator, 0, 12))[0])[0].numpy()
    assert np.abs(whole[29:].astype(int) - made.astype(int)).max() <= 1


def test_prompts_over_time_switch_with_the_first_block_at_or_after_their_time():
    generator = make_generator(sampler=SAMPLER, fps=8.0)
    schedule = PromptSchedule((0.0, 1.0), ("a", "b"))
    frames = collect(generator, 4, prompt=EmbeddedPrompts(schedule, torch.stack([embedding(1), embedding(2)])))
    by_hand = make_generator(sampler=SAMPLER)
    expected = [collect(by_hand, 2, prompt=embedding(1))]
    by_hand.set_prompt(embedding(2))
    expected.append(collect(by_hand, 2))
    assert np.array_equal(frames, np.concatenate(expected))


def fail_after(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, calls: int, error: BaseException) -> None:
    real, count = getattr(target, name), iter(range(calls))

    def failing(*args: Any, **options: Any) -> Any:
        if next(count, None) is None:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(target, name, failing)


@pytest.mark.parametrize(
    ("part", "name", "calls"),
    [("engine", "step", 1), ("engine", "step", 2), ("decoder", "decode", 0)],
    ids=["drawing", "committing", "decoding"],
)
def test_a_block_that_fails_leaves_the_stream_as_it_was(monkeypatch, part, name, calls):
    expected = collect(started(4), 2)
    generator = started(4)
    before = state_of(generator)
    with monkeypatch.context() as patch:
        fail_after(patch, getattr(generator, part), name, calls, RuntimeError("broken"))
        with pytest.raises(RuntimeError, match="broken"):
            collect(generator, 1)
    generator.engine.cache.abort()
    assert state_of(generator)[0] == before[0]
    assert_same(state_of(generator)[3:], before[3:])
    assert np.array_equal(collect(generator, 2), expected)


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


def test_nan_stops_the_stream_at_its_block(monkeypatch):
    generator = started(3)
    before = state_of(generator)
    with monkeypatch.context() as patch:
        patch.setattr(RenoisingSampler, "to_clean", staticmethod(lambda x, flow, level: x * float("nan")))
        with pytest.raises(NumericsError, match=r"block 3 \(latent frame 6\)"):
            collect(generator, 1)
    assert_same(state_of(generator)[3:], before[3:])
    assert generator.position == (6,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected lane 0 to have one"),
        ({"prompt": "a cat"}, "no text encoder"),
        ({"prompt": torch.zeros(1, 2, 3)}, r"prompt: expected an embedding \[tokens, channels\]"),
        ({"prompt": 3}, "prompt: expected text"),
        ({"prompt": embedding(1), "negative": embedding(2)}, "negative: expected none without guidance"),
        ({"prompt": embedding(1), "lane": 1}, "lane: expected an int in 0 to 0"),
        ({"prompt": embedding(1), "frames": -1}, "frames: expected an int of at least 0"),
        ({"prompt": embedding(1), "seed": 1.5}, "seed: expected an int"),
        ({"prompt": embedding(1), "sinks": "drop"}, "sinks: expected one of"),
        ({"prompt": embedding(1), "context": clip(4)}, r"context: expected uint8 \[1 \+ 4 n, 32, 48, 3\]"),
        ({"prompt": embedding(1), "context": clip(5)[:, :-1]}, "context: expected"),
        ({"prompt": embedding(1), "context": clip(5) / 255}, "context: expected"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_generated(options, message):
    generator = make_generator(sampler=SAMPLER)
    with pytest.raises(ConfigError, match=message):
        collect(generator, 1, **options)
    assert generator.position == (0,)


def test_guidance_needs_a_negative_prompt():
    generator = make_generator(sampler=GUIDED)
    with pytest.raises(ConfigError, match="no negative prompt"):
        collect(generator, 1, prompt=embedding(1))


def test_parts_that_do_not_fit_are_refused():
    from swba_infer.wan.generator import WanGenerator

    vae = WanVAE(tiny_autoencoder())
    with pytest.raises(ConfigError, match="stream: expected 6 tokens"):
        WanGenerator(tiny_wan(), vae, replace(STREAM, tokens_per_frame=5))
    with pytest.raises(ConfigError, match="keep_frames: expected an int of at least 5"):
        WanGenerator(tiny_wan(), vae, STREAM, keep_frames=4)
    for name, kind in (("stream", "StreamConfig"), ("sampler", "RenoisingSampler")):
        with pytest.raises(ConfigError, match=f"{name}: expected a {kind}, got int"):
            WanGenerator(tiny_wan(), vae, **{name: 4})
    with pytest.raises(ConfigError, match="sampler: expected a RenoisingSampler, got int"):
        WanGenerator(tiny_wan(), vae, STREAM).reconfigure(window_frames=2, sampler=4)


def test_a_long_stream_keeps_its_memory_and_its_position_is_absolute():
    generator = make_generator(sampler=replace(SAMPLER, timesteps=(1000,)))
    collect(generator, 6, prompt=embedding(1))
    before = generator.engine.memory(), generator.decoder.bytes, generator._lanes[0].history.last.nbytes
    collect(generator, 20)
    assert (generator.engine.memory(), generator.decoder.bytes, generator._lanes[0].history.last.nbytes) == before
    assert generator.position == (52,)
