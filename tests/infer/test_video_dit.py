from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from swba_infer.config import StreamConfig
from swba_infer.context import FullSequence
from swba_infer.engine import StreamingEngine
from swba_infer.errors import ConfigError
from swba_infer.models.video_dit import VideoDiT, VideoDiTConfig, patchify, unpatchify

CONFIG = VideoDiTConfig(height=24, width=36, dim=32, depth=2, heads=4, kv_heads=2, mlp=48, cell_dim=8)
STREAM = StreamConfig(tokens_per_frame=6, frames_per_block=1, window_frames=3)
BOUNDED = replace(STREAM, sink_frames=2, sink_distance="bounded")


@pytest.fixture
def model() -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def inputs(frames: int, lanes: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(lanes, 6 * frames, 432), torch.rand(lanes, frames), torch.randint(0, 7, (lanes, frames))


def full(
    model: VideoDiT, tokens: torch.Tensor, t: torch.Tensor, action: torch.Tensor, stream: StreamConfig = STREAM
) -> torch.Tensor:
    return model(tokens, FullSequence(stream, *tokens.shape[:2]), timestep=t, action=action)


def test_patches_round_trip():
    frames = torch.randint(0, 256, (2, 3, 24, 36, 3), dtype=torch.uint8)
    tokens = patchify(frames, 12)
    assert tokens.shape == (2, 18, 432)
    assert torch.equal(unpatchify(tokens, 24, 36, 12), frames)


def test_cells_of_a_token_stay_where_its_pixels_are(model):
    """The stem's cells lie as in the picture, and the head puts them back."""
    frames = torch.randint(0, 256, (1, 1, 24, 36, 3), dtype=torch.uint8)
    picture = frames[0, 0].permute(2, 0, 1).float() / 127.5 - 1
    model.stem_in = torch.nn.Identity()
    model.stem_out = torch.nn.Identity()
    cells = model._stem(patchify(frames, 12))
    silu = torch.nn.functional.silu(picture.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 3, 4, 0).flatten(2))
    torch.testing.assert_close(cells[0].permute(1, 2, 0), silu)


@pytest.mark.parametrize("stream", [STREAM, BOUNDED], ids=["growing", "bounded"])
def test_streaming_equals_the_full_sequence(model, stream):
    tokens, t, action = inputs(9)
    with torch.no_grad():
        expected = full(model, tokens, t, action, stream)
        engine = StreamingEngine(model, stream, lanes=2)
        parts = [engine.prefill(tokens[:, :12], timestep=t[:, :2], action=action[:, :2])]
        for f in range(2, 9):
            frame = tokens[:, 6 * f : 6 * f + 6]
            engine.step(torch.randn_like(frame), commit=False, timestep=1.0, action=3)
            parts.append(engine.step(frame, timestep=t[:, f], action=action[:, f]))
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=2e-5, rtol=2e-5)


def test_a_frame_sees_nothing_after_it_and_nothing_before_its_layers_reach(model):
    tokens, t, action = inputs(8, lanes=1)
    with torch.no_grad():
        base = full(model, tokens, t, action)
        changed = tokens.clone()
        changed[:, 30:36] += 1
        difference = (full(model, changed, t, action) - base).abs().amax(-1)[0].unflatten(0, (8, 6)).amax(1)
    assert difference[:5].max() == 0
    assert difference[5:].min() > 0


def test_action_and_level_of_a_frame_change_that_frame(model):
    tokens, t, action = inputs(3, lanes=1)
    with torch.no_grad():
        base = full(model, tokens, t, action)
        acted = full(model, tokens, t, (action + torch.tensor([[0, 0, 1]])) % 7)
        assert (acted - base)[:, :12].abs().max() == 0
        assert (acted - base)[:, 12:].abs().max() > 1e-4


def test_scalar_and_per_frame_conditioning_agree(model):
    tokens, _, _ = inputs(3)
    with torch.no_grad():
        scalar = full(model, tokens, torch.tensor(0.5), torch.tensor(2))
        spread = full(model, tokens, torch.full((2, 3), 0.5), torch.full((2, 3), 2))
    assert torch.equal(scalar, spread)


def test_bounded_sinks_show_once_the_stream_is_longer_than_they_and_the_window(model):
    tokens, t, action = inputs(8)
    with torch.no_grad():
        bounded = full(model, tokens, t, action, BOUNDED)
        growing = full(model, tokens, t, action, replace(BOUNDED, sink_distance="growing"))
    torch.testing.assert_close(bounded[:, :30], growing[:, :30])
    assert (bounded - growing)[:, 30:].abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("stream", [STREAM, BOUNDED], ids=["growing", "bounded"])
def test_every_parameter_gets_a_gradient(model, stream):
    tokens, t, action = inputs(6)
    full(model, tokens, t, action, stream).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "bad",
    [{"patch": 10}, {"heads": 5}, {"kv_heads": 4}, {"depth": 0}, {"dim": True}],
)
def test_bad_sizes_are_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        VideoDiTConfig(**bad)


def test_config_dicts_are_strict():
    assert VideoDiTConfig.from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ConfigError, match="colour"):
        VideoDiTConfig.from_dict({"colour": 1})
