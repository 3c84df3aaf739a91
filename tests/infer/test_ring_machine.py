"""The ring as a state machine: any order of steps, prefills, retries, failures, forks, resets and restores equals
dense attention over what was committed, with NaN wherever nobody may look."""

from __future__ import annotations

from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from cache_cases import HEAD_DIM, KV_HEADS, LAYERS, draw_qkv, make_cache
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from swba_infer import RingKVCache, StreamConfig, StreamStateError
from swba_infer.config import SINK_DISTANCES
from swba_kernels.pattern import BlockWindow
from swba_kernels.reference import block_window_reference

streams = st.builds(
    lambda tokens, block, more, sink, first, distance: StreamConfig(
        tokens_per_frame=tokens, frames_per_block=block, window_frames=block + more, sink_frames=sink,
        first_block_frames=min(first, block), sink_distance=distance,
    ),
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2),
    st.sampled_from(SINK_DISTANCES),
)  # fmt: skip


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

    def second(self, q: Tensor) -> Tensor | None:
        """Return a query for the sinks, if the stream takes one."""
        return -2 * q if self.stream.bounds_sinks else None

    def expect(self, chosen: list[int], qkv, pattern: BlockWindow, ends: list[int], layer: int) -> Tensor:
        rows = []
        q, k, v = qkv[layer]
        for row, index in enumerate(chosen):
            old_k, old_v = self.lanes[index].kv[layer]
            keys = torch.cat([old_k, k[row]], dim=1)[None]
            values = torch.cat([old_v, v[row]], dim=1)[None]
            history = old_k.shape[1]
            one = q[row : row + 1]
            rows.append(
                block_window_reference(
                    one, keys, values, pattern, q_sink=self.second(one), block_ends=ends, history=history
                )
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
            out = attend(layer, *qkv[layer], lanes=lanes, q_sink=self.second(qkv[layer][0]))
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

    @rule(data=st.data(), commit=st.booleans())
    def replace_history(self, data, commit: bool) -> None:
        """Prefill from an absolute position: of the history the sinks below it stay, what lies between is gone."""
        chosen = data.draw(st.permutations(range(len(self.lanes))))[: data.draw(st.integers(1, len(self.lanes)))]
        sink, window = self.cache.sink, self.cache.window
        start = data.draw(st.integers(0, sink) | st.integers(0, 40))
        tokens = data.draw(st.integers(1, 2 * self.cache.capacity + 3))
        kept = min(start, sink)
        qkv = draw_qkv(len(chosen), tokens, self.generator)
        if min(self.lanes[i].position for i in chosen) < kept or (start > sink and tokens < window):
            with pytest.raises(StreamStateError, match=r"history_start|tokens"):
                self.cache.prefill(0, *qkv[0], lanes=chosen, history_start=start, q_sink=self.second(qkv[0][0]))
            return
        block = self.pattern.block_size
        ends = [*range(tokens % block, tokens, block), tokens] if tokens % block else [*range(block, tokens + 1, block)]
        whole = self.lanes
        self.lanes = [replace(lane, kv=[(k[:, :kept], v[:, :kept]) for k, v in lane.kv]) for lane in whole]
        for layer in range(LAYERS):
            second = self.second(qkv[layer][0])
            out = self.cache.prefill(layer, *qkv[layer], lanes=chosen, history_start=start, q_sink=second)
            expected = self.expect(chosen, qkv, self.pattern, ends, layer)
            torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-10)
        kept_lanes, self.lanes = self.lanes, whole
        if not commit:
            fresh = all(lane.position == 0 for lane in (whole[i] for i in chosen))
            self.cache.abort()
            assert fresh or self.cache.staged_bytes == 0
            self.poison()
            return
        self.cache.commit()
        gap = torch.full((KV_HEADS, start - kept, HEAD_DIM), 1e6, dtype=torch.float64)
        for row, index in enumerate(chosen):
            self.lanes[index] = Lane(
                [
                    (torch.cat([k, gap, new_k[row]], dim=1), torch.cat([v, gap, new_v[row]], dim=1))
                    for (k, v), (_, new_k, new_v) in zip(kept_lanes[index].kv, qkv, strict=True)
                ]
            )
        self.poison()

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
