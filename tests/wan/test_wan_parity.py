"""The causal Wan transformer is diffusers' transformer under a block-window mask: whole, prefilled and streamed.

Float32 on the CPU, random weights: relative error below 1e-5.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers_wan import SIZES, as_ours, random_reference, relative_error, run_reference, window_mask
from torch import Tensor

from swba_infer import FullSequence, StreamConfig, StreamingEngine
from swba_infer.models.wan import WanTransformer

BOUND = 1e-5
TOKENS = SIZES.tokens_per_frame
STREAMS = {
    "1 frame a block": StreamConfig(tokens_per_frame=TOKENS, frames_per_block=1, window_frames=3),
    "1 frame a block, sinks": StreamConfig(tokens_per_frame=TOKENS, frames_per_block=1, window_frames=3, sink_frames=2),
    "3 frames a block": StreamConfig(tokens_per_frame=TOKENS, frames_per_block=3, window_frames=6),
    "3 frames a block, sinks": StreamConfig(
        tokens_per_frame=TOKENS, frames_per_block=3, window_frames=4, sink_frames=2
    ),
    "3 frames a block, first alone": StreamConfig(
        tokens_per_frame=TOKENS, frames_per_block=3, window_frames=5, sink_frames=1, first_block_frames=1
    ),
}


@pytest.fixture(scope="module")
def reference():
    return random_reference()


@pytest.fixture(scope="module")
def model(reference) -> WanTransformer:
    return as_ours(reference)


@pytest.fixture(params=STREAMS.values(), ids=STREAMS.keys())
def stream(request) -> StreamConfig:
    return request.param


def draw(frames: int, lanes: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return clean tokens of some frames, and text."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(lanes, frames * TOKENS, SIZES.token_channels, generator=generator)
    return tokens, torch.randn(lanes, 11, SIZES.text_dim, generator=generator)


def ready(model: WanTransformer, stream: StreamConfig, text: Tensor, **options) -> StreamingEngine:
    """Return an engine whose lanes have their prompts and whose rings hold NaN where nothing was written."""
    engine = StreamingEngine(model, stream, lanes=len(text), **options)
    for name, value in model.encode_prompt(text).items():
        engine.set_state(name, value)
    for ring in (engine.cache.k, engine.cache.v):
        ring.fill_(float("nan"))
    return engine


def block_frames(stream: StreamConfig, blocks: int) -> list[tuple[int, int]]:
    """Return first and last frame of each block."""
    ends = [(stream.first_block_frames or stream.frames_per_block) + i * stream.frames_per_block for i in range(blocks)]
    return list(zip([0, *ends], ends, strict=False))


def test_the_mask_is_the_pattern_of_the_stream(stream):
    frames = block_frames(stream, 4)[-1][1]
    mask, pattern = window_mask(stream, frames), stream.pattern
    ends = pattern.block_ends(frames * TOKENS)
    starts = [0, *ends[:-1]]
    for start, end in zip(starts, ends, strict=True):
        expected = torch.zeros(frames * TOKENS, dtype=torch.bool)
        expected[max(0, end - pattern.window) : end] = True
        expected[: min(pattern.sink, end)] = True
        assert torch.equal(mask[start:end], expected.expand(end - start, -1))


def test_a_full_sequence_with_a_timestep_a_frame_equals_diffusers(reference, model, stream):
    frames = block_frames(stream, 9)[-1][1]
    tokens, text = draw(frames)
    timestep = 1000 * torch.rand(2, frames, generator=torch.Generator().manual_seed(2))
    expected = run_reference(reference, stream, tokens, timestep, text)
    context = FullSequence(stream.pattern, 2, frames * TOKENS, state=model.encode_prompt(text))
    with torch.no_grad():
        actual = model(tokens, context, timestep=timestep)
    assert relative_error(actual, expected) < BOUND
    wider = run_reference(reference, replace(stream, window_frames=stream.window_frames + 1), tokens, timestep, text)
    assert relative_error(wider, expected) > 1000 * BOUND, "the window must matter to what is compared"


def test_every_denoising_and_commit_step_of_a_stream_equals_diffusers_from_frame_zero(reference, model, stream):
    """Four windows' worth of blocks, noisy steps at two levels, each against [clean blocks, noisy block] recomputed."""
    ranges = block_frames(stream, 4 * -(-stream.window_frames // stream.frames_per_block))
    tokens, text = draw(ranges[-1][1])
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3))
    engine = ready(model, stream, text)
    for first, end in ranges:
        block = slice(first * TOKENS, end * TOKENS)
        for level in (1.0, 0.625, 0.0):
            noisy = torch.lerp(tokens[:, block], noise[:, block], level)
            actual = engine.step(noisy, commit=level == 0, timestep=1000 * level)
            timestep = torch.zeros(2, end)
            timestep[:, first:] = 1000 * level
            history = torch.cat((tokens[:, : first * TOKENS], noisy), dim=1)
            expected = run_reference(reference, stream, history, timestep, text)[:, first * TOKENS :]
            assert relative_error(actual, expected) < BOUND, (first, level)
    assert engine.position == (ranges[-1][1] * TOKENS,) * 2


