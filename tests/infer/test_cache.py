"""The ring as a state machine: any order of steps, prefills, retries, failures, forks, resets and restores equals
dense attention over what was committed, with NaN wherever nobody may look."""

from __future__ import annotations

from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from swba_infer import ConfigError, RingKVCache, StreamConfig, StreamStateError
from swba_kernels.pattern import BlockWindow
from swba_kernels.reference import block_window_reference

LAYERS, KV_HEADS, HEADS, HEAD_DIM = 2, 1, 2, 8

streams = st.builds(
    lambda tokens, block, more, sink, first: StreamConfig(
        tokens_per_frame=tokens, frames_per_block=block, window_frames=block + more, sink_frames=sink,
        first_block_frames=min(first, block),
    ),
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2),
)  # fmt: skip


def make_cache(stream: StreamConfig, lanes: int = 1, dtype: torch.dtype = torch.float64, **options) -> RingKVCache:
    return RingKVCache(
        layers=LAYERS, lanes=lanes, kv_heads=KV_HEADS, head_dim=HEAD_DIM, stream=stream, dtype=dtype, device="cpu",
        **options,
    )  # fmt: skip


def draw_qkv(rows: int, tokens: int, generator: torch.Generator, dtype: torch.dtype = torch.float64):
    """Return q, k, v of every layer."""

    def draw(heads: int) -> Tensor:
        return torch.randn(rows, heads, tokens, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)

    return [(draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)) for _ in range(LAYERS)]


@dataclass
class Lane:
    """What one lane has committed, by layer: k, v [Hkv, T, D]; and how far abandoned steps have written."""

    kv: list[tuple[Tensor, Tensor]]
    written: int = 0

    @property
    def position(self) -> int:
        return self.kv[0][0].shape[1]


def empty_lane() -> Lane:
    none = torch.zeros(KV_HEADS, 0, HEAD_DIM, dtype=torch.float64)
    return Lane([(none, none)] * LAYERS)


