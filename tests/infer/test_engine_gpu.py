"""The engine on CUDA: captured steps, no waiting for the device, flat memory and flat time.

With SWBA_REPORT=FILE the soak writes its numbers there as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import TinyModel
from tolerance import assert_close
from torch import Tensor

from swba_infer import FullSequence, RingKVCache, StreamConfig, StreamingEngine
from swba_kernels.reference import block_window_reference

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
STREAM = StreamConfig(tokens_per_frame=20, frames_per_block=2, window_frames=7, sink_frames=1)
BOUNDED = replace(STREAM, sink_distance="bounded")
BLOCK, CHANNELS = STREAM.block_tokens, 16


def make_engine(
    lanes: int = 2, cuda_graph: bool = True, dtype: torch.dtype = torch.bfloat16, stream: StreamConfig = STREAM
) -> StreamingEngine:
    model = TinyModel(layers=3, heads=4, kv_heads=2, head_dim=64, channels=CHANNELS, state=True)
    engine = StreamingEngine(model, stream, lanes=lanes, device=DEVICE, dtype=dtype, cuda_graph=cuda_graph)
    engine.set_state("prompt", draw(lanes, 256, seed=1).to(dtype))
    for ring in (engine.cache.k, engine.cache.v):
        ring.fill_(float("nan"))
    return engine


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def tokens(lanes: int = 2, count: int = BLOCK, seed: int = 0) -> Tensor:
    return draw(lanes, count, CHANNELS, seed=seed)


def perform(engine: StreamingEngine, path: Path) -> list[Tensor]:
    """Do everything that moves positions between captured steps."""
    outs = [engine.step(tokens(seed=i), shift=0.1 * i) for i in range(12)]
    engine.step(tokens(count=STREAM.window_tokens, seed=20), commit=False)
    outs += [engine.step(tokens(count=STREAM.window_tokens, seed=i)) for i in range(3)]
    outs += [engine.step(tokens(1, seed=i), lanes=[i % 2], shift=draw(1, seed=i)) for i in range(5)]
    outs += [engine.step(tokens(seed=i), lanes=[1, 0], action=i, flip=True) for i in range(3)]
    engine.reset(0)
    outs += [engine.step(tokens(seed=i), commit=i % 2 == 0, shift=0.5) for i in range(6)]
    snapshot = engine.snapshot()
    outs.append(engine.prefill(tokens(count=333, seed=3)))
    outs += [engine.step(tokens(seed=i)) for i in range(3)]
    engine.fork(1, 0)
    outs += [engine.step(tokens(seed=i)) for i in range(3)]
    engine.restore(snapshot)
    outs += [engine.step(tokens(seed=i)) for i in range(3)]
    engine.save(path / "stream.safetensors")
    outs += [engine.step(tokens(seed=i)) for i in range(3)]
    engine.load(path / "stream.safetensors")
    outs += [engine.step(tokens(seed=i)) for i in range(3)]
    engine.set_state("prompt", draw(2, 256, seed=9).to(engine.dtype))
    outs += [engine.step(tokens(seed=i)) for i in range(3)]
    assert engine.position == tuple(engine.cache.position_tensor.tolist())
    return outs


@pytest.mark.parametrize("stream", [STREAM, BOUNDED], ids=["growing", "bounded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_captured_stream_has_the_bits_of_an_eager_one(tmp_path, dtype, stream):
    captured = perform(make_engine(dtype=dtype, stream=stream), tmp_path)
    eager = perform(make_engine(dtype=dtype, cuda_graph=False, stream=stream), tmp_path)
    for i, (a, b) in enumerate(zip(captured, eager, strict=True)):
        assert torch.isfinite(a).all(), i
        assert torch.equal(a, b), i


def test_one_graph_serves_a_signature_for_the_whole_stream():
    engine = make_engine()
    assert engine._graphs is not None
    for i in range(20):
        engine.step(tokens(seed=i), commit=False, shift=0.5)
        engine.step(tokens(seed=i), shift=float(i))
        engine.step(tokens(1, seed=i), lanes=[i % 2])
    assert len(engine._graphs) == 3
    assert engine.position == (30 * BLOCK, 30 * BLOCK)


def test_what_a_captured_step_returns_belongs_to_the_caller():
    engine = make_engine()
    out = engine.step(tokens(), commit=False)
    kept = out.clone()
    engine.step(tokens(seed=1), commit=False)
    assert torch.equal(out, kept)
    assert not out.is_inference()


def test_streaming_with_bounded_sinks_equals_the_full_sequence():
    engine = make_engine(dtype=torch.float32, stream=BOUNDED)
    given = tokens(count=30 * BLOCK)
    parts = [engine.prefill(given[:, : 5 * BLOCK])]
    parts += [engine.step(part) for part in given[:, 5 * BLOCK : 25 * BLOCK].split(BLOCK, dim=1)]
    parts.append(engine.prefill(given[:, 25 * BLOCK :]))
    with torch.no_grad():
        full = engine.model(given, FullSequence(BOUNDED, 2, given.shape[1], DEVICE, state=engine.state))
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stream", [STREAM, BOUNDED], ids=["growing", "bounded"])
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_step_never_waits_for_the_device(cuda_graph, stream):
    engine = make_engine(cuda_graph=cuda_graph, stream=stream)
    given = [tokens(seed=i) for i in range(3)]
    shift = draw(2)

    def steps() -> None:
        engine.step(given[0], commit=False, shift=0.25, action=3)
        engine.step(given[0], shift=shift)
        engine.step(given[1][:1], lanes=[1])
        engine.step(given[2].flip(0), lanes=[1, 0], flip=True)

    steps()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_no_memory_is_reserved_after_the_first_step_of_a_signature(cuda_graph):
    engine = make_engine(cuda_graph=cuda_graph)
    given = tokens()

    def steps() -> None:
        for commit in (False, True):
            engine.step(given, commit=commit, shift=0.5)
        engine.step(given[:1], lanes=[0])

    steps()
    steps()
    torch.cuda.synchronize()
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    for _ in range(100):
        steps()
    assert (torch.cuda.memory_reserved(), torch.cuda.memory_allocated()) == (reserved, allocated)


def test_the_cache_allocates_what_predict_bytes_says():
    sizes = {"layers": 3, "lanes": 2, "kv_heads": 2, "head_dim": 64, "stream": STREAM, "dtype": torch.bfloat16}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = RingKVCache(**sizes, device=DEVICE)
    taken = torch.cuda.memory_allocated() - before
    assert cache.bytes == RingKVCache.predict_bytes(**sizes, device=DEVICE)
    assert 0 <= taken - cache.bytes < 3 * 512, "the allocator rounds each of the three tensors to 512 bytes"


def test_a_failed_step_leaves_a_captured_stream_as_it_was():
    engine, twin = make_engine(), make_engine()
    for e in (engine, twin):
        e.prefill(tokens(count=400, seed=4))
    for layer in range(3):
        engine.model.fail_in = layer
        with pytest.raises(RuntimeError, match=f"layer {layer} fails"):
            engine.step(tokens(seed=5))
    engine.model.fail_in = None
    for i in range(4):
        assert torch.equal(engine.step(tokens(seed=i)), twin.step(tokens(seed=i)))


def test_nan_found_after_a_captured_commit_takes_the_commit_back():
    engine, twin = make_engine(), make_engine()
    engine.check_finite = True
    for i in range(12):
        if i % 4 == 3:
            with pytest.raises(ValueError, match="finite"):
                engine.step(tokens(seed=99), shift=float("nan"))
        assert torch.equal(engine.step(tokens(seed=i), shift=0.5), twin.step(tokens(seed=i), shift=0.5))


def test_a_model_that_touches_the_host_is_refused_with_advice_when_captured():
    """In a process of its own: a capture that failed leaves torch's generator unusable."""
    code = (
        "import torch, test_engine_gpu as t; from tiny_model import TinyModel\n"
        "class Touching(TinyModel):\n"
        "    def forward(self, tokens, context, **given):\n"
        "        return super().forward(tokens, context, **given) * tokens.sum().item()\n"
        "make = lambda graph: t.StreamingEngine(Touching(channels=16), t.STREAM, device='cuda', cuda_graph=graph)\n"
        "make(False).step(t.tokens(1))\n"
        "engine = make(True)\n"
        "try: engine.step(t.tokens(1))\n"
        "except ValueError as error: assert 'pass cuda_graph=False' in str(error), error\n"
        "else: raise SystemExit('not refused')\n"
        "assert engine.position == (0,)\n"
    )
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), *(path for path in sys.path if path)])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("stream", "head_dim"),
    [
        (STREAM, 64),
        (StreamConfig(tokens_per_frame=48, frames_per_block=1, window_frames=16), 64),
        (StreamConfig(tokens_per_frame=33, frames_per_block=3, window_frames=7, sink_frames=2), 128),
        (StreamConfig(tokens_per_frame=7, frames_per_block=2, window_frames=3, first_block_frames=1), 24),
    ],
)
def test_blocks_through_the_ring_equal_full_attention(stream, head_dim, dtype):
    pattern = stream.pattern
    total = pattern.block_ends(12 * stream.block_tokens)[10]
    q, k, v = (draw(2, total, heads, head_dim, seed=heads).transpose(1, 2).to(dtype) for heads in (6, 3, 3))
    v = v.flip(0)
    cache = RingKVCache(
        layers=1, lanes=2, kv_heads=3, head_dim=head_dim, stream=stream, dtype=dtype, device=DEVICE
    )  # fmt: skip
    for ring in (cache.k, cache.v):
        ring.fill_(float("nan"))
    ranges, outs = list(pattern.blocks(total)), []
    for size in (2, 1, 1, 3, 1, 1, 1, 1):
        (start, _), (_, end) = ranges[0], ranges[size - 1]
        ranges = ranges[size:]
        call = cache.prefill if size > 1 else cache.attend
        outs.append(call(0, *(x[:, :, start:end] for x in (q, k, v))))
        cache.commit()
    assert not ranges
    oracle = block_window_reference(q.double(), k.double(), v.double(), pattern)
    assert_close(torch.cat(outs, dim=2), oracle, block_window_reference(q, k, v, pattern))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_lane_has_the_same_bits_whatever_the_other_lanes_hold(dtype):
    """Through the bare cache: the matrix products of a model may depend on the batch, attention may not."""
    runs = []
    for offset in (0, 55, 8 * BLOCK):
        cache = RingKVCache(
            layers=1, lanes=3, kv_heads=2, head_dim=64, stream=STREAM, dtype=dtype, device=DEVICE
        )  # fmt: skip
        for ring in (cache.k, cache.v):
            ring.fill_(float("nan"))
        if offset:
            q, k, v = (draw(2, heads, offset, 64, seed=offset).to(dtype) for heads in (4, 2, 2))
            cache.prefill(0, q, k, v, lanes=[0, 2])
            cache.commit()
        outs = []
        for i in range(12):
            q, k, v = (draw(3, heads, BLOCK, 64, seed=100 * offset + i).to(dtype) for heads in (4, 2, 2))
            for x, heads in ((q, 4), (k, 2), (v, 2)):
                x[1] = draw(heads, BLOCK, 64, seed=i).to(dtype)
            outs.append(cache.attend(0, q, k, v)[1])
            cache.commit()
        runs.append(torch.stack(outs))
    assert torch.isfinite(runs[0]).all()
    assert all(torch.equal(runs[0], run) for run in runs[1:])