def test_prefill_on_an_empty_stream_and_on_history_equals_diffusers(reference, model, stream):
    ranges = block_frames(stream, 9)
    tokens, text = draw(ranges[-1][1])
    expected = run_reference(reference, stream, tokens, torch.zeros(2, ranges[-1][1]), text)
    engine = ready(model, stream, text)
    cuts = [0, ranges[3][1] * TOKENS, ranges[7][1] * TOKENS]
    parts = [engine.prefill(tokens[:, a:b], timestep=0) for a, b in pairwise(cuts)]
    parts.append(engine.step(tokens[:, cuts[-1] :], timestep=0))
    assert relative_error(torch.cat(parts, 1), expected) < BOUND


def test_lanes_have_prompts_positions_and_timesteps_of_their_own(reference, model):
    stream = STREAMS["3 frames a block, sinks"]
    tokens, text = draw(12, lanes=3)
    engine = ready(model, stream, text)
    step = stream.block_tokens
    engine.prefill(tokens[:2, : 2 * step], lanes=[0, 1], timestep=0)
    engine.prefill(tokens[2:, :step], lanes=2, timestep=0)
    level = torch.tensor([[0.0, 250.0, 500.0], [750.0, 1000.0, 125.0]])
    parts = torch.cat((tokens[2:, step : 2 * step], tokens[1:2, 2 * step : 3 * step]))
    actual = engine.step(parts, commit=False, lanes=[2, 1], timestep=level)
    for row, (lane, blocks) in enumerate(((2, 1), (1, 2))):
        timestep = torch.cat((torch.zeros(1, 3 * blocks), level[row : row + 1]), dim=1)
        one = slice(lane, lane + 1)
        expected = run_reference(reference, stream, tokens[one, : (blocks + 1) * step], timestep, text[one])
        assert relative_error(actual[row], expected[0, blocks * step :]) < BOUND, lane


def test_a_stream_has_no_last_frame(model):
    """Only distances matter without sinks, so a million frames later the same window gives the same flow."""
    stream = STREAMS["3 frames a block"]
    tokens, text = draw(12)
    context = FullSequence(stream.pattern, 2, 12 * TOKENS, state=model.encode_prompt(text))
    with torch.no_grad():
        early = model(tokens, context, timestep=500)
        context.positions = context.positions + 1_000_000 * TOKENS
        late = model(tokens, context, timestep=500)
        context.positions = context.positions + torch.arange(12 * TOKENS) // TOKENS * TOKENS
        stretched = model(tokens, context, timestep=500)
    assert relative_error(late, early) < BOUND
    assert relative_error(stretched, early) > 1000 * BOUND, "distances must matter to what is compared"


@pytest.mark.parametrize(
    "sizes",
    [{"attention_head_dim": 16}, {"attention_head_dim": 128, "num_attention_heads": 1}, {"cross_attn_norm": False}],
    ids=str,
)
def test_other_sizes_equal_diffusers_too(sizes):
    config = replace(SIZES, **sizes)
    reference = random_reference(config, seed=4)
    model = as_ours(reference, config)
    stream = STREAMS["3 frames a block, sinks"]
    tokens, text = draw(12)
    timestep = torch.full((2, 12), 500.0)
    expected = run_reference(reference, stream, tokens, timestep, text, config)
    context = FullSequence(stream.pattern, 2, 12 * TOKENS, state=model.encode_prompt(text))
    with torch.no_grad():
        assert relative_error(model(tokens, context, timestep=timestep), expected) < BOUND


def test_bfloat16_errs_no_more_than_diffusers_in_bfloat16(reference, model):
    """Against float32: norms, modulation and time are float32 in both."""
    stream = STREAMS["3 frames a block, sinks"]
    tokens, text = draw(12)
    timestep = torch.full((2, 12), 750.0)
    exact = run_reference(reference, stream, tokens, timestep, text)
    narrow = random_reference().to(torch.bfloat16)
    for name, parameter in narrow.named_parameters():
        if set(name.split(".")) & set(narrow._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    theirs = run_reference(narrow, stream, tokens.bfloat16(), timestep, text.bfloat16()).float()
    ours = as_ours(reference).place(dtype=torch.bfloat16)
    assert ours.condition_embedder.time_proj.weight.dtype == torch.float32
    context = FullSequence(stream.pattern, 2, 12 * TOKENS, state=ours.encode_prompt(text))
    with torch.no_grad():
        actual = ours(tokens.bfloat16(), context, timestep=timestep).float()
    assert relative_error(actual, exact) <= relative_error(theirs, exact)
