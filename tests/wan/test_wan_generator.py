"""The block-by-block loop over a tiny Wan: what it streams, guided and over time, and what it refuses."""

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
    latents_of,
    make_generator,
    sizes_of,
    started,
    state_of,
    tiny_autoencoder,
    tiny_wan,
)

pytest.importorskip("diffusers")

from dataclasses import replace

from swba_infer import FullSequence, StreamingEngine
from swba_infer.errors import ConfigError, NumericsError
from swba_infer.models.wan import patchify, unpatchify
from swba_infer.sampling import draw_noise
from swba_infer.wan.prompts import PromptSchedule
from swba_infer.wan.sampler import RenoisingSampler
from swba_infer.wan.text import EmbeddedPrompts
from swba_infer.wan.vae import WanVAE, to_pixels

TWO = PromptSchedule((0.0, 1.0), ("a", "b"))


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


def test_prompts_over_time_switch_with_the_first_block_at_or_after_their_time():
    generator = make_generator(sampler=SAMPLER, fps=8.0)
    frames = collect(generator, 4, prompt=EmbeddedPrompts(TWO, torch.stack([embedding(1), embedding(2)])))
    by_hand = make_generator(sampler=SAMPLER)
    expected = [collect(by_hand, 2, prompt=embedding(1))]
    by_hand.set_prompt(embedding(2))
    expected.append(collect(by_hand, 2))
    assert np.array_equal(frames, np.concatenate(expected))


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
        ({"prompt": torch.ones(2, 24, dtype=torch.int64)}, "prompt: expected floating embeddings .* got torch.int64"),
        ({"prompt": embedding(1) * float("nan")}, "prompt: expected finite embeddings"),
        ({"prompt": EmbeddedPrompts(TWO, embedding(1)[None])}, r"prompt: expected floating embeddings \[2 prompts"),
        ({"prompt": EmbeddedPrompts("a", embedding(1)[None])}, "prompt.schedule: expected a PromptSchedule, got str"),
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
    before = sizes_of(generator)
    collect(generator, 20)
    assert sizes_of(generator) == before
    assert generator.position == (52,)
