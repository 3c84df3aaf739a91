"""The ring cache: keys and values of a stream in fixed memory, never copied, re-ordered or read back.

L lanes of the cache, B lanes of a call, H query heads, Hkv key/value heads, N tokens, D head dim,
W window tokens, S sink tokens, C = S + W slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import swba_kernels

from .block import (
    Block,
    BlockTensors,
    check_extension,
    check_history_start,
    check_q_sink,
    check_qkv,
    describe_call,
    normalise_lanes,
    step_tokens,
)
from .config import StreamConfig, check_impl, check_sizes
from .device import check_memory, pick_device
from .errors import StreamStateError
from .positions import LanePositions
from .snapshot import RingSnapshot, copy_layers


class RingKVCache:
    """Hold keys and values of `lanes` streams in rings of sink + window slots a layer.

    The token at absolute position p lives in slot p if p < S, else in slot S + (p - S) % W, so that the visible keys
    of a block are always the first min(position + N, C) slots. A block under way is written where tokens have just
    left its window: it can be attended again and again, and is dropped by doing nothing. `commit` makes it history.

    Not differentiable and not thread-safe. Keys come rotated by their absolute positions.

    Args:
        layers: attention layers.
        lanes: independent streams.
        kv_heads: key/value heads of each layer; query heads are a multiple of it.
        head_dim: size of a head.
        stream: sizes of window, sinks and blocks.
        dtype: of keys and values.
        device: where the rings live.
        impl: which kernels serve it; "auto" chooses, any other name runs or raises.

    Raises:
        ConfigError: a size is no positive int, the dtype no floating one, or the device's memory less than the rings.
    """

    def __init__(
        self,
        *,
        layers: int,
        lanes: int,
        kv_heads: int,
        head_dim: int,
        stream: StreamConfig,
        dtype: torch.dtype,
        device: torch.device | str,
        impl: str = "auto",
    ) -> None:
        check_sizes(layers, lanes, kv_heads, head_dim, stream, dtype)
        device = pick_device(device)
        check_impl(impl, device, dtype, head_dim)
        self.layers, self.lanes, self.kv_heads, self.head_dim = layers, lanes, kv_heads, head_dim
        self.stream, self.dtype, self.impl = stream, dtype, impl
        self.window, self.sink, self.capacity = stream.window_tokens, stream.sink_tokens, stream.capacity_tokens
        shape = (layers, lanes, kv_heads, self.capacity, head_dim)
        check_memory("cache", 2 * layers * lanes * kv_heads * self.capacity * head_dim * dtype.itemsize, device)
        with torch.inference_mode(False):
            self.k = torch.zeros(shape, dtype=dtype, device=device)
            self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.device = self.k.device
        self._positions = LanePositions(lanes, self.device)
        self.staged_peak_bytes = 0
        self._rings = list(zip(self.k.unbind(0), self.v.unbind(0), strict=True))
        self._block: Block | None = None

    @staticmethod
    def predict_bytes(
        *,
        layers: int,
        lanes: int,
        kv_heads: int,
        head_dim: int,
        stream: StreamConfig,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        impl: str = "auto",
    ) -> int:
        """Return what `bytes` will be for a cache with these arguments: its rings and its positions."""
        check_sizes(layers, lanes, kv_heads, head_dim, stream, dtype)
        return 2 * layers * lanes * kv_heads * stream.capacity_tokens * head_dim * dtype.itemsize + 8 * lanes

    @property
    def position_tensor(self) -> Tensor:
        """Committed tokens of each lane, int64 [L] on the device."""
        return self._positions.tensor

    @property
    def bytes(self) -> int:
        """Bytes that the cache holds for as long as it lives."""
        return self.k.nbytes + self.v.nbytes + self.position_tensor.nbytes

    @property
    def staged_bytes(self) -> int:
        """Bytes of surviving keys and values that a prefill on history holds until its commit."""
        return 0 if self._block is None else self._block.staged_bytes

    @property
    def position(self) -> tuple[int, ...]:
        """Committed tokens of each lane; a host mirror of `position_tensor`, free to read."""
        return tuple(self._positions.committed)

    @property
    def written_end(self) -> tuple[int, ...]:
        """How far each lane has been written beyond its position by steps that were not committed; 0 if not at all."""
        return tuple(self._positions.written_end)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lanes: int | Sequence[int] | None = None,
        q_sink: Tensor | None = None,
    ) -> Tensor:
        """Write the block's k, v of one layer into the ring and attend from q to all that the block sees.

        The first call after a commit opens the block and fixes its size and lanes; attending a layer again starts
        the block over (a denoising step, a retry).

        Args:
            layer: 0 .. layers-1.
            q: [B, H, N, D].
            k, v: [B, Hkv, N, D].
            lanes: lanes that take part, in the order of the rows; None for all.
            q_sink: queries for the sinks, like q, rotated by `stream.sink_positions`; exactly where the stream has
                sinks at a bounded distance.

        Returns:
            [B, H, N, D].

        Raises:
            StreamStateError: a shape, dtype or device does not fit, the step is longer than the window, it is
                another block than the other layers attended, or it is shorter than an abandoned step that has
                overwritten what it would see. The stream is unchanged.
        """
        return self._attend(layer, q, k, v, lanes, q_sink, prefill=False)

    def prefill(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lanes: int | Sequence[int] | None = None,
        history_start: int | None = None,
        q_sink: Tensor | None = None,
    ) -> Tensor:
        """Attend from many new blocks of one layer, on empty lanes or on top of history; as `attend` otherwise.

        The block grid starts at the call's first token; a shorter first block counts only for lanes at position 0.
        On history the surviving keys and values are staged until `commit` (`staged_bytes`).

        With `history_start` the call takes the place of the lanes' history: its first token stands at that absolute
        position, of what was there before only the sinks below it are seen and kept, and the blocks are counted back
        from the call's end. Beyond the sinks the call must fill the window, so that no slot is left stale.
        """
        return self._attend(layer, q, k, v, lanes, q_sink, prefill=True, history_start=history_start)

    def commit(self) -> None:
        """Make the attended block part of the stream.

        Raises:
            StreamStateError: no block is open, or not every layer attended it.
        """
        block = self.attended()
        self.advance_device(block)
        self.advance_host(block)

    def abort(self) -> None:
        """Drop the block under way, if any; the stream is as before it."""
        if self._block is not None and not self._block.touched:
            self._positions.written_end = list(self._block.written_end_before)
        self._block = None

    def roll_back(self) -> None:
        """Drop the block under way, wherever it failed: the positions on the device are set from the host's."""
        self.abort()
        self._positions.follow_host()

    def reset(self, lanes: int | Sequence[int] | None = None) -> None:
        """Make the lanes (None: all) empty streams at position 0."""
        chosen = self.normalise_lanes(lanes)
        self.abort()
        self._positions.reset(chosen)

    def fork(self, src: int, dst: int | Sequence[int]) -> tuple[int, ...]:
        """Copy lane `src` into the lane(s) `dst`; return those lanes."""
        if dst is None:
            raise StreamStateError("dst: expected a lane or lanes, got None")
        (source,) = self._rows(self.normalise_lanes((src,)))
        targets = tuple(self._rows(self.normalise_lanes(dst)))
        self.abort()
        used = self.used_slots((source,))
        for lane in targets:
            if lane == source:
                continue
            for ring in (self.k, self.v):
                ring[:, lane, :, :used].copy_(ring[:, source, :, :used])
            self._positions.copy(source, lane)
        return targets

    def snapshot(self, device: torch.device | str | None = None) -> RingSnapshot:
        """Copy the stream, without a block under way, to `device` (default: where it lives)."""
        used = self.used_slots()
        k, v = (copy_layers(ring[..., :used, :], device) for ring in (self.k, self.v))
        return RingSnapshot(self.stream, k, v, self.position, self.written_end)

    def restore(self, snapshot: RingSnapshot) -> None:
        """Return to a snapshot of this cache or of one with the same arguments."""
        if not isinstance(snapshot, RingSnapshot):
            raise StreamStateError(f"snapshot: expected a RingSnapshot, got {type(snapshot).__name__}")
        snapshot.check(self)
        self.abort()
        used = snapshot.k.shape[3]
        self.k[..., :used, :].copy_(snapshot.k)
        self.v[..., :used, :].copy_(snapshot.v)
        self._positions.restore(snapshot.position, snapshot.written_end)

    def used_slots(self, lanes: Sequence[int] | None = None) -> int:
        """Return how many leading slots hold the history of the lanes (None: of any)."""
        return min(max(self._positions.committed[lane] for lane in self._rows(lanes)), self.capacity)

    def normalise_lanes(self, lanes: int | Sequence[int] | None) -> tuple[int, ...] | None:
        """Return lanes as a tuple of distinct ints, or None for all in order; raise StreamStateError if wrong."""
        return normalise_lanes(lanes, self.lanes)

    def lane_index(self, lanes: tuple[int, ...]) -> Tensor:
        """Return the lanes as an int64 tensor on the device; the copy does not wait for the device."""
        return self._positions.index(lanes)

    def reserve(
        self, tokens: int, lanes: tuple[int, ...] | None, *, prefill: bool = False, history_start: int | None = None
    ) -> Block:
        """Open a block on the host: check that it may run and note how far it will write.

        For callers that drive the device themselves (a captured graph); `bind` completes it.
        """
        if self._block is not None and not self._block.touched:
            self.abort()
        rows = self._rows(lanes)
        history = [self._positions.committed[lane] for lane in rows]
        if history_start is None:
            written = [self._positions.written_end[lane] for lane in rows]
            check_extension(tokens, prefill, rows, history, written, self.stream)
        else:
            check_history_start(history_start, tokens, min(history), self.sink, self.window)
        first = min(history) if history_start is None else history_start
        sinks = min(max(0, tokens - self.window), max(0, self.sink - first)) if prefill else 0
        on_history = prefill and max(history) > 0
        block = Block(tokens, len(rows), lanes, prefill, on_history, sinks, self.written_end, history_start)
        if not prefill:
            self._positions.note_written(lanes, tokens)
        self._block = block
        return block

    def bind(self, block: Block, index: Tensor | None = None) -> Block:
        """Compute the block's device tensors from the positions on the device."""
        if index is None and block.lanes is not None:
            index = self.lane_index(block.lanes)
        start = self.position_tensor.clone() if index is None else self.position_tensor.index_select(0, index)
        history = start
        if block.history_start is not None:
            start = torch.full_like(start, block.history_start)
            history = start.clamp(max=self.sink)
        block.tensors = BlockTensors(index, start, (start + block.tokens).clamp_(max=self.capacity), history)
        return block

    def open(
        self, tokens: int, lanes: tuple[int, ...] | None, *, prefill: bool = False, history_start: int | None = None
    ) -> Block:
        """Open a block: `reserve` and `bind`."""
        return self.bind(self.reserve(tokens, lanes, prefill=prefill, history_start=history_start))

    def run(self, block: Block, layer: int, q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None = None) -> Tensor:
        """Attend one layer of an open block."""
        self._check_layer(layer)
        check_qkv(q, k, v, (block.rows, self.kv_heads, block.tokens, self.head_dim), self.dtype, self.device)
        check_q_sink(q_sink, q, self.stream.bounds_sinks)
        return self._run(block, layer, q, k, v, q_sink)

    def sink_positions(self, block: Block, positions: Tensor) -> Tensor | None:
        """Return the positions [B, N] from which an open block at `positions` sees the sinks; None: from there."""
        if not self.stream.bounds_sinks:
            return None
        start = block.bound.start[:, None]
        ends = block.pattern(self.stream).ends(block.tokens, self.device) if block.prefill else block.tokens
        return self.stream.sink_positions(positions, start + ends)

    def attended(self) -> Block:
        """Return the open block if every layer attended it, else raise StreamStateError."""
        block = self._block
        if block is None:
            raise StreamStateError("commit: expected a block that every layer attended, got no block")
        missing = [layer for layer in range(self.layers) if layer not in block.done]
        if missing:
            raise StreamStateError(f"commit: expected every layer to attend the block, layers {missing} did not")
        self.staged_peak_bytes = max(self.staged_peak_bytes, block.staged_bytes)
        return block

    @torch.no_grad()
    def advance_device(self, block: Block) -> None:
        """Write what a prefill staged and move the positions on the device."""
        index, start, _, _ = block.bound
        if block.staged:
            self._positions.note_written(block.lanes, block.tokens)
        for layer, parts in block.staged.items():
            for offset, k, v in parts:
                self._write(layer, k, v, start + offset, index)
        self._positions.advance_device(index, start + block.tokens)

    def advance_host(self, block: Block) -> None:
        """Follow on the host what `advance_device` did, and close the block."""
        self._positions.advance_host(block.lanes, block.tokens, block.history_start)
        self._block = None

    def _attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lanes: int | Sequence[int] | None,
        q_sink: Tensor | None,
        *,
        prefill: bool,
        history_start: int | None = None,
    ) -> Tensor:
        self._check_layer(layer)
        chosen = self.normalise_lanes(lanes)
        tokens = step_tokens(k)
        check_qkv(q, k, v, (len(self._rows(chosen)), self.kv_heads, tokens, self.head_dim), self.dtype, self.device)
        check_q_sink(q_sink, q, self.stream.bounds_sinks)
        block = self._block
        if block is None or not block.done or layer in block.done:
            block = self.open(tokens, chosen, prefill=prefill, history_start=history_start)
        asked = tokens, chosen, prefill, history_start
        if block.call != asked:
            raise StreamStateError(
                f"layer {layer}: expected the block that other layers attended, a "
                f"{describe_call(*block.call, self.lanes)}; got a {describe_call(*asked, self.lanes)}"
            )
        return self._run(block, layer, q, k, v, q_sink)

    @torch.no_grad()
    def _run(self, block: Block, layer: int, q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None) -> Tensor:
        index, start, valid, history = block.bound
        k_ring, v_ring = self._rings[layer]
        block.touched = True
        if not block.prefill:
            self._write(layer, k, v, start, index)
            sink = 0 if q_sink is None else self.sink
            out = swba_kernels.window_decode_attention(
                q, k_ring, v_ring, valid, q_sink=q_sink, sink=sink, lanes=index, impl=self.impl
            )
        elif block.on_history:
            pattern = block.pattern(self.stream)
            out = swba_kernels.prefill_attention(
                q, k, v, pattern, k_ring, v_ring, history, q_sink=q_sink, lanes=index, impl=self.impl
            )
            block.stage(layer, k, v, self.window)
        else:
            out = swba_kernels.block_window_attention(
                q, k, v, block.pattern(self.stream), q_sink=q_sink, impl=self.impl
            )
            self._write(layer, k, v, start, index)
        assert isinstance(out, Tensor)
        block.done.add(layer)
        return out

    def _write(self, layer: int, k: Tensor, v: Tensor, position: Tensor, index: Tensor | None) -> None:
        k_ring, v_ring = self._rings[layer]
        swba_kernels.ring_write(k_ring, v_ring, k, v, position, sink=self.sink, lanes=index, impl=self.impl)

    def _rows(self, lanes: Sequence[int] | None) -> Sequence[int]:
        return self._positions.rows(lanes)

    def _check_layer(self, layer: int) -> None:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < self.layers:
            raise StreamStateError(f"layer: expected an int in 0..{self.layers - 1}, got {layer!r}")
