"""Steps as captured CUDA graphs: one graph for each signature serves a whole stream.

L lanes of a call, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .block import Block
from .cache import RingKVCache
from .conditioning import Conditioning, as_tensor, scalar_dtype
from .errors import ConfigError

Forward = Callable[[Tensor, Block, dict[str, Any]], Tensor]

_WARMUPS = 2


class _CapturedStep(NamedTuple):
    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    index: Tensor | None
    values: dict[str, Tensor]
    out: Tensor


class StepGraphs:
    """Capture a step when its signature is first seen, and replay it from then on.

    A signature is (tokens' shape, commit, all lanes or how many, conditioning names, shapes, dtypes and static
    values): one graph serves a stream while its ring fills and after. Positions are read and advanced on the device,
    inside the graph; tokens, lanes and conditioning are copied into static buffers; what is returned is a copy.

    Args:
        cache: the ring cache that the forward attends to; tokens are copied in with its dtype.
        forward: runs the model on tokens, an open block and conditioning tensors; called during capture only.
    """

    def __init__(self, cache: RingKVCache, forward: Forward) -> None:
        self._cache = cache
        self._forward = forward
        self._steps: dict[Hashable, _CapturedStep] = {}
        self._stream = torch.cuda.Stream(cache.device)
        self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def bytes(self) -> int:
        """Bytes of the static inputs and outputs of all graphs."""
        return sum(
            x.nbytes
            for step in self._steps.values()
            for x in (step.tokens, step.index, step.out, *step.values.values())
            if x is not None
        )

    def run(self, block: Block, tokens: Tensor, conditioning: Conditioning, commit: bool) -> Tensor:
        """Run one step of a reserved block; with `commit` the positions on the device have moved when it returns.

        Raises whatever the model raises while it is captured.
        """
        lanes = None if block.lanes is None else block.rows
        signature = (tuple(tokens.shape), commit, lanes, conditioning.signature())
        block.touched = True
        with torch.cuda.device(self._cache.device):
            step = self._steps.get(signature)
            if step is None:
                step = self._steps[signature] = self._capture(block, tokens, conditioning, commit)
            else:
                self._fill(step, block, tokens, conditioning)
            step.graph.replay()
        block.done.update(range(self._cache.layers))
        return step.out.clone()

    def _fill(self, step: _CapturedStep, block: Block, tokens: Tensor, conditioning: Conditioning) -> None:
        step.tokens.copy_(tokens)
        if block.lanes is not None and step.index is not None:
            step.index.copy_(self._cache.lane_index(block.lanes))
        for name, value in conditioning.values.items():
            if isinstance(value, Tensor):
                step.values[name].copy_(as_tensor(value, self._cache.device))
            else:
                step.values[name].fill_(value)

    def _capture(self, block: Block, tokens: Tensor, conditioning: Conditioning, commit: bool) -> _CapturedStep:
        device = self._cache.device
        with torch.inference_mode(False):
            static_tokens = tokens.to(self._cache.dtype, copy=True)
            index = None if block.lanes is None else self._cache.lane_index(block.lanes).clone()
            values = {
                name: value.detach().to(device, copy=True)
                if isinstance(value, Tensor)
                else torch.full((), value, dtype=scalar_dtype(value), device=device)
                for name, value in conditioning.values.items()
            }
        arguments = {**values, **conditioning.static}

        def forward() -> Tensor:
            block.done.clear()
            return self._forward(static_tokens, self._cache.bind(block, index), arguments)

        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(_WARMUPS):
                    forward()
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                out = forward()
                if commit:
                    self._cache.advance_device(self._cache.attended())
        except RuntimeError as error:
            raise ConfigError(
                f"cuda_graph: expected a model whose step can be captured; pass cuda_graph=False for this one ({error})"
            ) from error
        return _CapturedStep(graph, static_tokens, index, values, out)
