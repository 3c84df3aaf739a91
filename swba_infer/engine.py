"""The streaming engine: one model, its rings, and the step as the one primitive.

L lanes of the engine, B lanes of a call, N tokens, C channels.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .block import Block
from .cache import RingKVCache
from .conditioning import accepted_names, read_conditioning
from .config import StreamConfig, check_dtype
from .context import Streaming, StreamingModel
from .device import pick_device
from .errors import CheckpointError, ConfigError, NumericsError, StreamStateError
from .graph import StepGraphs
from .snapshot import RingSnapshot
from .stream_state import ModelFingerprint, StoredStream, read_stream, write_stream


class EngineSnapshot(NamedTuple):
    """A stream at one moment, in memory: rings and positions, and the model's lane state."""

    ring: RingSnapshot
    state: dict[str, Tensor]


class StreamingEngine:
    """Stream a model frame by frame: prefill what came before, then step.

    A step or prefill that raises leaves the stream as it was; after a failed step on a full ring, a shorter one is
    refused, because the failed one has overwritten what only the shorter one could see. Not thread-safe.

    Args:
        model: a `StreamingModel`, usually a `torch.nn.Module`; it is moved to `device` and `dtype` where these are
            given, and put in eval mode.
        stream: sizes of blocks, window and sinks.
        lanes: independent streams.
        device: default: the model's.
        dtype: of tokens, keys and values; default: that of most of the model's parameters.
        impl: which attention kernels; "auto" chooses, any other name runs or raises.
        cuda_graph: on CUDA, capture the step once for each signature and replay it; the model's forward must then not
            touch the host. Elsewhere this has no effect.
        check_finite: reject NaN and infinity in tokens and outputs, at the price of waiting for the device.

    Raises:
        ConfigError: the model lacks an attribute, or a size cannot work.
    """

    def __init__(
        self,
        model: StreamingModel | Any,
        stream: StreamConfig,
        lanes: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
        cuda_graph: bool = True,
        check_finite: bool = False,
    ) -> None:
        missing = [name for name in ("layers", "kv_heads", "head_dim", "forward") if not hasattr(model, name)]
        if missing:
            raise ConfigError(f"model: expected the attributes layers, kv_heads, head_dim, forward; {missing} missing")
        device, dtype = _place(model, device, dtype)
        self.model: Any = model
        self.stream, self.lanes, self.dtype = stream, lanes, dtype
        self.check_finite = check_finite
        self.cache = RingKVCache(
            layers=model.layers, lanes=lanes, kv_heads=model.kv_heads, head_dim=model.head_dim,
            stream=stream, dtype=dtype, device=device, impl=impl,
        )  # fmt: skip
        self.device = self.cache.device
        self._state = _lane_state(model, lanes, dtype, self.device)
        self._names = accepted_names(model.forward)
        self._call = model if callable(model) else model.forward
        self._fingerprint = ModelFingerprint(model)
        on_graphs = cuda_graph and self.device.type == "cuda"
        self._graphs = StepGraphs(self.cache, self._forward) if on_graphs else None

    @property
    def position(self) -> tuple[int, ...]:
        """Committed tokens of each lane, on the host; free to read."""
        return self.cache.position

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The model's lane state, [L, ...]; write it with `set_state`."""
        return MappingProxyType(self._state)

    def prefill(
        self,
        tokens: Tensor,
        lanes: int | Sequence[int] | None = None,
        history_start: int | None = None,
        **conditioning: Any,
    ) -> Tensor:
        """Run many blocks at once and commit them, on empty lanes or on top of history.

        Args:
            tokens: [B, N, C] with any N >= 1; the blocks are cut from the call's own start.
            lanes: lanes that take part, in the order of the rows; None for all.
            history_start: absolute position of the first token, to build the lanes' history anew: of the old one only
                the sinks below it stay. The blocks are then counted back from the call's end, and beyond the sinks
                the call must fill the window.
            conditioning: keyword arguments of the model.

        Returns:
            The model's output [B, N, C_out].

        Raises:
            StreamStateError: an argument does not fit; the stream is unchanged.
            NumericsError: with `check_finite`, NaN or infinity came in or out; the stream is unchanged.
        """
        chosen = self.cache.normalise_lanes(lanes)
        tokens = self._check_tokens(tokens, chosen)
        given = read_conditioning(conditioning, self._names)
        try:
            block = self.cache.open(tokens.shape[1], chosen, prefill=True, history_start=history_start)
            tokens = tokens.to(self.dtype)
            out = self._check_output(self._forward(tokens, block, given.tensors(self.device)), block).clone()
            self.cache.commit()
            return out
        except BaseException:
            self.cache.roll_back()
            raise

    def step(
        self, tokens: Tensor, commit: bool = True, lanes: int | Sequence[int] | None = None, **conditioning: Any
    ) -> Tensor:
        """Run one block against the rings.

        Args:
            tokens: [B, N, C] with 1 <= N <= window tokens.
            commit: make the block part of the stream; otherwise it can be run again (a denoising step) or dropped.
            lanes: lanes that take part, in the order of the rows; None for all.
            conditioning: keyword arguments of the model. Tensors are passed as they are, on the engine's device; ints
                and floats become 0-dim int64 and float32 tensors; bools, strings and None are passed as they are.

        Returns:
            The model's output [B, N, C_out], the caller's to keep.

        Raises:
            StreamStateError: an argument does not fit, or the step is shorter than an uncommitted one that has
                overwritten what this one would see; the stream is unchanged.
            NumericsError: with `check_finite`, NaN or infinity came in or out; the stream is unchanged.
        """
        chosen = self.cache.normalise_lanes(lanes)
        tokens = self._check_tokens(tokens, chosen)
        given = read_conditioning(conditioning, self._names)
        block = self.cache.reserve(tokens.shape[1], chosen)
        try:
            if self._graphs is not None:
                out = self._graphs.run(block, tokens, given, commit)
            else:
                tokens = tokens.to(self.dtype)
                out = self._forward(tokens, self.cache.bind(block), given.tensors(self.device)).clone()
            self._check_output(out, block)
            if commit and self._graphs is None:
                self.cache.advance_device(block)
            if commit:
                self.cache.advance_host(block)
            return out
        except BaseException:
            self.cache.roll_back()
            raise

    def set_state(self, name: str, value: Tensor, lanes: int | Sequence[int] | None = None) -> None:
        """Write a tensor of the model's lane state: value [B, ...] for the lanes (None: all)."""
        if name not in self._state:
            raise StreamStateError(f"name: expected one of {sorted(self._state)}, got {name!r}")
        chosen = self.cache.normalise_lanes(lanes)
        buffer = self._state[name]
        expected = [self.lanes if chosen is None else len(chosen), *buffer.shape[1:]]
        if not isinstance(value, Tensor) or list(value.shape) != expected or value.dtype != buffer.dtype:
            got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise StreamStateError(f"{name}: expected {buffer.dtype} {expected}, got {got}")
        with torch.no_grad():
            if chosen is None:
                buffer.copy_(value)
            else:
                buffer.index_copy_(0, self.cache.lane_index(chosen), value.to(self.device))

    def reset(self, lanes: int | Sequence[int] | None = None) -> None:
        """Make the lanes (None: all) empty streams at position 0 with a lane state of zeros."""
        chosen = self.cache.normalise_lanes(lanes)
        self.cache.reset(chosen)
        for buffer in self._state.values():
            if chosen is None:
                buffer.zero_()
            else:
                buffer.index_fill_(0, self.cache.lane_index(chosen), 0)

    def fork(self, src: int, dst: int | Sequence[int]) -> None:
        """Copy lane `src`, its lane state included, into the lane(s) `dst`."""
        for lane in self.cache.fork(src, dst):
            for buffer in self._state.values():
                buffer[lane].copy_(buffer[src].clone())

    def snapshot(self) -> EngineSnapshot:
        """Copy the stream, in memory on the device."""
        with torch.inference_mode(False):
            state = {name: buffer.clone() for name, buffer in self._state.items()}
        return EngineSnapshot(self.cache.snapshot(), state)

    def restore(self, snapshot: EngineSnapshot) -> None:
        """Return to a snapshot of this engine, or of one with the same model, stream and lanes."""
        if not isinstance(snapshot, EngineSnapshot):
            raise StreamStateError(f"snapshot: expected an EngineSnapshot, got {type(snapshot).__name__}")
        shapes = {name: (value.shape, value.dtype) for name, value in snapshot.state.items()}
        expected = {name: (value.shape, value.dtype) for name, value in self._state.items()}
        if shapes != expected:
            raise StreamStateError(f"snapshot.state: expected {expected}, got {shapes}")
        self.cache.restore(snapshot.ring)
        for name, value in snapshot.state.items():
            self._state[name].copy_(value)

    def save(
        self,
        path: str | os.PathLike[str],
        extra: Mapping[str, int | str] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the stream to a safetensors file that appears only when complete.

        Args:
            path: replaced if it exists; a crash at any moment leaves the older file or the new one.
            extra: the caller's own counters (a seed, a block number), returned by `load`.
            tensors: the caller's own tensors, returned by `read`.
        """
        write_stream(path, self.cache, self._state, self._fingerprint(), extra, tensors)

    def read(self, path: str | os.PathLike[str]) -> StoredStream:
        """Return the stream of a file, checked as by `load`; nothing changes until `resume`."""
        return read_stream(path, self.cache, self._state, self._fingerprint())

    def resume(self, stored: StoredStream) -> None:
        """Continue a stream that `read` returned."""
        self.restore(EngineSnapshot(stored.ring, stored.state))

    def load(self, path: str | os.PathLike[str]) -> dict[str, int | str]:
        """Continue the stream of a file; return its `extra`.

        Raises:
            CheckpointError: the file is damaged or of another model, stream or number of lanes; the stream is
                unchanged.
        """
        stored = self.read(path)
        if stored.tensors:
            raise CheckpointError(f"{path}: expected no tensors of a caller, got {sorted(stored.tensors)[:5]}")
        self.resume(stored)
        return stored.extra

    def memory(self) -> dict[str, int]:
        """Return bytes held by the cache (as `predict_bytes` says), the lane state, and the buffers of the graphs;
        and the most that a prefill on history has staged."""
        return {
            "cache": self.cache.bytes,
            "lane_state": sum(buffer.nbytes for buffer in self._state.values()),
            "graph_buffers": 0 if self._graphs is None else self._graphs.bytes,
            "staged_peak": self.cache.staged_peak_bytes,
        }

    def _forward(self, tokens: Tensor, block: Block, conditioning: dict[str, Any]) -> Tensor:
        with torch.inference_mode():
            out = self._call(tokens, Streaming(self.cache, block, self._state), **conditioning)
        self.cache.attended()
        if not isinstance(out, Tensor) or tuple(out.shape[:2]) != (block.rows, block.tokens):
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise StreamStateError(f"model: expected an output [{block.rows}, {block.tokens}, channels], got {got}")
        return out

    def _check_tokens(self, tokens: Tensor, lanes: tuple[int, ...] | None) -> Tensor:
        rows = self.lanes if lanes is None else len(lanes)
        if not isinstance(tokens, Tensor):
            raise StreamStateError(f"tokens: expected a tensor, got {type(tokens).__name__}")
        if tokens.dim() != 3 or tokens.shape[0] != rows or tokens.shape[2] < 1:
            raise StreamStateError(f"tokens: expected [{rows} lanes, tokens, channels], got {list(tokens.shape)}")
        if not tokens.is_floating_point():
            raise StreamStateError(f"tokens: expected a floating dtype, got {tokens.dtype}")
        if tokens.device != self.device:
            raise StreamStateError(f"tokens: expected a tensor on {self.device}, got {tokens.device}")
        if self.check_finite and not bool(torch.isfinite(tokens).all()):
            raise NumericsError("tokens: expected finite numbers, got NaN or infinity")
        return tokens.detach()

    def _check_output(self, out: Tensor, block: Block) -> Tensor:
        if self.check_finite and not bool(torch.isfinite(out).all()):
            positions = [self.position[lane] for lane in block.lanes or range(self.lanes)]
            raise NumericsError(f"model: expected finite outputs, got NaN or infinity at positions {positions}")
        return out


def _place(
    model: Any, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device | str, torch.dtype]:
    """Put a module where it shall run, and return where that is."""
    device = None if device is None else pick_device(device)
    if dtype is not None:
        check_dtype(dtype)
    if not isinstance(model, torch.nn.Module):
        return "cpu" if device is None else device, torch.get_default_dtype() if dtype is None else dtype
    if device is not None or dtype is not None:
        model.to(device=device, dtype=dtype)
    model.eval()
    elements: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        device = parameter.device if device is None else device
        if parameter.is_floating_point():
            elements[parameter.dtype] += parameter.numel()
    common = elements.most_common(1)[0][0] if elements else torch.get_default_dtype()
    return "cpu" if device is None else device, common if dtype is None else dtype


def _lane_state(model: Any, lanes: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    make = getattr(model, "lane_state", None)
    if make is None:
        return {}
    with torch.inference_mode(False), torch.no_grad():
        state = dict(make(lanes, dtype, device))
    for name, buffer in state.items():
        if not isinstance(buffer, Tensor) or buffer.dim() < 1 or buffer.shape[0] != lanes or buffer.device != device:
            raise ConfigError(f"model.lane_state: expected {name!r} to be a tensor [{lanes}, ...] on {device}")
        buffer.zero_()
    return state