class RingMachine(RuleBasedStateMachine):
    @initialize(
        stream=streams, history=st.lists(st.just(0) | st.integers(0, 40), min_size=1, max_size=3),
        seed=st.integers(0, 1000),
    )  # fmt: skip
    def start(self, stream: StreamConfig, history: list[int], seed: int) -> None:
        lanes = len(history)
        self.stream, self.pattern = stream, stream.pattern
        self.cache = make_cache(stream, lanes)
        self.lanes = [empty_lane() for _ in range(lanes)]
        self.generator = torch.Generator().manual_seed(seed)
        self.snapshot = None
        self.poison()
        for lane, tokens in enumerate(history):
            if tokens:
                self.call([lane], tokens, prefill=True, layers=LAYERS, commit=True)

    def poison(self) -> None:
        """Put NaN into every slot that no later call may read before it is written."""
        for index, lane in enumerate(self.lanes):
            dirty = list(range(min(lane.position, self.cache.capacity), self.cache.capacity))
            for p in range(lane.position, lane.written):
                sink, window = self.pattern.sink, self.pattern.window
                dirty.append(p if p < sink else sink + (p - sink) % window)
            for ring in (self.cache.k, self.cache.v):
                ring[:, index, :, dirty] = float("nan")

    def expect(self, chosen: list[int], qkv, pattern: BlockWindow, ends: list[int], layer: int) -> Tensor:
        rows = []
        q, k, v = qkv[layer]
        for row, index in enumerate(chosen):
            old_k, old_v = self.lanes[index].kv[layer]
            keys = torch.cat([old_k, k[row]], dim=1)[None]
            values = torch.cat([old_v, v[row]], dim=1)[None]
            history = old_k.shape[1]
            rows.append(
                block_window_reference(q[row : row + 1], keys, values, pattern, block_ends=ends, history=history)
            )
        return torch.cat(rows)

    def call(self, chosen: list[int], tokens: int, *, prefill: bool, layers: int, commit: bool) -> None:
        qkv = draw_qkv(len(chosen), tokens, self.generator)
        lanes = None if chosen == list(range(len(self.lanes))) and layers % 2 == 0 else chosen
        fresh = all(self.lanes[i].position == 0 for i in chosen)
        pattern = self.pattern if fresh else replace(self.pattern, first_block=0)
        ends = pattern.block_ends(tokens) if prefill else [tokens]
        attend = self.cache.prefill if prefill else self.cache.attend
        for layer in range(layers):
            out = attend(layer, *qkv[layer], lanes=lanes)
            torch.testing.assert_close(out, self.expect(chosen, qkv, pattern, ends, layer), atol=1e-12, rtol=1e-10)
        if commit:
            self.cache.commit()
        for row, index in enumerate(chosen):
            lane = self.lanes[index]
            if commit:
                lane.kv = [
                    (torch.cat([old_k, k[row]], dim=1), torch.cat([old_v, v[row]], dim=1))
                    for (old_k, old_v), (_, k, v) in zip(lane.kv, qkv, strict=True)
                ]
                lane.written = 0
            elif not prefill:
                lane.written = max(lane.written, lane.position + tokens)
        if not commit:
            self.cache.abort()
        self.poison()

    def refused(self, chosen: list[int], first: int, prefill: bool) -> bool:
        positions = [self.lanes[i].position for i in chosen]
        if prefill and self.pattern.first_block and min(positions) == 0 < max(positions):
            return True
        return any(self.lanes[i].position + first < self.lanes[i].written > self.cache.capacity for i in chosen)

    def attend(self, data, *, prefill: bool, commit: bool) -> None:
        """Attend in every layer, in any number of lanes; where the rules refuse, find it refused."""
        chosen = list(range(len(self.lanes)))
        if data.draw(st.booleans()):
            chosen = data.draw(st.permutations(chosen))[: data.draw(st.integers(1, len(chosen)))]
        limit = 2 * self.cache.capacity + 3 if prefill else self.cache.window
        tokens = data.draw(st.integers(1, limit))
        first = min(tokens, self.pattern.block_size) if prefill else tokens
        if self.refused(chosen, first, prefill):
            with pytest.raises(StreamStateError):
                self.call(chosen, tokens, prefill=prefill, layers=1, commit=False)
            return
        self.call(chosen, tokens, prefill=prefill, layers=LAYERS, commit=commit)

    @rule(data=st.data())
    def step(self, data) -> None:
        self.attend(data, prefill=False, commit=True)

    @rule(data=st.data())
    def prefill(self, data) -> None:
        self.attend(data, prefill=True, commit=True)

    @rule(data=st.data(), prefill=st.booleans())
    def look(self, data, prefill: bool) -> None:
        self.attend(data, prefill=prefill, commit=False)

    @rule(data=st.data(), prefill=st.booleans())
    def fail_after_the_first_layer(self, data, prefill: bool) -> None:
        lane = data.draw(st.integers(0, len(self.lanes) - 1))
        tokens = data.draw(st.integers(1, self.cache.window))
        if not self.refused([lane], min(tokens, self.pattern.block_size) if prefill else tokens, prefill):
            self.call([lane], tokens, prefill=prefill, layers=1, commit=False)

    @rule(data=st.data())
    def reset(self, data) -> None:
        lane = data.draw(st.integers(0, len(self.lanes) - 1))
        self.cache.reset(lane)
        self.lanes[lane] = empty_lane()
        self.poison()

    @rule(data=st.data())
    def fork(self, data) -> None:
        src, dst = (data.draw(st.integers(0, len(self.lanes) - 1)) for _ in range(2))
        self.cache.fork(src, dst)
        self.lanes[dst] = replace(self.lanes[src])
        self.poison()

    @rule()
    def take_snapshot(self) -> None:
        self.snapshot = self.cache.snapshot(), [replace(lane) for lane in self.lanes]

    @precondition(lambda self: self.snapshot is not None)
    @rule()
    def restore(self) -> None:
        ring, lanes = self.snapshot
        self.cache.restore(ring)
        self.lanes = [replace(lane) for lane in lanes]
        self.poison()

    @invariant()
    def positions_agree_and_memory_is_as_predicted(self) -> None:
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        assert cache.position == tuple(lane.position for lane in self.lanes) == tuple(cache.position_tensor.tolist())
        assert cache.written_end == tuple(lane.written for lane in self.lanes)
        assert cache.staged_bytes == 0
        assert cache.bytes == RingKVCache.predict_bytes(
            layers=LAYERS, lanes=len(self.lanes), kv_heads=KV_HEADS, head_dim=HEAD_DIM, stream=self.stream,
            dtype=torch.float64,
        )  # fmt: skip


TestRing = RingMachine.TestCase
TestRing.settings = settings(
    max_examples=150, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)

STREAM = StreamConfig(tokens_per_frame=2, frames_per_block=2, window_frames=3, sink_frames=1)


def filled(lanes: int = 1, tokens: int = 20) -> tuple[RingKVCache, torch.Generator]:
    cache, generator = make_cache(STREAM, lanes), torch.Generator().manual_seed(1)
    for layer, (q, k, v) in enumerate(draw_qkv(lanes, tokens, generator)):
        cache.prefill(layer, q, k, v)
    cache.commit()
    return cache, generator