@pytest.mark.slow
def test_ten_thousand_steps_take_the_same_time_and_memory():
    engine = make_engine(lanes=1)
    given = [tokens(1, seed=i) for i in range(8)]
    chunks, size = 40, 250
    for i in range(50):
        engine.step(given[i % 8], commit=False, shift=0.5)
        engine.step(given[i % 8], shift=0.0)
    torch.cuda.synchronize()
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    milliseconds = []
    out = None
    for _ in range(chunks):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for i in range(size // 2):
            engine.step(given[i % 8], commit=False, shift=0.5)
            out = engine.step(given[i % 8], shift=0.0)
        end.record()
        end.synchronize()
        milliseconds.append(begin.elapsed_time(end) / size)
    del out
    memory = {
        "reserved_bytes_growth": torch.cuda.memory_reserved() - reserved,
        "allocated_bytes_growth": torch.cuda.memory_allocated() - allocated,
    }
    quarter = chunks // 4
    first, last = statistics.median(milliseconds[:quarter]), statistics.median(milliseconds[-quarter:])
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "stream": STREAM.to_dict(),
        "dtype": "bfloat16",
        "steps": chunks * size,
        "committed_tokens": engine.position[0],
        "graphs": 2,
        **memory,
        "ms_per_step_first_quarter": first,
        "ms_per_step_last_quarter": last,
        "ms_per_step_of_each_250": milliseconds,
    }
    if os.environ.get("SWBA_REPORT"):
        Path(os.environ["SWBA_REPORT"]).write_text(json.dumps(report, indent=2) + "\n")
    assert engine.position == ((50 + chunks * size // 2) * BLOCK,)
    assert memory == {"reserved_bytes_growth": 0, "allocated_bytes_growth": 0}
    assert last <= 1.2 * first, report

    eager = make_engine(lanes=1, cuda_graph=False)
    eager.restore(engine.snapshot())
    for block in given:
        assert torch.equal(engine.step(block), eager.step(block))
