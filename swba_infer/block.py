"""A block under way, and the lanes it belongs to.

B lanes of a call, Hkv key/value heads, N tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from swba_kernels.pattern import BlockWindow

from .config import StreamConfig
from .errors import StreamStateError

MOST_TOKENS = 2**62  # before a history that begins anew; positions have 64 bits


class StagedTokens(NamedTuple):
    """Keys and values [B, Hkv, n, D] that a prefill on history writes at its commit, `offset` tokens into the call."""

    offset: int
    k: Tensor
    v: Tensor


class BlockTensors(NamedTuple):
    """What the kernels need of a block, int64 [B] on the device.

    Lanes (None: all), first position, slots that a step sees, tokens of history that a prefill sees.
    """

    index: Tensor | None
    start: Tensor
    valid: Tensor
    history: Tensor


@dataclass(slots=True, eq=False)
class Block:
    """The block (of a step) or blocks (of a prefill) that a forward attends; not yet part of the stream.

    Attributes:
        tokens: tokens of each lane.
        rows: lanes that take part.
        lanes: which; None for all, in order.
        prefill: many blocks at once.
        on_history: a prefill of which some lane is not empty.
        sink_tokens: leading tokens of a prefill among which some lane has sinks that its window does not reach.
        written_end_before: of all lanes, to be restored if nothing was written.
        history_start: absolute position of a prefill that takes the place of the history; None for all other blocks.
        touched: whether a ring may have been written.
        done: layers that attended.
        staged: by layer, what a prefill on history will write.
    """

    tokens: int
    rows: int
    lanes: tuple[int, ...] | None
    prefill: bool
    on_history: bool
    sink_tokens: int
    written_end_before: tuple[int, ...]
    history_start: int | None = None
    tensors: BlockTensors | None = None
    touched: bool = False
    done: set[int] = field(default_factory=set)
    staged: dict[int, list[StagedTokens]] = field(default_factory=dict)

    @property
    def call(self) -> tuple[int, tuple[int, ...] | None, bool, int | None]:
        """What every layer of the block is called with: tokens, lanes, prefill, history_start."""
        return self.tokens, self.lanes, self.prefill, self.history_start

    @property
    def bound(self) -> BlockTensors:
        """The device tensors, which exist once the cache has bound the block."""
        assert self.tensors is not None
        return self.tensors

    @property
    def staged_bytes(self) -> int:
        """Bytes of surviving keys and values that a prefill on history holds until its commit."""
        return sum(part.k.nbytes + part.v.nbytes for parts in self.staged.values() for part in parts)

    def pattern(self, stream: StreamConfig) -> BlockWindow:
        """Return the pattern of a prefill, whose block grid starts at the call's first token."""
        pattern = stream.pattern
        if self.history_start is not None:
            return replace(pattern, first_block=self.tokens % pattern.block_size)
        return replace(pattern, first_block=0) if self.on_history else pattern

    def stage(self, layer: int, k: Tensor, v: Tensor, window: int) -> None:
        """Keep a copy of the sinks and of the last window; a lane's later tokens are written over earlier ones."""
        recent = max(0, self.tokens - window)
        parts = [StagedTokens(recent, k[:, :, recent:].clone(), v[:, :, recent:].clone())]
        if self.sink_tokens:
            sinks = slice(0, self.sink_tokens)
            parts.insert(0, StagedTokens(0, k[:, :, sinks].clone(), v[:, :, sinks].clone()))
        self.staged[layer] = parts


def normalise_lanes(lanes: int | Sequence[int] | None, total: int) -> tuple[int, ...] | None:
    """Return lanes as a tuple of distinct ints in 0 .. total-1, or None for all of them in order.

    Raises:
        StreamStateError: anything else, or no lane at all.
    """
    if lanes is None:
        return None
    if isinstance(lanes, int):
        chosen: tuple[int, ...] = (lanes,)
    elif isinstance(lanes, Sequence) and not isinstance(lanes, str):
        chosen = tuple(lanes)
    else:
        raise StreamStateError(f"lanes: expected None, an int or a sequence of ints, got {type(lanes).__name__}")
    for lane in chosen:
        if isinstance(lane, bool) or not isinstance(lane, int) or not 0 <= lane < total:
            raise StreamStateError(f"lanes: expected ints in 0..{total - 1}, got {lane!r}")
    if not chosen or len(set(chosen)) != len(chosen):
        raise StreamStateError(f"lanes: expected at least one lane and none twice, got {list(chosen)}")
    return None if chosen == tuple(range(total)) else chosen


def describe_call(tokens: int, lanes: Sequence[int] | None, prefill: bool, start: int | None, total: int) -> str:
    """Say what a block was called with, for messages."""
    where = "" if start is None else f" from position {start}"
    shown = list(range(total)) if lanes is None else list(lanes)
    return f"{'prefill' if prefill else 'step'} of {tokens} tokens{where}, lanes {shown}"


