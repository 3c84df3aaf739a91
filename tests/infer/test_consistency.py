"""Streaming equals training: decode through the ring is full attention, for the bare cache and for a whole model."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tiny_model import TinyModel
from tolerance import assert_close
from torch import Tensor

import swba_kernels
from swba_infer import FullSequence, RingKVCache, StreamConfig, StreamingEngine
from swba_infer.config import SINK_DISTANCES
from swba_kernels.reference import block_window_reference

FAST = settings(max_examples=120, deadline=None)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@st.composite
def stream_configs(draw) -> StreamConfig:
    frames_per_block = draw(st.integers(1, 3))
    return StreamConfig(
        tokens_per_frame=draw(st.integers(1, 5)),
        frames_per_block=frames_per_block,
        window_frames=frames_per_block + draw(st.integers(0, 4)),
        sink_frames=draw(st.integers(0, 4)),
        first_block_frames=draw(st.integers(0, frames_per_block)),
        sink_distance=draw(st.sampled_from(SINK_DISTANCES)),
    )


@st.composite
def cuts(draw, blocks: int) -> list[int]:
    """Cut a number of blocks into calls: 1 is a step or a prefill of one block, more is a prefill."""
    sizes = []
    while sum(sizes) < blocks:
        sizes.append(draw(st.integers(1, min(4, blocks - sum(sizes))) | st.just(1)))
    return sizes


class EagerSequence(FullSequence):
    """Full attention by the eager reference, in the dtype of its input."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None = None) -> Tensor:
        assert (q_sink is None) == (self.sink_positions is None)
        return block_window_reference(q, k, v, self.pattern, q_sink=q_sink)


@FAST
@given(
    stream=stream_configs(), dtype=DTYPES, kv_heads=st.integers(1, 2), group=st.integers(1, 3),
    blocks=st.integers(1, 12), tail=st.integers(0, 3), noise=st.booleans(), data=st.data(),
)  # fmt: skip
def test_blocks_through_the_ring_equal_one_full_sequence_call_and_the_reference(
    stream, dtype, kv_heads, group, blocks, tail, noise, data
):
    pattern = stream.pattern
    total = pattern.block_ends(blocks * stream.block_tokens)[-1] + min(tail, stream.block_tokens - 1)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def draw(heads: int, tokens: int = total) -> Tensor:
        x = torch.randn(2, tokens, heads, 8, generator=generator, dtype=torch.float64).to(dtype)
        return x.transpose(1, 2)

    q, k, v = draw(kv_heads * group), draw(kv_heads), draw(kv_heads)
    q_sink = draw(kv_heads * group) if stream.bounds_sinks else None

    def sinks(start: int, end: int, kind: torch.dtype = dtype) -> Tensor | None:
        return None if q_sink is None else q_sink[:, :, start:end].to(kind)

    cache = RingKVCache(
        layers=1, lanes=2, kv_heads=kv_heads, head_dim=8, stream=stream, dtype=dtype, device="cpu"
    )  # fmt: skip
    for ring in (cache.k, cache.v):
        ring.fill_(float("nan"))
    outs = []
    ranges = list(pattern.blocks(total))
    for size in data.draw(cuts(len(ranges))):
        (start, _), (_, end) = ranges[0], ranges[size - 1]
        ranges = ranges[size:]
        call = cache.prefill if size > 1 or data.draw(st.booleans()) else cache.attend
        if noise:
            other = (draw(heads, end - start) for heads in (kv_heads * group, kv_heads, kv_heads))
            call(0, *other, q_sink=sinks(start, end))
        outs.append(call(0, *(x[:, :, start:end] for x in (q, k, v)), q_sink=sinks(start, end)))
        cache.commit()
    streamed = torch.cat(outs, dim=2)
    double = (x.double() for x in (q, k, v))
    oracle = block_window_reference(*double, pattern, q_sink=sinks(0, total, torch.float64))
    eager = block_window_reference(q, k, v, pattern, q_sink=q_sink)
    assert_close(streamed, oracle, eager, "streamed")
    assert_close(swba_kernels.block_window_attention(q, k, v, pattern, q_sink=q_sink), oracle, eager, "full")


