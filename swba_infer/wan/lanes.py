"""The streams of a `WanGenerator`: rings, decoder caches, clean latents and prompts, which change together.

N tokens, C channels of text or latents, p patch size; T pixel frames, H, W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..config import StreamConfig
from ..engine import StreamingEngine
from ..errors import ConfigError
from ..models.wan import patchify
from .decoder import StreamDecoder
from .history import LatentHistory
from .inputs import encode_clip
from .sampler import Key, RenoisingSampler
from .saved import LaneRecord, read_saved, write_saved


@dataclass(frozen=True, slots=True, eq=False)
class Lane:
    """What a stream is besides its rings and its decoder's cache."""

    history: LatentHistory
    record: LaneRecord


class WanLanes:
    """Independent streams of one engine and one decoder; a change that raises leaves them as they were.

    Args:
        engine: of a `WanTransformer`, with a lane for each stream; with guidance followed by one for each negative
            prompt.
        decoder: with a lane for each stream.
        sampler: says how noisy the model reads its history.
        keep_frames: first and last latent frames to keep of a stream.

    Attributes:
        states: one `Lane` for each stream.
    """

    def __init__(
        self, engine: StreamingEngine, decoder: StreamDecoder, sampler: RenoisingSampler, keep_frames: int
    ) -> None:
        self.engine, self.decoder, self.sampler = engine, decoder, sampler
        self.guided = engine.lanes > decoder.lanes
        size = engine.model.config
        self._patch = size.patch
        frame = torch.zeros(1, size.channels, 1, size.latent_height, size.latent_width, device=engine.device)
        self._empty = Lane(LatentHistory.empty(frame, keep_frames, keep_frames), LaneRecord())
        self.states = [self._empty] * decoder.lanes

    def rows(self, lane: int) -> list[int]:
        """Return the engine's lanes of a stream: its own and, with guidance, that of the negative prompt."""
        return [lane, lane + self.decoder.lanes] if self.guided else [lane]

    def note(self, lane: int, **fields: Any) -> None:
        """Change fields of a stream's record."""
        state = self.states[lane]
        self.states[lane] = Lane(state.history, state.record._replace(**fields))

    def check_prompted(self, lane: int) -> None:
        """Raise ConfigError unless a stream has the prompts that it needs."""
        record = self.states[lane].record
        if not record.prompted or (self.guided and not record.guided):
            missing = "negative prompt" if record.prompted else "prompt"
            raise ConfigError(f"prompt: expected lane {lane} to have one, got no {missing}")

    def tokens(self, clean: Tensor, key: Key, rows: Sequence[int]) -> Tensor:
        """Cut clean latents into tokens [rows, N, C p p], as noisy as the model reads its history."""
        return patchify(self.sampler.context(clean, key), self._patch).expand(len(rows), -1, -1)

    def set_prompts(self, lane: int, prompt: Tensor | None, negative: Tensor | None, keep_sinks: bool) -> None:
        """Give a stream other prompts [1, N, C], and encode what it has seen under those that changed."""
        if not self.states[lane].history.frames:
            with self._restored_on_error(lane, ring=False):
                self._write_prompts(lane, prompt, negative)
            return
        with self._restored_on_error(lane, ring=not keep_sinks):
            self._encode(self.engine, lane, self._write_prompts(lane, prompt, negative), keep_sinks)

    def begin(self, lane: int, context: Tensor, prompt: Tensor | None, negative: Tensor | None) -> None:
        """Start a stream afresh from pixel frames [T, H, W, 3]: encode them, fill the rings, warm the decoder."""
        engine, rows = self.engine, self.rows(lane)
        with self._restored_on_error(lane, ring=True):
            engine.cache.reset(rows)
            self.decoder.reset(lane)
            self.states[lane] = Lane(self._empty.history, self.states[lane].record)
            self._write_prompts(lane, prompt, negative)
            self.check_prompted(lane)
            # Cut from the end, so that the blocks which are counted back from it stay whole.
            latents = encode_clip(self.decoder.vae, context)
            size = engine.stream.window_frames // engine.stream.frames_per_block * engine.stream.frames_per_block
            cuts = [0, *range((latents.shape[2] - 1) % size + 1, latents.shape[2] + 1, size)]
            for begin, end in pairwise(cuts):
                part = latents[:, :, begin:end]
                if begin == 0:
                    self._prefill(engine, part, 0, lane, rows)
                else:
                    tokens = self.tokens(part, (self.states[lane].record.seed, lane, begin), rows)
                    engine.prefill(tokens, lanes=rows, timestep=self.sampler.commit.timestep)
                for frame in part.split(1, dim=2):
                    self.decoder.decode(frame, lanes=lane)
                state = self.states[lane]
                self.states[lane] = Lane(state.history.extend(part), state.record)

    def rebuild(self, stream: StreamConfig, sampler: RenoisingSampler, **options: Any) -> None:
        """Build an engine for another stream, fill its rings from the kept latents, and take it for the old one.

        Args:
            sampler: says how noisy the model reads them, and takes the old one's place, too.
            options: of `StreamingEngine`.

        Raises:
            ConfigError: a stream that cannot work, or needs latents that were not kept.
        """
        old, before = self.engine, self.sampler
        engine = StreamingEngine(old.model, stream, lanes=old.lanes, **options)
        for name, value in old.state.items():
            engine.set_state(name, value)
        self.sampler = sampler
        try:
            for lane in range(len(self.states)):
                self._encode(engine, lane, self.rows(lane), keep_sinks=False)
        except BaseException:
            self.sampler = before
            raise
        self.engine = engine

    def reset(self, lane: int) -> None:
        """Make a stream an empty one without a prompt."""
        self.engine.reset(self.rows(lane))
        self.decoder.reset(lane)
        self.states[lane] = self._empty

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all streams and the sampler, atomically."""
        states = [(state.record, state.history) for state in self.states]
        write_saved(path, self.engine, self.decoder, states, self.sampler)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on with what `save` wrote; raise CheckpointError if that is of other lanes, model or stream."""
        stored, states, sampler = read_saved(path, self.engine, self._empty.history, len(self.states), self.guided)
        before = self.decoder.snapshot()
        self.decoder.load_state_dict(stored.decoder)
        try:
            self.engine.resume(stored.stream)
        except BaseException:
            self.decoder.restore(before)
            raise
        self.states = [Lane(history, record) for record, history in states]
        self.sampler = sampler

    def _write_prompts(self, lane: int, prompt: Tensor | None, negative: Tensor | None) -> list[int]:
        """Write what the prompts give to the lanes of the engine; return those that got another."""
        rows = []
        for row, text in zip(self.rows(lane), (prompt, negative), strict=False):
            if text is not None:
                with torch.no_grad():
                    state = self.engine.model.encode_prompt(text.to(self.engine.device))
                for name, value in state.items():
                    self.engine.set_state(name, value.to(self.engine.dtype), lanes=row)
                rows.append(row)
        record = self.states[lane].record
        self.note(lane, prompted=record.prompted or prompt is not None, guided=record.guided or negative is not None)
        return rows

    def _encode(self, engine: StreamingEngine, lane: int, rows: Sequence[int], keep_sinks: bool) -> None:
        """Build the rows' rings from the kept latents, by one prefill of the window; the rest of the past is gone."""
        state, stream = self.states[lane], engine.stream
        frames, sink = state.history.frames, stream.sink_frames
        start = max(sink, frames - stream.window_frames)
        if not keep_sinks and start == sink:
            start = 0
        elif not keep_sinks and sink:
            self._prefill(engine, state.history.between(0, sink), 0, lane, rows)
        if start < frames:
            self._prefill(engine, state.history.between(start, frames), start, lane, rows)

    def _prefill(self, engine: StreamingEngine, clean: Tensor, start: int, lane: int, rows: Sequence[int]) -> None:
        key = (self.states[lane].record.seed, lane, start)
        engine.prefill(
            self.tokens(clean, key, rows), lanes=rows, history_start=start * engine.stream.tokens_per_frame,
            timestep=self.sampler.commit.timestep,
        )  # fmt: skip

    @contextmanager
    def _restored_on_error(self, lane: int, ring: bool) -> Iterator[None]:
        """Bring back prompts, decoder and latents, and the rings if they are copied, should the body raise."""
        engine, state, caches = self.engine, self.states[lane], self.decoder.snapshot()
        before = engine.snapshot() if ring else None
        prompts = {} if ring else {name: value.clone() for name, value in engine.state.items()}
        try:
            yield
        except BaseException:
            if before is not None:
                engine.restore(before)
            for name, value in prompts.items():
                engine.set_state(name, value)
            self.decoder.restore(caches)
            self.states[lane] = state
            raise
