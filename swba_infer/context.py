"""How a model attends: the same forward trains on full sequences, prefills and streams.

L lanes, H query heads, Hkv key/value heads, N tokens, D head dim, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

import swba_kernels
from swba_kernels.pattern import BlockWindow

from .block import check_q_sink
from .config import StreamConfig
from .errors import ConfigError, StreamStateError

if TYPE_CHECKING:
    from .block import Block
    from .cache import RingKVCache


class AttentionContext(Protocol):
    """What a model sees of its sequence or stream."""

    @property
    def positions(self) -> Tensor:
        """Absolute token positions [L, N], int64."""
        ...

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The model's own tensors per lane, [L, ...]; a forward reads them and never writes them."""
        ...

    @property
    def sink_positions(self) -> Tensor | None:
        """Positions [L, N] from which queries see the sinks; None if from `positions`, like everything else.

        Where it is not None, sinks stay at a bounded distance, and `attend` takes a second query q_sink, rotated by
        these positions. No key is ever rotated twice.
        """
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None = None) -> Tensor:
        """Attend from q [L, H, N, D] to what the pattern shows of k, v [L, Hkv, N, D] and of earlier tokens.

        Keys come rotated by their absolute positions; each layer attends once in a forward. A model that leaves out
        q_sink where there are `sink_positions` is an error.
        """
        ...


class StreamingModel(Protocol):
    """What the engine asks of a model; a `torch.nn.Module` with these attributes fits.

    Optional: `lane_state(lanes, dtype, device) -> dict[str, Tensor]`, tensors of shape [lanes, ...] that the engine
    owns, resets to zero, forks, snapshots and saves (for example the cross-attention keys of a prompt).
    """

    layers: int
    kv_heads: int
    head_dim: int

    def forward(self, tokens: Tensor, context: AttentionContext, **conditioning: Any) -> Tensor:
        """Map tokens [L, N, C] to [L, N, C_out]."""
        ...


class FullSequence:
    """Attend over whole sequences from position 0: training, and the other side of every consistency test.

    Args:
        pattern: the block window, or a `StreamConfig`, whose sinks may stay at a bounded distance.
        lanes: sequences in the batch.
        tokens: tokens of each sequence.
        device: where q, k and v live.
        impl: which kernels; see `swba_kernels.block_window_attention`.
        state: per-lane tensors of the model, [lanes, ...].
    """

    def __init__(
        self,
        pattern: BlockWindow | StreamConfig,
        lanes: int,
        tokens: int,
        device: torch.device | str | None = None,
        impl: str = "auto",
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        for name, value in (("lanes", lanes), ("tokens", tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}: expected an int of at least 1, got {value!r}")
        self.pattern = pattern.pattern if isinstance(pattern, StreamConfig) else pattern
        self.impl = impl
        self.positions = torch.arange(tokens, device=device).expand(lanes, tokens)
        self.sink_positions: Tensor | None = None
        if isinstance(pattern, StreamConfig) and pattern.bounds_sinks:
            self.sink_positions = pattern.sink_positions(self.positions, self.pattern.ends(tokens, device))
        self.state: Mapping[str, Tensor] = {} if state is None else state

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None = None) -> Tensor:
        """Attend over the sequence itself; differentiable. `layer` plays no part."""
        check_q_sink(q_sink, q, self.sink_positions is not None)
        out = swba_kernels.block_window_attention(q, k, v, self.pattern, q_sink=q_sink, impl=self.impl)
        assert isinstance(out, Tensor)
        return out


class Streaming:
    """Attend over one block (a step) or many (a prefill) on top of a stream's cache; the engine makes these.

    Args:
        cache: the ring cache, with `block` open.
        block: the open block.
        state: per-lane tensors of the model for all lanes of the cache; the context shows the rows of the block's.
    """

    def __init__(self, cache: RingKVCache, block: Block, state: Mapping[str, Tensor] | None = None) -> None:
        self._cache = cache
        self._block = block
        index, start, *_ = block.bound
        self.positions = start[:, None] + torch.arange(block.tokens, device=start.device)
        self.sink_positions = cache.sink_positions(block, self.positions)
        rows: Mapping[str, Tensor] = {} if state is None else state
        if index is not None:
            rows = {name: value.index_select(0, index) for name, value in rows.items()}
        self.state: Mapping[str, Tensor] = MappingProxyType(dict(rows))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None = None) -> Tensor:
        """Attend the block in the ring; a second call for a layer of the same forward is an error."""
        if layer in self._block.done:
            raise StreamStateError(f"layer: expected each layer to attend once in a forward, got {layer} twice")
        return self._cache.run(self._block, layer, q, k, v, q_sink)