def run_step(cache: RingKVCache, qkv, lanes=None) -> list[Tensor]:
    return [cache.attend(layer, *x, lanes=lanes) for layer, x in enumerate(qkv)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layers", "lanes", "kv_heads", "head_dim"), [(1, 1, 1, 8), (3, 2, 5, 24)])
def test_memory_is_exactly_what_predict_bytes_says(layers, lanes, kv_heads, head_dim, dtype):
    sizes = {"layers": layers, "lanes": lanes, "kv_heads": kv_heads, "head_dim": head_dim, "stream": STREAM}
    cache = RingKVCache(**sizes, dtype=dtype, device="cpu")
    held = cache.k.untyped_storage().nbytes() + cache.v.untyped_storage().nbytes() + 8 * lanes
    assert RingKVCache.predict_bytes(**sizes, dtype=dtype, device="cpu") == cache.bytes == held


def test_the_ring_is_never_reallocated():
    cache, generator = filled()
    places = cache.k.data_ptr(), cache.v.data_ptr(), cache.position_tensor.data_ptr()
    snapshot = cache.snapshot()
    for _ in range(9):
        run_step(cache, draw_qkv(1, 4, generator))
        cache.commit()
    cache.restore(snapshot)
    cache.reset()
    assert places == (cache.k.data_ptr(), cache.v.data_ptr(), cache.position_tensor.data_ptr())


def test_an_uncommitted_step_may_be_repeated_and_gives_the_same_bits():
    cache, generator = filled()
    noisy, clean = draw_qkv(1, 4, generator), draw_qkv(1, 4, generator)
    once = run_step(cache, clean)
    run_step(cache, noisy)
    assert all(torch.equal(a, b) for a, b in zip(once, run_step(cache, clean), strict=True))
    assert cache.position == (20,)


def test_a_shorter_step_after_an_abandoned_one_is_refused_until_a_long_enough_one_is_committed():
    cache, generator = filled()
    run_step(cache, draw_qkv(1, 5, generator))
    with pytest.raises(StreamStateError, match="step of at least 5, since"):
        run_step(cache, draw_qkv(1, 4, generator))
    with pytest.raises(StreamStateError, match="first block of at least 5"):
        cache.prefill(0, *draw_qkv(1, 12, generator)[0])
    run_step(cache, draw_qkv(1, 5, generator))
    cache.commit()
    run_step(cache, draw_qkv(1, 1, generator))


def test_a_shorter_step_is_accepted_while_the_ring_has_room():
    cache, generator = filled(tokens=2)
    run_step(cache, draw_qkv(1, 5, generator))
    run_step(cache, draw_qkv(1, 1, generator))
    cache.commit()
    assert cache.position == (3,)


def test_commit_refuses_unless_every_layer_attended_the_same_block():
    cache, generator = filled(lanes=2)
    with pytest.raises(StreamStateError, match="got no block"):
        cache.commit()
    (q, k, v), other = draw_qkv(2, 4, generator)
    cache.attend(0, q, k, v)
    with pytest.raises(StreamStateError, match=r"layers \[1\] did not"):
        cache.commit()
    with pytest.raises(StreamStateError, match="layer 1: expected the block that other layers attended"):
        cache.attend(1, *(x[:, :, :3] for x in other))
    with pytest.raises(StreamStateError, match="lanes"):
        cache.attend(1, *(x[:1] for x in other), lanes=[0])
    with pytest.raises(StreamStateError, match="prefill"):
        cache.prefill(1, *other)
    assert cache.position == (20, 20)
    cache.attend(1, *other)
    cache.commit()
    assert cache.position == (24, 24)


def test_a_rejected_call_leaves_the_open_block_as_it_was():
    cache, generator = filled()
    twin, _ = filled()
    first, second = draw_qkv(1, 4, generator)
    cache.attend(0, *first)
    for bad in (first[0][..., :4], first[0].float(), first[0][:, :, :, None]):
        with pytest.raises(StreamStateError):
            cache.attend(1, bad, *second[1:])
    with pytest.raises(StreamStateError, match=r"layer: expected an int in 0\.\.1, got 2"):
        cache.attend(2, *second)
    out = cache.attend(1, *second)
    cache.commit()
    assert torch.equal(out, run_step(twin, [first, second])[1])


@pytest.mark.parametrize("prefill", [False, True])
def test_a_kernel_that_fails_leaves_the_stream_as_it_was(prefill, monkeypatch):
    cache, generator = filled()
    twin, _ = filled()
    qkv = draw_qkv(1, 6, generator)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    for name in ("window_decode_attention", "prefill_attention"):
        with monkeypatch.context() as patch:
            patch.setattr(f"swba_kernels.{name}", fail)
            with pytest.raises(RuntimeError, match="out of memory") if (name[0] == "p") == prefill else _nothing():
                for layer, x in enumerate(draw_qkv(1, 6, generator)):
                    (cache.prefill if prefill else cache.attend)(layer, *x)
    assert cache.position == (20,)
    assert all(torch.equal(a, b) for a, b in zip(run_step(cache, qkv), run_step(twin, qkv), strict=True))


def test_a_prefill_on_history_writes_nothing_before_its_commit_and_reports_what_it_stages():
    cache, generator = filled()
    before = cache.k.clone()
    qkv = draw_qkv(1, 9, generator)
    for layer, x in enumerate(qkv):
        cache.prefill(layer, *x)
    assert torch.equal(cache.k, before)
    assert cache.staged_bytes == cache.staged_peak_bytes == 2 * LAYERS * KV_HEADS * 6 * HEAD_DIM * 8
    cache.commit()
    assert (cache.staged_bytes, cache.position) == (0, (29,))


def test_a_prefill_of_an_empty_lane_beside_one_with_history_is_exact_for_both():
    (cache, generator), (twin, _) = filled(lanes=2), filled(lanes=2)
    cache.reset(0)
    twin.reset(0)
    qkv = draw_qkv(2, 9, generator)
    both = [cache.prefill(layer, *x) for layer, x in enumerate(qkv)]
    cache.commit()
    for lane in (0, 1):
        alone = [twin.prefill(i, *(y[lane : lane + 1] for y in x), lanes=lane) for i, x in enumerate(qkv)]
        twin.commit()
        torch.testing.assert_close([x[lane : lane + 1] for x in both], alone)
    step = draw_qkv(2, 4, generator)
    torch.testing.assert_close(run_step(cache, step), run_step(twin, step))


def test_first_blocks_of_empty_lanes_do_not_mix_with_lanes_that_have_history():
    cache = make_cache(replace(STREAM, first_block_frames=1), lanes=2)
    generator = torch.Generator().manual_seed(0)
    for layer, x in enumerate(draw_qkv(1, 6, generator)):
        cache.prefill(layer, *x, lanes=1)
    cache.commit()
    with pytest.raises(StreamStateError, match=r"positions \[0, 6\]"):
        cache.prefill(0, *draw_qkv(2, 6, generator)[0])
    assert cache.position == (0, 6)


@pytest.mark.parametrize("lanes", [[], [0, 0], [2], [-1], [True], "0", 0.5, torch.tensor([0])])
def test_lanes_must_be_distinct_ints_in_range(lanes):
    cache, generator = filled(lanes=2)
    with pytest.raises(StreamStateError, match="lanes"):
        cache.attend(0, *draw_qkv(1, 2, generator)[0], lanes=lanes)


def test_a_step_longer_than_the_window_is_refused():
    cache, generator = filled()
    with pytest.raises(StreamStateError, match=r"expected 1 to 6 \(the window\), got 7"):
        cache.attend(0, *draw_qkv(1, 7, generator)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers: expected an int of at least 1"),
        ({"lanes": True}, "lanes"),
        ({"head_dim": 12}, "head_dim: expected a multiple of 8"),
        ({"kv_heads": 1.5}, "kv_heads"),
        ({"dtype": torch.int64}, "dtype: expected a floating dtype"),
        ({"stream": {"tokens_per_frame": 1}}, "stream: expected a StreamConfig, got dict"),
    ],
)
def test_a_wrong_size_is_named_before_anything_is_allocated(change, message):
    sizes = {"layers": 1, "lanes": 1, "kv_heads": 1, "head_dim": 8, "stream": STREAM, "dtype": torch.float32}
    with pytest.raises(ConfigError, match=message):
        RingKVCache(**{**sizes, **change, "device": "cpu"})
    with pytest.raises(ConfigError, match=message):
        RingKVCache.predict_bytes(**{**sizes, **change})


def test_a_snapshot_of_another_stream_is_refused_and_changes_nothing():
    cache, _ = filled()
    position = cache.position
    other = make_cache(replace(STREAM, window_frames=4, sink_frames=0)).snapshot()
    with pytest.raises(StreamStateError, match="snapshot"):
        cache.restore(other)
    with pytest.raises(StreamStateError, match="2 lanes"):
        filled(lanes=2)[0].restore(cache.snapshot())
    assert cache.position == position


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...