@FAST
@given(
    stream=stream_configs(), dtype=st.sampled_from([torch.float64, torch.float32]), lanes=st.integers(1, 3),
    blocks=st.integers(1, 10), layers=st.integers(1, 3), data=st.data(),
)  # fmt: skip
def test_prefill_and_steps_of_a_whole_model_equal_one_full_forward(stream, dtype, lanes, blocks, layers, data):
    """Each lane advances by itself or with others, with denoising steps in between, at its own position."""
    model = TinyModel(layers=layers, state=True).to(dtype)
    pattern = stream.pattern
    total = pattern.block_ends(blocks * stream.block_tokens + stream.block_tokens)[blocks - 1]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    tokens = torch.randn(lanes, total, 3, generator=generator, dtype=torch.float64).to(dtype)
    prompt = torch.randn(lanes, 16, generator=generator, dtype=torch.float64).to(dtype)
    shift = torch.randn(lanes, generator=generator, dtype=torch.float64).to(dtype)

    def full(context: type[FullSequence], module: TinyModel, dtype: torch.dtype) -> Tensor:
        state = {"prompt": prompt.to(dtype)}
        with torch.no_grad():
            made = context(stream, lanes, total, state=state)
            return module(tokens.to(dtype), made, shift=shift.to(dtype), action=3)

    engine = StreamingEngine(model, stream, lanes=lanes)
    engine.set_state("prompt", prompt)
    for ring in (engine.cache.k, engine.cache.v):
        ring.fill_(float("nan"))
    outs: list[list[Tensor]] = [[] for _ in range(lanes)]
    ranges = list(pattern.blocks(total))
    at = [0] * lanes
    while min(at) < len(ranges):
        behind = [lane for lane in range(lanes) if at[lane] < len(ranges)]
        lead = data.draw(st.sampled_from(behind))
        size = data.draw(st.integers(1, len(ranges) - at[lead]))
        count = sum(end - start for start, end in ranges[at[lead] : at[lead] + size])
        chosen = [
            lane
            for lane in behind
            if at[lane] == at[lead] or (min(at[lane], at[lead]) > 0 and at[lane] + size <= len(ranges))
        ]
        chosen = data.draw(st.permutations(chosen)) if data.draw(st.booleans()) else [lead]
        starts = [ranges[at[lane]][0] for lane in chosen]
        part = torch.stack([tokens[lane, start : start + count] for lane, start in zip(chosen, starts, strict=True)])
        given_ = {"shift": shift[chosen], "action": 3}
        if size > 1 or data.draw(st.booleans()):
            out = engine.prefill(part, lanes=chosen, **given_)
        else:
            for _ in range(data.draw(st.integers(0, 2))):
                engine.step(torch.randn(part.shape, dtype=dtype), commit=False, lanes=chosen, **given_)
            out = engine.step(part, lanes=chosen, **given_)
        for row, lane in enumerate(chosen):
            outs[lane].append(out[row])
            at[lane] += size
    streamed = torch.stack([torch.cat(parts) for parts in outs])
    oracle = full(EagerSequence, replace_dtype(model, torch.float64), torch.float64)
    assert_close(streamed, oracle, full(EagerSequence, model, dtype), "streamed")
    assert engine.position == (total,) * lanes


def replace_dtype(model: TinyModel, dtype: torch.dtype) -> TinyModel:
    copy = TinyModel(model.layers, model.heads, model.kv_heads, model.head_dim, state=model.has_state)
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype)


STREAM = StreamConfig(tokens_per_frame=3, frames_per_block=2, window_frames=5, sink_frames=1, first_block_frames=1)


def play(engine: StreamingEngine, tokens: Tensor, lanes: list[int] | None, sizes: list[int]) -> Tensor:
    outs, at = [], 0
    for i, size in enumerate(sizes):
        call = engine.prefill if i % 3 == 0 else engine.step
        outs.append(call(tokens[:, at : at + size], lanes=lanes))
        at += size
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lane_has_the_same_bits_whatever_the_other_lanes_hold(dtype):
    model, sizes = TinyModel().to(dtype), [9, 6, 6, 14, 3, 6, 15, 6]
    tokens = torch.randn(1, sum(sizes), 3).to(dtype)
    runs = []
    for offset in (0, 4, 9, 40):
        engine = StreamingEngine(model, STREAM, lanes=3)
        for ring in (engine.cache.k, engine.cache.v):
            ring.fill_(float("nan"))
        if offset:
            engine.prefill(torch.randn(2, offset, 3).to(dtype), lanes=[0, 2])
        outs, at = [], 0
        for i, size in enumerate(sizes):
            part = tokens[:, at : at + size]
            if i == 0:
                outs.append(engine.prefill(part, lanes=[1]))
            else:
                others = torch.randn(3, size, 3).to(dtype)
                others[1] = part[0]
                outs.append(engine.step(others)[1:2])
            at += size
        runs.append(torch.cat(outs, dim=1))
    assert torch.isfinite(runs[0]).all()
    assert all(torch.equal(runs[0], run) for run in runs[1:])


def test_a_lane_full_of_nan_does_not_reach_the_others():
    model, sizes = TinyModel(), [6, 6, 6, 12, 6, 6, 6]
    tokens = torch.randn(2, sum(sizes), 3)
    tokens[0] = float("nan")
    engine, alone = StreamingEngine(model, STREAM, lanes=2), StreamingEngine(model, STREAM)
    out = play(engine, tokens, None, sizes)
    assert torch.isnan(out[0]).all()
    torch.testing.assert_close(out[1:], play(alone, tokens[1:], None, sizes))


def test_a_stream_of_many_windows_stays_exact():
    stream = replace(STREAM, first_block_frames=0)
    model = TinyModel().double()
    tokens = torch.randn(1, 6 * 100, 3, dtype=torch.float64)
    engine = StreamingEngine(model, stream)
    streamed = torch.cat([engine.step(part) for part in tokens.split(6, dim=1)], dim=1)
    with torch.no_grad():
        full = model(tokens, FullSequence(stream.pattern, 1, 600))
    torch.testing.assert_close(streamed, full, atol=1e-10, rtol=1e-10)


def test_positions_beyond_32_bits_are_carried_exactly():
    """A stream far along differs from a young one in its rotations only, which are relative."""
    stream = replace(STREAM, sink_frames=0, first_block_frames=0)
    model = TinyModel().double()
    tokens = torch.randn(1, 60, 3, dtype=torch.float64)
    young, old = StreamingEngine(model, stream), StreamingEngine(model, stream)
    far = 6 * 2**33
    far -= far % stream.window_tokens
    old.prefill(tokens[:, :30])
    young.prefill(tokens[:, :30])
    snapshot = old.snapshot()
    old.restore(snapshot._replace(ring=snapshot.ring._replace(position=(far,))))
    assert old.position == (far,)
    for part in tokens[:, 30:].split(6, dim=1):
        old.step(part)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[1].positions))
    out = old.step(tokens[:, :6])
    assert torch.isfinite(out).all()
    assert seen[0].tolist() == [list(range(far + 30, far + 36))]
