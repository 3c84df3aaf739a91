"""The block-by-block loop for causal Wan checkpoints: prompts in, frames out, for as long as one likes.

C latent channels, F latent frames, h, w latent rows and columns, T pixel frames, H, W pixels, N tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import StreamConfig
from ..engine import StreamingEngine
from ..errors import ConfigError, NumericsError
from ..generator import fetch
from ..models.wan import WanTransformer, compile_layers, patchify, unpatchify
from .decoder import StreamDecoder
from .history import LatentHistory
from .inputs import (
    SINKS,
    Encoder,
    Prompt,
    check_context,
    check_int,
    check_type,
    embed_prompt,
    encode_clip,
    latent_sides,
)
from .load import load_wan
from .sampler import Key, RenoisingSampler
from .saved import LaneRecord, read_saved, write_saved
from .text import EmbeddedPrompts
from .vae import WanVAE, to_pixels

DEFAULT_FPS = 16.0


@dataclass(frozen=True, slots=True, eq=False)
class _Lane:
    history: LatentHistory
    record: LaneRecord


class WanGenerator:
    """Stream video from a causal Wan transformer, decoded as it is made.

    A block is drawn by uncommitted engine steps, decoded, and committed by one more step at the timestep at which the
    checkpoint reads its history. Noise is keyed by (seed, lane, first latent frame, denoising step): the same seed on
    the same device gives the same video, bit for bit. The clean latents of the first frames and of the last are kept,
    so that a prompt, a window or the sinks may change between blocks. What raises leaves the stream as it was.

    Args:
        model: the transformer, in its final dtype and on its device.
        stream: the pattern it was trained with; default: blocks of 3 frames, a window of 21, no sinks.
        vae: the autoencoder.
        sampler: denoising steps; with a guidance other than 1 each stream takes two lanes of the engine, and needs a
            negative prompt.
        encoder: for prompts that are text: a `TextEncoder`, which stays the caller's, or a folder from which one is
            loaded for the time of each use.
        fps: frames per second at which the video plays.
        lanes: independent streams.
        keep_frames: first and last latent frames to keep: the most that a later window and sinks can have; default: two
            windows and the sinks.
        impl, cuda_graph, check_finite: see `StreamingEngine`. NaN and infinity in the frames are found without it.

    Raises:
        ConfigError: parts that do not fit together.
    """

    def __init__(
        self,
        model: WanTransformer,
        vae: WanVAE,
        stream: StreamConfig | None = None,
        sampler: RenoisingSampler | None = None,
        encoder: Encoder | None = None,
        fps: float = DEFAULT_FPS,
        lanes: int = 1,
        keep_frames: int | None = None,
        impl: str = "auto",
        cuda_graph: bool = True,
        check_finite: bool = False,
    ) -> None:
        size = model.config
        stream = stream or StreamConfig(tokens_per_frame=size.tokens_per_frame, frames_per_block=3, window_frames=21)
        check_type("stream", stream, StreamConfig)
        if stream.tokens_per_frame != size.tokens_per_frame:
            raise ConfigError(
                f"stream: expected {size.tokens_per_frame} tokens per frame, got {stream.tokens_per_frame}"
            )
        if vae.channels != size.channels:
            raise ConfigError(f"vae: expected one of {size.channels} latent channels, got {vae.channels}")
        needed = stream.sink_frames + stream.window_frames
        keep = check_int("keep_frames", stream.window_frames + needed if keep_frames is None else keep_frames, needed)
        self.sampler = check_type("sampler", sampler or RenoisingSampler(), RenoisingSampler)
        self.decoder = StreamDecoder(vae, lanes, check_finite=True)
        self.encoder, self.fps, self.lanes = encoder, fps, lanes
        self.height, self.width = size.latent_height * vae.scale, size.latent_width * vae.scale
        self._guided = self.sampler.guidance != 1
        self._options: dict[str, Any] = {"impl": impl, "cuda_graph": cuda_graph, "check_finite": check_finite}
        self.engine = StreamingEngine(model, stream, lanes=lanes * (1 + self._guided), **self._options)
        self._size = size
        frame = torch.zeros(1, size.channels, 1, size.latent_height, size.latent_width, device=self.engine.device)
        self._empty = _Lane(LatentHistory.empty(frame, keep, keep), LaneRecord())
        self._lanes = [self._empty] * lanes

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        base: str | os.PathLike[str] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        size: tuple[int, int] | None = None,
        frames_per_block: int = 3,
        window_frames: int = 21,
        sink_frames: int = 0,
        sink_distance: str = "growing",
        compile: bool = False,
        **options: Any,
    ) -> WanGenerator:
        """Load a checkpoint's transformer, and autoencoder and text encoder of the Wan that it was made from.

        Args:
            model: what `load_wan` reads.
            base: folder with `vae`, and for prompts that are text `text_encoder` and `tokenizer`; default: `model`.
            device: default: cuda if there is one, else cpu.
            dtype: default: bfloat16 on CUDA, else float32.
            size: height and width in pixels; default: 480 x 832, or 704 x 1280 for the autoencoder of Wan 2.2.
            frames_per_block, window_frames, sink_frames: in latent frames, as the checkpoint was trained.
            sink_distance: "bounded" keeps the sinks right before the window; see `StreamConfig`.
            compile: run transformer and decoder through torch.compile; the first blocks then take minutes.
            options: see `WanGenerator`.

        Raises:
            ConfigError: a folder or a part of it is missing, or the sizes do not fit.
            CheckpointError: damaged or contradictory weights.
        """
        folder = Path(model if base is None else base)
        vae = WanVAE.from_pretrained(folder, device, dtype, compile=compile)
        if dtype is None:
            dtype = torch.bfloat16 if vae.device.type == "cuda" else torch.float32
        latent_size = None if size is None else latent_sides(size, vae.scale)
        transformer = load_wan(model, device=vae.device, dtype=dtype, latent_size=latent_size)
        if compile:
            compile_layers(transformer)
        stream = StreamConfig(
            tokens_per_frame=transformer.config.tokens_per_frame, frames_per_block=frames_per_block,
            window_frames=window_frames, sink_frames=sink_frames, sink_distance=sink_distance,
        )  # fmt: skip
        return cls(transformer, vae, stream, **{"encoder": folder, **options})

    @property
    def position(self) -> tuple[int, ...]:
        """Latent frames in each lane's history, context included."""
        return tuple(lane.history.frames for lane in self._lanes)

    def stream(self, prompt: Prompt | None = None, frames: int | None = None, **options: Any) -> Iterator[np.ndarray]:
        """Yield frames, uint8 [H, W, 3], one at a time; as `blocks` otherwise."""
        return (frame for block in self.blocks(prompt, frames, **options) for frame in block)

    def blocks(
        self,
        prompt: Prompt | None = None,
        frames: int | None = None,
        seed: int | None = None,
        lane: int = 0,
        context: np.ndarray | Tensor | None = None,
        negative: str | Tensor | None = None,
        sinks: str = "keep",
    ) -> Iterator[np.ndarray]:
        """Yield frames in the blocks in which they are made, uint8 [T, H, W, 3]; nothing runs before the first.

        Closing the iterator early leaves the stream at the end of the last block; another call goes on from there.

        Args:
            prompt: text, its embedding [N, C], or prompts over time, in seconds from this call's first frame; a
                prompt takes hold with the first block that begins at its time or later. None goes on with the lane's.
            frames: at most this many; None: no limit.
            seed: of the noise; None keeps the lane's (at first 0).
            lane: which stream.
            context: an image or a video that comes before, uint8 [1 + 4 n, H, W, 3]; starts the lane afresh.
            negative: prompt to be guided away from; needs a sampler with guidance.
            sinks: whether a new prompt keeps the sinks as they were encoded ("keep") or not ("refresh").

        Raises:
            ConfigError: an argument is of the wrong type, shape or range, or the lane has no prompt.
            NumericsError: NaN or infinity came up; names the block, which is not committed.
        """
        self._check_switch(lane, negative, sinks)
        for name, value, low in (("frames", frames, 0), ("seed", seed, None)):
            if value is not None:
                check_int(name, value, low)
        start = None if context is None else check_context(context, self.height, self.width)
        prompts, refused = self._embed(prompt), self._embed(negative)
        return self._run(prompts, None if refused is None else refused.embeds, start, frames, seed, lane, sinks)

    def set_prompt(
        self, prompt: str | Tensor, lane: int = 0, negative: str | Tensor | None = None, sinks: str = "keep"
    ) -> None:
        """Switch a lane's prompt; what its window shows is encoded again under the new one."""
        self._check_switch(lane, negative, sinks)
        given, refused = self._embed(prompt), self._embed(negative)
        self._switch(lane, given and given.embeds, refused and refused.embeds, sinks == "keep")

    def reconfigure(
        self,
        *,
        window_frames: int | None = None,
        sink_frames: int | None = None,
        sink_distance: str | None = None,
        sampler: RenoisingSampler | None = None,
    ) -> None:
        """Change window, sinks, their distance or the sampler of all lanes between blocks.

        All but the sampler take a new engine with rings of their own, filled from the kept latents and swapped in when
        that has succeeded; old and new rings are held at once meanwhile.

        Raises:
            ConfigError: sizes that cannot work, latents that were not kept, or guidance switched on or off.
        """
        sampler = check_type("sampler", sampler or self.sampler, RenoisingSampler)
        if (sampler.guidance != 1) != self._guided:
            raise ConfigError(
                f"guidance: expected it to stay {'on' if self._guided else 'off'}, got {sampler.guidance}"
            )
        old = self.engine
        given = {"window_frames": window_frames, "sink_frames": sink_frames, "sink_distance": sink_distance}
        stream = replace(old.stream, **{name: value for name, value in given.items() if value is not None})
        if stream != old.stream:
            engine = StreamingEngine(old.model, stream, lanes=old.lanes, **self._options)
            for name, value in old.state.items():
                engine.set_state(name, value)
            for lane in range(self.lanes):
                self._encode(engine, lane, self._rows(lane), keep_sinks=False)
            self.engine = engine
        self.sampler = sampler

    def reset(self, lane: int | None = None) -> None:
        """Make one lane (None: all) an empty stream without a prompt."""
        for i in range(self.lanes) if lane is None else [lane]:
            check_int("lane", i, 0, self.lanes)
            self.engine.reset(self._rows(i))
            self.decoder.reset(i)
            self._lanes[i] = self._empty

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all lanes, prompts, decoder caches, latents and the sampler, atomically."""
        lanes = [(lane.record, lane.history) for lane in self._lanes]
        write_saved(path, self.engine, self.decoder, lanes, self.sampler)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on with a saved stream, bit-identically; raise CheckpointError if it is not one of this generator."""
        stored, lanes, sampler = read_saved(path, self.engine, self._empty.history, self.lanes, self._guided)
        before = self.decoder.snapshot()
        self.decoder.load_state_dict(stored.decoder)
        try:
            self.engine.resume(stored.stream)
        except BaseException:
            self.decoder.restore(before)
            raise
        self._lanes = [_Lane(history, record) for record, history in lanes]
        self.sampler = sampler

    def _run(
        self,
        prompts: EmbeddedPrompts | None,
        negative: Tensor | None,
        context: Tensor | None,
        frames: int | None,
        seed: int | None,
        lane: int,
        sinks: str,
    ) -> Iterator[np.ndarray]:
        if seed is not None:
            self._note(lane, seed=seed)
        if context is not None:
            self._begin(lane, context, None if prompts is None else prompts.embeds[:1], negative)
            negative = None
        current = 0 if context is not None else -1
        made = 0
        while frames is None or made < frames:
            index = 0 if prompts is None else prompts.schedule.at(made / self.fps)
            if prompts is not None and index != current:
                self._switch(lane, prompts.embeds[index : index + 1], negative, sinks == "keep")
                current, negative = index, None
            elif negative is not None:
                self._switch(lane, None, negative, sinks == "keep")
                negative = None
            block = self._next_block(lane)
            block = block if frames is None else block[: frames - made]
            made += len(block)
            yield block

    def _next_block(self, lane: int) -> np.ndarray:
        """Draw, decode and commit one block, uint8 [T, H, W, 3]."""
        self._check_prompted(lane)
        state, rows = self._lanes[lane], self._rows(lane)
        stream = self.engine.stream
        count = stream.frames_per_block
        if not state.history.frames:
            count = stream.first_block_frames or count
        key = (state.record.seed, lane, state.history.frames)
        before = self.decoder.snapshot()
        try:
            clean = self._draw(key, count, rows)
            pixels = fetch(to_pixels(self.decoder.decode(clean, lanes=lane))[0])
            history = state.history.extend(clean)
            self.engine.step(self._tokens(clean, key, rows), lanes=rows, timestep=self.sampler.commit.timestep)
        except BaseException as error:
            self.decoder.restore(before)
            if isinstance(error, NumericsError):
                place = f"block {state.record.blocks} (latent frame {state.history.frames})"
                raise NumericsError(f"{place}: {error}") from error
            raise
        self._lanes[lane] = _Lane(history, state.record._replace(blocks=state.record.blocks + 1))
        return pixels()

    def _draw(self, key: Key, count: int, rows: Sequence[int]) -> Tensor:
        size = self._size

        def predict(x: Tensor, timestep: float) -> Tensor:
            tokens = patchify(x, size.patch).expand(len(rows), -1, -1)
            out = self.engine.step(tokens, commit=False, lanes=rows, timestep=timestep)
            flow = unpatchify(out, size.latent_height, size.latent_width, size.patch)
            return self.sampler.guide(flow[:1], flow[1:]) if self._guided else flow

        shape = (1, size.channels, count, size.latent_height, size.latent_width)
        return self.sampler.draw(predict, key, shape, self.engine.device)

    def _tokens(self, clean: Tensor, key: Key, rows: Sequence[int]) -> Tensor:
        """Cut clean latents into tokens [rows, N, C p p], as noisy as the model reads its history."""
        return patchify(self.sampler.context(clean, key), self._size.patch).expand(len(rows), -1, -1)

    def _switch(self, lane: int, prompt: Tensor | None, negative: Tensor | None, keep_sinks: bool) -> None:
        """Give a lane other prompts [1, N, C], and encode what it has seen under those that changed."""
        if not self._lanes[lane].history.frames:
            with self._restored_on_error(lane, ring=False):
                self._write_prompts(lane, prompt, negative)
            return
        with self._restored_on_error(lane, ring=not keep_sinks):
            self._encode(self.engine, lane, self._write_prompts(lane, prompt, negative), keep_sinks)

    def _write_prompts(self, lane: int, prompt: Tensor | None, negative: Tensor | None) -> list[int]:
        """Write what the prompts give to the lanes of the engine; return those that got another."""
        rows = []
        for row, text in zip(self._rows(lane), (prompt, negative), strict=False):
            if text is not None:
                with torch.no_grad():
                    state = self.engine.model.encode_prompt(text.to(self.engine.device))
                for name, value in state.items():
                    self.engine.set_state(name, value.to(self.engine.dtype), lanes=row)
                rows.append(row)
        record = self._lanes[lane].record
        self._note(lane, prompted=record.prompted or prompt is not None, guided=record.guided or negative is not None)
        return rows

    def _encode(self, engine: StreamingEngine, lane: int, rows: Sequence[int], keep_sinks: bool) -> None:
        """Build the rows' rings from the kept latents, by one prefill of the window; the rest of the past is gone."""
        state, stream = self._lanes[lane], engine.stream
        frames, sink = state.history.frames, stream.sink_frames
        start = max(sink, frames - stream.window_frames)
        if not keep_sinks and start == sink:
            start = 0
        elif not keep_sinks and sink:
            self._prefill(engine, state.history.between(0, sink), 0, lane, rows)
        if start < frames:
            self._prefill(engine, state.history.between(start, frames), start, lane, rows)

    def _prefill(self, engine: StreamingEngine, clean: Tensor, start: int, lane: int, rows: Sequence[int]) -> None:
        key = (self._lanes[lane].record.seed, lane, start)
        engine.prefill(
            self._tokens(clean, key, rows), lanes=rows, history_start=start * engine.stream.tokens_per_frame,
            timestep=self.sampler.commit.timestep,
        )  # fmt: skip

    def _begin(self, lane: int, context: Tensor, prompt: Tensor | None, negative: Tensor | None) -> None:
        """Start a lane afresh from pixel frames [T, H, W, 3]: encode them, fill the ring, warm the decoder."""
        engine, rows = self.engine, self._rows(lane)
        with self._restored_on_error(lane, ring=True):
            engine.cache.reset(rows)
            self.decoder.reset(lane)
            self._lanes[lane] = _Lane(self._empty.history, self._lanes[lane].record)
            self._write_prompts(lane, prompt, negative)
            self._check_prompted(lane)
            # Cut from the end, so that the blocks which are counted back from it stay whole.
            latents = encode_clip(self.decoder.vae, context)
            size = engine.stream.window_frames // engine.stream.frames_per_block * engine.stream.frames_per_block
            cuts = [0, *range((latents.shape[2] - 1) % size + 1, latents.shape[2] + 1, size)]
            for begin, end in pairwise(cuts):
                part = latents[:, :, begin:end]
                if begin == 0:
                    self._prefill(engine, part, 0, lane, rows)
                else:
                    tokens = self._tokens(part, (self._lanes[lane].record.seed, lane, begin), rows)
                    engine.prefill(tokens, lanes=rows, timestep=self.sampler.commit.timestep)
                for frame in part.split(1, dim=2):
                    self.decoder.decode(frame, lanes=lane)
                state = self._lanes[lane]
                self._lanes[lane] = _Lane(state.history.extend(part), state.record)

    @contextmanager
    def _restored_on_error(self, lane: int, ring: bool) -> Iterator[None]:
        """Bring back prompts, decoder and latents, and the rings if they are copied, should the body raise."""
        engine, state, caches = self.engine, self._lanes[lane], self.decoder.snapshot()
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
            self._lanes[lane] = state
            raise

    def _embed(self, prompt: Prompt | None) -> EmbeddedPrompts | None:
        return None if prompt is None else embed_prompt(prompt, self.encoder, self.engine.device)

    def _check_switch(self, lane: int, negative: Any, sinks: str) -> None:
        check_int("lane", lane, 0, self.lanes)
        if sinks not in SINKS:
            raise ConfigError(f"sinks: expected one of {SINKS}, got {sinks!r}")
        if negative is not None and not self._guided:
            raise ConfigError("negative: expected none without guidance, got a prompt")

    def _rows(self, lane: int) -> list[int]:
        """Return the engine's lanes of a stream: its own and, with guidance, that of the negative prompt."""
        return [lane, lane + self.lanes] if self._guided else [lane]

    def _note(self, lane: int, **fields: Any) -> None:
        state = self._lanes[lane]
        self._lanes[lane] = _Lane(state.history, state.record._replace(**fields))

    def _check_prompted(self, lane: int) -> None:
        record = self._lanes[lane].record
        if not record.prompted or (self._guided and not record.guided):
            missing = "negative prompt" if record.prompted else "prompt"
            raise ConfigError(f"prompt: expected lane {lane} to have one, got no {missing}")
