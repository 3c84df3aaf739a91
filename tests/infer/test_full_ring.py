"""The full ring of a single lane may be served by another kernel: from the first step that sees every slot, and no
step else, and the graphs of before and after are kept apart. A CPU plays the GPU that prefers it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tiny_model import TinyModel
from torch import Tensor

import swba_kernels
from swba_infer import RingKVCache, StreamConfig, StreamingEngine
from swba_infer.graph import step_signature
from swba_kernels import api, sdpa

STREAM = StreamConfig(tokens_per_frame=2, frames_per_block=2, window_frames=6, sink_frames=1)
CAPACITY, BLOCK = STREAM.capacity_tokens, STREAM.block_tokens


def draw(lanes: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(lanes, tokens, 3, generator=torch.Generator().manual_seed(seed))


class Stub:
    """What a GPU's table would say (`prefers`), what it was asked, and how each layer of each step was decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefers = True
        self.asked: list[dict[str, object]] = []
        self.full: list[bool] = []
        self.by_cudnn = 0
        attend = swba_kernels.window_decode_attention

        def ask(device, dtype, **sizes) -> bool:
            self.asked.append(sizes)
            return self.prefers

        def record(*args, **options):
            self.full.append(options["full"])
            return attend(*args, **options)

        def force(backend):
            self.by_cudnn += 1
            return nullcontext()

        monkeypatch.setattr(swba_kernels, "prefers_torch_decode", ask)
        monkeypatch.setattr(api, "prefers_torch_decode", ask)
        monkeypatch.setattr(swba_kernels, "window_decode_attention", record)
        monkeypatch.setattr(sdpa, "sdpa_kernel", force)

    def taken(self) -> set[bool]:
        """Return the values of `full` since the last call."""
        seen, self.full = set(self.full), []
        return seen


@pytest.fixture
def stub(monkeypatch) -> Stub:
    return Stub(monkeypatch)


class Graphs:
    """Stands for StepGraphs: runs every step and notes which graph would have served it."""

    def __init__(self, engine: StreamingEngine) -> None:
        self.engine = engine
        self.signatures: list[object] = []

    def run(self, block, tokens, conditioning, commit) -> Tensor:
        self.signatures.append(step_signature(block, tokens, conditioning, commit))
        engine = self.engine
        out = engine._forward(
            tokens.to(engine.dtype), engine.cache.bind(block), conditioning.tensors(engine.device)
        ).clone()
        if commit:
            engine.cache.advance_device(block)
        return out


def make_engine(lanes: int = 1, kv_heads: int = 2, **options) -> StreamingEngine:
    return StreamingEngine(TinyModel(kv_heads=kv_heads).double(), STREAM, lanes=lanes, **options)


def make_graphs(engine: StreamingEngine) -> Graphs:
    graphs = Graphs(engine)
    engine._graphs = graphs  # type: ignore[assignment]
    return graphs


def test_the_flag_is_set_from_the_first_step_that_sees_every_slot(stub):
    engine, first_full = make_engine(), []
    for i, size in enumerate([4, 1, 4, 3, 1, 1, 4, 12, 1]):
        full = engine.position[0] + size >= CAPACITY
        first_full.append(full)
        for commit in (False, True):
            engine.step(draw(1, size, i), commit=commit)
            assert stub.taken() == {full}
    assert first_full == [False] * 5 + [True] * 4
    assert stub.by_cudnn == 2 * 2 * 4


def test_a_longer_uncommitted_step_sees_every_slot_before_a_shorter_one_does(stub):
    engine = make_engine()
    engine.prefill(draw(1, CAPACITY - 5))
    for size, full in ((4, False), (5, True), (4, False), (6, True)):
        engine.step(draw(1, size), commit=False)
        assert stub.taken() == {full}


def test_prefills_never_use_it(stub):
    engine = make_engine()
    for _ in range(3):
        engine.prefill(draw(1, CAPACITY + 3))
    assert not stub.full
    assert not stub.by_cudnn


