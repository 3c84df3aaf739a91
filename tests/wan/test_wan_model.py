"""What a Wan transformer takes and refuses, and that it trains, streams, saves and compiles like any model here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from wan_files import SIZES

from swba_infer import FullSequence, StreamConfig, StreamingEngine
from swba_infer.errors import CheckpointError, ConfigError, StreamStateError
from swba_infer.models.wan import WanBlock, WanTransformer, patchify, unpatchify
from swba_infer.models.wan_config import PRESETS, WanConfig
from swba_infer.wan.synthetic import random_wan

TOKENS = SIZES.tokens_per_frame
STREAM = StreamConfig(tokens_per_frame=TOKENS, frames_per_block=2, window_frames=4, sink_frames=1)
BOUNDED = replace(STREAM, sink_distance="bounded")


@pytest.fixture(scope="module")
def model() -> WanTransformer:
    return random_wan(SIZES, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randn(2, 5, SIZES.text_dim, generator=torch.Generator().manual_seed(3))


def draw(frames: int, lanes: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(lanes, frames * TOKENS, SIZES.token_channels, generator=generator)


def engine_of(model: WanTransformer, text: Tensor, stream: StreamConfig = STREAM) -> StreamingEngine:
    engine = StreamingEngine(model, stream, lanes=2)
    for name, value in model.encode_prompt(text).items():
        engine.set_state(name, value)
    return engine


def test_patches_round_trip_and_hold_the_pixels_of_their_place():
    latents = torch.randn(2, 4, 3, 4, 6)
    tokens = patchify(latents)
    assert tokens.shape == (2, 3 * TOKENS, 16)
    assert torch.equal(unpatchify(tokens, 4, 6), latents)
    frame, row, column = 2, 1, 2
    cell = latents[:, :, frame, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    assert torch.equal(tokens[:, frame * TOKENS + row * 3 + column], cell.flatten(1))


@pytest.mark.parametrize("stream", [STREAM, BOUNDED], ids=["growing", "bounded"])
def test_streaming_equals_the_full_sequence(model, text, stream):
    tokens = draw(14)
    context = FullSequence(stream, 2, 14 * TOKENS, state=model.encode_prompt(text))
    with torch.no_grad():
        expected = model(tokens, context, timestep=0.0)
    engine = engine_of(model, text, stream)
    parts = [engine.prefill(tokens[:, : 4 * TOKENS], timestep=0)]
    for start in range(4 * TOKENS, 14 * TOKENS, STREAM.block_tokens):
        block = tokens[:, start : start + STREAM.block_tokens]
        engine.step(torch.randn_like(block), commit=False, timestep=1000.0)
        parts.append(engine.step(block, timestep=0))
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_switch_changes_its_lane_only_and_padding_counts(model, text):
    tokens = draw(2)
    engine = engine_of(model, text)
    before = engine.step(tokens, commit=False, timestep=500)
    padded = torch.nn.functional.pad(text, (0, 0, 0, 512 - 5))
    for name, value in model.encode_prompt(padded).items():
        engine.set_state(name, value)
    assert torch.equal(engine.step(tokens, commit=False, timestep=500), before)
    for name, value in model.encode_prompt(text[:1] + 1).items():
        engine.set_state(name, value, lanes=1)
    after = engine.step(tokens, commit=False, timestep=500)
    assert torch.equal(after[0], before[0])
    assert (after[1] - before[1]).abs().max() > 1e-3


def test_scalar_lane_and_frame_timesteps_agree_and_a_frames_timestep_is_its_own(model, text):
    tokens = draw(2)
    engine = engine_of(model, text)
    scalar = engine.step(tokens, commit=False, timestep=250)
    for timestep in (250.0, torch.full((2,), 250), torch.full((2, 2), 250.0)):
        assert torch.equal(engine.step(tokens, commit=False, timestep=timestep), scalar)
    mixed = engine.step(tokens, commit=False, timestep=torch.tensor([[250.0, 250.0], [250.0, 500.0]]))
    assert torch.equal(mixed[0], scalar[0])
    assert (mixed[1] - scalar[1])[TOKENS:].abs().max() > 1e-3


def test_bounded_sinks_show_once_the_stream_is_longer_than_they_and_the_window(model, text):
    tokens = draw(10)
    outs = []
    for stream in (STREAM, BOUNDED):
        context = FullSequence(stream, 2, 10 * TOKENS, state=model.encode_prompt(text))
        with torch.no_grad():
            outs.append(model(tokens, context, timestep=0.0))
    near = 4 * TOKENS
    torch.testing.assert_close(outs[0][:, :near], outs[1][:, :near])
    assert (outs[0] - outs[1])[:, near:].abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("stream", [STREAM, BOUNDED], ids=["growing", "bounded"])
def test_every_parameter_gets_a_gradient_the_prompts_path_included(text, stream):
    model = random_wan(SIZES, device="cpu", dtype=torch.float32).requires_grad_(True)
    context = FullSequence(stream, 2, 6 * TOKENS, state=model.encode_prompt(text))
    model(draw(6), context, timestep=torch.full((2, 6), 300.0)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_a_saved_stream_carries_its_prompt_and_knows_its_latent_size(model, text, tmp_path):
    tokens = draw(8)
    engine = engine_of(model, text)
    engine.prefill(tokens[:, : 6 * TOKENS], timestep=0)
    engine.save(tmp_path / "stream.safetensors")
    expected = engine.step(tokens[:, 6 * TOKENS :], timestep=0)
    again = StreamingEngine(model, STREAM, lanes=2)
    again.load(tmp_path / "stream.safetensors")
    assert torch.equal(again.step(tokens[:, 6 * TOKENS :], timestep=0), expected)
    turned = WanConfig.from_dict({**SIZES.to_dict(), "latent_height": 6, "latent_width": 4})
    other = StreamingEngine(random_wan(turned, device="cpu", dtype=torch.float32), STREAM, lanes=2)
    with pytest.raises(CheckpointError, match="latent_height"):
        other.load(tmp_path / "stream.safetensors")


@pytest.mark.parametrize("stream", [STREAM, BOUNDED], ids=["growing", "bounded"])
def test_what_lies_between_attention_calls_is_one_graph_for_all_layers(text, stream):
    """Through Dynamo without a code generator: no graph break, and no recompilation from layer to layer."""
    model = random_wan(SIZES, device="cpu", dtype=torch.float32)
    expected = engine_of(model, text, stream).step(draw(2), timestep=700)
    counter = CompileCounter()
    for block in model.blocks:
        assert isinstance(block, WanBlock)
        block.project = torch.compile(block.project, backend=counter, fullgraph=True, dynamic=False)
        block.absorb = torch.compile(block.absorb, backend=counter, fullgraph=True, dynamic=False)
    engine = engine_of(model, text, stream)
    for level in (700.0, 300.0, 700.0):
        out = engine.step(draw(2), commit=False, timestep=level)
    torch.testing.assert_close(out, expected)
    assert counter.frame_count == 2


@pytest.mark.parametrize("timestep", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, 2, 1)], ids=str)
def test_timesteps_that_do_not_fit_are_refused_and_the_stream_is_unchanged(model, text, timestep):
    engine = engine_of(model, text)
    with pytest.raises(StreamStateError, match=r"timestep: expected a scalar, \[2\] or \[2, 2\]"):
        engine.step(draw(2), timestep=timestep)
    assert engine.position == (0, 0)


def test_latents_and_prompts_of_the_wrong_size_are_refused(model, text):
    engine = engine_of(model, text)
    for tokens in (draw(2)[:, :-1], draw(2)[:, :, :-1]):
        with pytest.raises(StreamStateError, match=r"tokens: expected \[lanes, a multiple of 6, 16\] for latents"):
            engine.step(tokens, timestep=0)
    for bad in (text[0], text[..., :-1], text[:, :0], torch.zeros(2, 513, SIZES.text_dim)):
        with pytest.raises(StreamStateError, match=r"text: expected \[lanes, 1 to 512, 24\]"):
            model.encode_prompt(bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"num_layers": 0}, {"ffn_dim": 1.5}, {"num_attention_heads": True}, {"attention_head_dim": 12},
        {"freq_dim": 5}, {"eps": 0}, {"cross_attn_norm": 1}, {"latent_width": 7}, {"latent_height": 61},
    ],
    ids=str,
)  # fmt: skip
def test_bad_sizes_are_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        WanConfig(**bad)


def test_config_dicts_are_strict_and_presets_take_overrides():
    assert WanConfig.from_dict(SIZES.to_dict()) == SIZES
    with pytest.raises(ConfigError, match="colour"):
        WanConfig.from_dict({"colour": 1})
    for preset in PRESETS.values():
        assert preset(num_layers=3).num_layers == 3


def test_place_keeps_float32_where_to_does_not(model):
    placed = random_wan(SIZES, device="cpu", dtype=torch.float32).place(dtype=torch.bfloat16)
    assert placed.blocks[0].norm2.weight.dtype == torch.float32
    assert placed.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert placed.place("cpu").proj_out.weight.dtype == torch.bfloat16
    assert StreamingEngine(placed, STREAM).dtype == torch.bfloat16