def check_extension(
    tokens: int,
    prefill: bool,
    rows: Sequence[int],
    history: Sequence[int],
    written_end: Sequence[int],
    stream: StreamConfig,
) -> None:
    """Raise StreamStateError unless a step or prefill may extend lanes `rows` with these positions."""
    window, capacity = stream.window_tokens, stream.capacity_tokens
    if tokens < 1 or (tokens > window and not prefill):
        limit = "at least 1" if prefill else f"1 to {window} (the window)"
        raise StreamStateError(f"tokens: expected {limit}, got {tokens}")
    if prefill and stream.first_block_frames and min(history) == 0 < max(history):
        raise StreamStateError(
            "lanes: expected either empty lanes or lanes with history, since the first block of an empty lane is "
            f"shorter; got positions {list(history)}"
        )
    first = min(tokens, stream.block_tokens) if prefill else tokens
    for lane, position, end in zip(rows, history, written_end, strict=True):
        if position + first < end and end > capacity:
            raise StreamStateError(
                f"tokens: expected a {'first block' if prefill else 'step'} of at least {end - position}, since an "
                f"uncommitted step of that size has overwritten in lane {lane} what a shorter one would see; "
                f"got {first}"
            )


def check_history_start(start: int, tokens: int, position: int, sink: int, window: int) -> None:
    """Raise StreamStateError unless a prefill of `tokens` may take the place of a history of `position` tokens."""
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= MOST_TOKENS:
        raise StreamStateError(f"history_start: expected None or an int from 0 to {MOST_TOKENS}, got {start!r}")
    if tokens < 1:
        raise StreamStateError(f"tokens: expected at least 1, got {tokens}")
    if position < min(start, sink):
        raise StreamStateError(
            f"history_start: expected lanes that hold the {min(start, sink)} sink tokens below {start}, "
            f"got one at position {position}"
        )
    if start > sink and tokens < window:
        raise StreamStateError(
            f"tokens: expected at least {window} (the window) from a history_start beyond the sinks, got {tokens}"
        )


def step_tokens(k: Tensor) -> int:
    """Return N of k [B, Hkv, N, D]; raise StreamStateError if it is not a tensor of that rank."""
    if not isinstance(k, Tensor) or k.dim() != 4:
        got = list(k.shape) if isinstance(k, Tensor) else type(k).__name__
        raise StreamStateError(f"k: expected a tensor [lanes, kv_heads, tokens, head_dim], got {got}")
    return k.shape[2]


def check_qkv(
    q: Tensor, k: Tensor, v: Tensor, kv_shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise StreamStateError unless k, v are [B, Hkv, N, D] = `kv_shape` and q is [B, G * Hkv, N, D] beside them."""
    rows, kv_heads, tokens, head_dim = kv_shape
    for name, x in (("k", k), ("v", v), ("q", q)):
        if not isinstance(x, Tensor):
            raise StreamStateError(f"{name}: expected a tensor, got {type(x).__name__}")
        shape = tuple(x.shape)
        if name == "q":
            grouped = len(shape) == 4 and shape[1] > 0 and shape[1] % kv_heads == 0
            fits = grouped and (shape[0], *shape[2:]) == (rows, tokens, head_dim)
        else:
            fits = shape == tuple(kv_shape)
        if not fits:
            expected = f"[{rows}, a multiple of {kv_heads}, {tokens}, {head_dim}]" if name == "q" else list(kv_shape)
            raise StreamStateError(f"{name}: expected {expected}, got {list(shape)}")
        if x.dtype != dtype:
            raise StreamStateError(f"{name}: expected {dtype}, got {x.dtype}")
        if x.device != device:
            raise StreamStateError(f"{name}: expected a tensor on {device}, got {x.device}")


def check_q_sink(q_sink: Tensor | None, q: Tensor, bounded: bool) -> None:
    """Raise StreamStateError unless there is a q_sink like q exactly where sinks stay at a bounded distance."""
    if bounded and q_sink is None:
        raise StreamStateError(
            "q_sink: expected queries rotated by sink_positions, since the stream's sinks stay at a bounded distance, "
            "got None"
        )
    if q_sink is not None and not bounded:
        raise StreamStateError(
            "q_sink: expected None, since the stream has no sinks at a bounded distance, got queries"
        )
    if q_sink is None:
        return
    if not isinstance(q_sink, Tensor):
        raise StreamStateError(f"q_sink: expected a tensor, got {type(q_sink).__name__}")
    if (q_sink.dtype, q_sink.shape, q_sink.device) != (q.dtype, q.shape, q.device):
        got, expected = (f"{x.dtype} {list(x.shape)} on {x.device}" for x in (q_sink, q))
        raise StreamStateError(f"q_sink: expected {expected} as q, got {got}")
