"""Sinks at a bounded distance: which positions see them, what that means, and who is told of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from cache_cases import draw_qkv, make_cache
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import TinyModel, rotate
from torch import Tensor

from swba_infer import CheckpointError, ConfigError, FullSequence, StreamConfig, StreamingEngine, StreamStateError

STREAM = StreamConfig(
    tokens_per_frame=3, frames_per_block=2, window_frames=5, sink_frames=2, first_block_frames=1,
    sink_distance="bounded",
)  # fmt: skip
GROWING = replace(STREAM, sink_distance="growing")


def test_positions_are_nearer_by_the_whole_frames_that_the_block_is_past_sink_and_window() -> None:
    positions = torch.tensor([[0, 17, 20, 21, 23, 30, 3_000_000]])
    ends = torch.tensor([[3, 21, 21, 22, 24, 33, 3_000_003]])
    assert STREAM.sink_positions(positions, ends).tolist() == [[0, 17, 20, 21, 20, 18, 18]]


def test_the_farthest_query_is_never_farther_than_sink_and_window() -> None:
    ends = FullSequence(STREAM, 1, 3000).pattern.ends(3000)
    context = FullSequence(STREAM, 1, 3000)
    assert context.sink_positions is not None
    assert int(context.sink_positions.max()) < STREAM.capacity_tokens
    near = ends <= STREAM.capacity_tokens
    assert torch.equal(context.sink_positions[0, near], context.positions[0, near])
    assert int(context.sink_positions[0, ~near].min()) >= STREAM.sink_tokens
    assert ((context.positions - context.sink_positions) % STREAM.tokens_per_frame == 0).all()


@pytest.mark.parametrize("stream", [GROWING, replace(STREAM, sink_frames=0)])
def test_streams_without_bounded_sinks_have_no_second_positions(stream) -> None:
    assert not stream.bounds_sinks
    assert FullSequence(stream, 1, 9).sink_positions is None
    assert FullSequence(stream.pattern, 1, 9).sink_positions is None
    engine, seen = watched(stream)
    engine.prefill(torch.randn(1, 9, 3))
    assert seen == [None]


def watched(stream: StreamConfig, lanes: int = 1) -> tuple[StreamingEngine, list[Tensor | None]]:
    """Return an engine and the list of the sink positions that its model will be shown."""
    model, seen = TinyModel(), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[1].sink_positions))
    return StreamingEngine(model, stream, lanes=lanes), seen


def test_steps_and_prefills_show_the_positions_of_the_full_sequence() -> None:
    engine, seen = watched(STREAM, lanes=2)
    whole = FullSequence(STREAM, 2, 63).sink_positions
    engine.prefill(torch.randn(2, 27, 3))
    for _ in range(2):
        engine.step(torch.randn(2, 6, 3))
    engine.prefill(torch.randn(2, 24, 3))
    torch.testing.assert_close(torch.cat([x for x in seen if x is not None], dim=1), whole)


def test_lanes_show_their_own_positions_and_a_short_block_ends_where_it_ends() -> None:
    engine, seen = watched(STREAM, lanes=3)
    engine.prefill(torch.randn(1, 45, 3), lanes=[2])
    engine.prefill(torch.randn(1, 9, 3), lanes=[0])
    seen.clear()
    engine.step(torch.randn(2, 4, 3), lanes=[2, 0])
    assert seen[0].tolist() == [[45 - 27 + i for i in range(4)], [9 + i for i in range(4)]]


def test_a_prefill_that_builds_the_history_anew_counts_blocks_from_its_end() -> None:
    engine, seen = watched(STREAM)
    engine.prefill(torch.randn(1, 63, 3))
    seen.clear()
    engine.prefill(torch.randn(1, 15, 3), history_start=48)
    assert seen[0].tolist() == [[*range(48 - 30, 51 - 30), *range(51 - 36, 57 - 36), *range(57 - 42, 63 - 42)]]


@pytest.mark.parametrize("start", [-1, True, 1.0, 2**62 + 1])
def test_a_history_begins_at_a_position_of_64_bits(start) -> None:
    engine, _ = watched(STREAM)
    engine.prefill(torch.randn(1, 63, 3))
    with pytest.raises(StreamStateError, match="history_start: expected None or an int from 0 to"):
        engine.prefill(torch.randn(1, 15, 3), history_start=start)
    assert engine.position == (63,)


@pytest.mark.parametrize("frames", [10**6, 10**9])
def test_a_stream_far_along_is_the_stream_near_its_start_with_the_window_turned_again(frames) -> None:
    """Keys of the window and queries move on by so many frames together, while the sinks stay behind."""
    shift = frames // STREAM.window_frames * STREAM.window_frames * STREAM.tokens_per_frame
    outs = {}
    for stream in (STREAM, GROWING):
        model = TinyModel(heads=4, kv_heads=2).double()
        tokens = torch.randn(1, 33, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        near = StreamingEngine(model, stream)
        near.prefill(tokens[:, :15])
        near.step(tokens[:, 15:21])
        far = StreamingEngine(model, stream)
        snapshot = near.snapshot()
        k = snapshot.ring.k.clone()
        window = k[..., STREAM.sink_tokens :, :].flatten(0, 1)
        positions = torch.full((window.shape[0], window.shape[2]), shift)
        k[..., STREAM.sink_tokens :, :] = rotate(window, positions).view_as(k[..., STREAM.sink_tokens :, :])
        far.restore(snapshot._replace(ring=snapshot.ring._replace(k=k, position=(21 + shift,))))
        outs[stream] = [(near.step(part), far.step(part)) for part in tokens[:, 21:].split(6, dim=1)]
    for near_out, far_out in outs[STREAM]:
        torch.testing.assert_close(far_out, near_out, atol=1e-5, rtol=1e-5)
    assert all((a - b).abs().max() > 1e-2 for a, b in outs[GROWING])


def test_nothing_is_different_while_nothing_has_left_sink_and_window() -> None:
    tokens = torch.randn(1, 33, 3)
    model = TinyModel()
    outs = []
    for stream in (STREAM, GROWING):
        engine = StreamingEngine(model, stream)
        outs.append([engine.prefill(tokens[:, :9]), *(engine.step(x) for x in tokens[:, 9:].split(6, dim=1))])
    for a, b in zip(outs[0][:3], outs[1][:3], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(outs[0][3:], outs[1][3:], strict=True):
        assert (a - b).abs().max() > 1e-3


class Ignorant(TinyModel):
    """A model that knows nothing of second queries."""

    def attend(self, layer, x, context):
        q = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        out = context.attend(layer, q, q[:, :1], q[:, :1])
        return out.transpose(1, 2).flatten(2)


def test_a_model_that_ignores_the_second_positions_is_refused_and_the_stream_unchanged() -> None:
    engine = StreamingEngine(Ignorant(), STREAM)
    for call in (engine.prefill, engine.step):
        with pytest.raises(StreamStateError, match="q_sink: expected queries rotated by sink_positions"):
            call(torch.randn(1, 3, 3))
    assert engine.position == (0,)
    assert engine.cache.written_end == (0,)
    with pytest.raises(StreamStateError, match="q_sink: expected queries rotated by sink_positions"):
        Ignorant()(torch.randn(1, 9, 3), FullSequence(STREAM, 1, 9))
    StreamingEngine(Ignorant(), GROWING).prefill(torch.randn(1, 3, 3))


def test_a_cache_takes_a_second_query_exactly_where_sinks_stay_at_a_bounded_distance() -> None:
    q, k, v = draw_qkv(1, 3, torch.Generator().manual_seed(0))[0]
    bounded, growing = make_cache(STREAM), make_cache(GROWING)
    for attend in (bounded.attend, bounded.prefill):
        with pytest.raises(StreamStateError, match="q_sink: expected queries rotated by sink_positions"):
            attend(0, q, k, v)
        with pytest.raises(StreamStateError, match=r"q_sink: expected torch.float64 \[1, 2, 3, 8\] on cpu as q"):
            attend(0, q, k, v, q_sink=q[:, :1])
        with pytest.raises(StreamStateError, match="q_sink: expected a tensor, got float"):
            attend(0, q, k, v, q_sink=1.0)
    for attend in (growing.attend, growing.prefill):
        with pytest.raises(StreamStateError, match="q_sink: expected None"):
            attend(0, q, k, v, q_sink=q)
    with pytest.raises(StreamStateError, match="q_sink: expected None"):
        FullSequence(GROWING, 1, 3).attend(0, q, k, v, q)


def test_the_config_keeps_the_distance_and_refuses_others() -> None:
    assert StreamConfig.from_dict(STREAM.to_dict()) == STREAM
    older = {name: value for name, value in GROWING.to_dict().items() if name != "sink_distance"}
    assert StreamConfig.from_dict(older) == GROWING
    for bad in ("far", None, 1):
        with pytest.raises(ConfigError, match=r"sink_distance: expected one of \('growing', 'bounded'\), got"):
            replace(STREAM, sink_distance=bad)


def test_saved_streams_carry_the_distance(tmp_path) -> None:
    tokens, model = torch.randn(1, 51, 3), TinyModel()
    first, second = StreamingEngine(model, STREAM), StreamingEngine(model, STREAM)
    first.prefill(tokens[:, :45])
    first.save(tmp_path / "stream")
    second.load(tmp_path / "stream")
    assert torch.equal(first.step(tokens[:, 45:]), second.step(tokens[:, 45:]))
    other = StreamingEngine(model, GROWING)
    with pytest.raises(CheckpointError, match="sink_distance 'growing', got 'bounded'"):
        other.load(tmp_path / "stream")
    with pytest.raises(StreamStateError, match="snapshot"):
        other.restore(first.snapshot())


@pytest.mark.parametrize("stream", [GROWING, STREAM])
def test_a_file_that_knows_no_distance_is_of_a_stream_whose_distance_grows(tmp_path, stream) -> None:
    model, path = TinyModel(), tmp_path / "stream"
    engine = StreamingEngine(model, GROWING)
    engine.prefill(torch.randn(1, 45, 3))
    engine.save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    fingerprint = json.loads(metadata["fingerprint"])
    del fingerprint["stream"]["sink_distance"]
    save_file(load_file(path), path, metadata | {"fingerprint": json.dumps(fingerprint)})
    reader = StreamingEngine(model, stream)
    if stream == GROWING:
        reader.load(path)
        assert reader.position == (45,)
    else:
        with pytest.raises(CheckpointError, match="sink_distance 'bounded', got 'growing'"):
            reader.load(path)