def test_caches_with_several_lanes_never_use_it(stub):
    engine = make_engine(lanes=2)
    graphs = make_graphs(engine)
    for i in range(2 * CAPACITY // BLOCK):
        engine.step(draw(2, BLOCK, i))
        engine.step(draw(1, BLOCK, i), lanes=[0], commit=False)
    assert stub.taken() == {False}
    assert not stub.asked
    assert not stub.by_cudnn
    assert len(set(graphs.signatures)) == 2


def test_the_kernels_are_asked_about_the_sizes_of_the_step(stub):
    engine = make_engine(impl="sdpa")
    engine.prefill(draw(1, CAPACITY))
    stub.prefers = False
    engine.step(draw(1, 3))
    sizes = {"rows": 1, "heads": 2, "tokens": 3, "slots": CAPACITY, "head_dim": 8, "impl": "sdpa"}
    assert stub.asked == [sizes]
    assert stub.taken() == {False}


def test_grouped_heads_keep_their_kernel(stub):
    engine = make_engine(kv_heads=1)
    engine.prefill(draw(1, CAPACITY))
    engine.step(draw(1, 3))
    assert not stub.by_cudnn


def journey(engine: StreamingEngine, path) -> list[Tensor]:
    """Fill the ring, return to when it was not full in every way there is, and fill it again."""
    outs, seeds = [], iter(range(1000))

    def steps(count: int) -> None:
        for _ in range(count):
            tokens = draw(1, BLOCK, next(seeds))
            outs.append(engine.step(tokens, commit=False, shift=0.5))
            outs.append(engine.step(tokens, shift=0.0))

    steps(2)
    early = engine.snapshot()
    engine.save(path / "early")
    steps(4)
    late = engine.snapshot()
    engine.restore(early)
    steps(3)
    engine.load(path / "early")
    steps(1)
    engine.restore(late)
    steps(1)
    engine.reset()
    steps(5)
    engine.reset(0)
    outs.append(engine.prefill(draw(1, CAPACITY, 7)))
    steps(1)
    return outs


FULL_STEPS = [False] * 2 + [False, True, True, True] + [False, True, True] + [False, True] + [False] * 3 + [True] * 3


def test_a_stream_is_the_same_with_it_and_the_graph_follows_the_host_through_restore_load_and_reset(stub, tmp_path):
    stub.prefers = False
    plain = make_engine()
    plain_graphs = make_graphs(plain)
    expected = journey(plain, tmp_path)
    assert len(set(plain_graphs.signatures)) == 2, "one for each commit: nothing to tell full rings apart for"
    assert stub.taken() == {False}
    stub.prefers = True
    engine = make_engine()
    graphs = make_graphs(engine)
    torch.testing.assert_close(journey(engine, tmp_path), expected, atol=1e-12, rtol=1e-10)
    assert stub.full == [full for full in FULL_STEPS for _ in range(4)]
    assert [signature[3] for signature in graphs.signatures] == [full for full in FULL_STEPS for _ in range(2)]
    assert [(*s[:3], s[4]) for s in graphs.signatures] == [(*s[:3], s[4]) for s in plain_graphs.signatures]
    assert len(set(graphs.signatures)) == 4


def test_a_resumed_stream_decodes_as_the_one_it_was_saved_from(stub, tmp_path):
    engine = make_engine()
    for i in range(5):
        engine.step(draw(1, BLOCK, i))
    engine.save(tmp_path / "stream")
    other = make_engine()
    other.load(tmp_path / "stream")
    assert torch.equal(engine.step(draw(1, BLOCK, 9)), other.step(draw(1, BLOCK, 9)))
    assert stub.full[-4:] == [True] * 4


def test_on_a_cpu_nothing_prefers_it():
    cache = RingKVCache(
        layers=1, lanes=1, kv_heads=2, head_dim=64, stream=STREAM, dtype=torch.bfloat16, device="cpu"
    )  # fmt: skip
    qkv = torch.randn(3, 1, 2, CAPACITY, 64).bfloat16()
    cache.prefill(0, *qkv)
    cache.commit()
    assert not cache.reserve(BLOCK, None).full
