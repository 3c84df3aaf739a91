"""The block-by-block loop for causal Wan checkpoints: prompts in, frames out, for as long as one likes.

T pixel frames, H, W pixels, N text tokens, C text channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from .inputs import (
    SINKS,
    Encoder,
    Prompt,
    check_context,
    check_int,
    check_type,
    embed_prompt,
    latent_sides,
)
from .lanes import Lane, WanLanes
from .load import load_wan
from .sampler import Key, RenoisingSampler
from .text import EmbeddedPrompts
from .vae import WanVAE, to_pixels

DEFAULT_FPS = 16.0


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
        sampler = check_type("sampler", sampler or RenoisingSampler(), RenoisingSampler)
        decoder = StreamDecoder(vae, lanes, check_finite=True)
        self.encoder, self.fps, self.lanes = encoder, fps, lanes
        self.height, self.width = size.latent_height * vae.scale, size.latent_width * vae.scale
        self._options: dict[str, Any] = {"impl": impl, "cuda_graph": cuda_graph, "check_finite": check_finite}
        engine = StreamingEngine(model, stream, lanes=lanes * (1 + (sampler.guidance != 1)), **self._options)
        self._lanes = WanLanes(engine, decoder, sampler, keep)

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
            options: see `WanGenerator`; with `check_finite` the transformer's weights are looked through, too.

        Raises:
            ConfigError: a folder or a part of it is missing, or the sizes do not fit.
            CheckpointError: damaged or contradictory weights.
        """
        folder = Path(model if base is None else base)
        vae = WanVAE.from_pretrained(folder, device, dtype, compile=compile)
        if dtype is None:
            dtype = torch.bfloat16 if vae.device.type == "cuda" else torch.float32
        latent_size = None if size is None else latent_sides(size, vae.scale)
        check = bool(options.get("check_finite"))
        transformer = load_wan(model, device=vae.device, dtype=dtype, latent_size=latent_size, check_finite=check)
        if compile:
            compile_layers(transformer)
        stream = StreamConfig(
            tokens_per_frame=transformer.config.tokens_per_frame, frames_per_block=frames_per_block,
            window_frames=window_frames, sink_frames=sink_frames, sink_distance=sink_distance,
        )  # fmt: skip
        return cls(transformer, vae, stream, **{"encoder": folder, **options})

    @property
    def engine(self) -> StreamingEngine:
        """The engine that runs the transformer; `reconfigure` may replace it."""
        return self._lanes.engine

    @property
    def decoder(self) -> StreamDecoder:
        """The lanes' decoder."""
        return self._lanes.decoder

    @property
    def sampler(self) -> RenoisingSampler:
        """How blocks are drawn; `reconfigure` and `load` change it."""
        return self._lanes.sampler

    @property
    def position(self) -> tuple[int, ...]:
        """Latent frames in each lane's history, context included."""
        return tuple(state.history.frames for state in self._lanes.states)

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
        self._lanes.set_prompts(lane, given and given.embeds, refused and refused.embeds, sinks == "keep")

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
        lanes = self._lanes
        if (sampler.guidance != 1) != lanes.guided:
            raise ConfigError(
                f"guidance: expected it to stay {'on' if lanes.guided else 'off'}, got {sampler.guidance}"
            )
        given = {"window_frames": window_frames, "sink_frames": sink_frames, "sink_distance": sink_distance}
        old = lanes.engine.stream
        stream = replace(old, **{name: value for name, value in given.items() if value is not None})
        if stream != old:
            lanes.rebuild(stream, sampler, **self._options)
        lanes.sampler = sampler

    def reset(self, lane: int | None = None) -> None:
        """Make one lane (None: all) an empty stream without a prompt."""
        for i in range(self.lanes) if lane is None else [lane]:
            check_int("lane", i, 0, self.lanes)
            self._lanes.reset(i)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all lanes, prompts, decoder caches, latents and the sampler, atomically."""
        self._lanes.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on with a saved stream, bit-identically; raise CheckpointError if it is not one of this generator."""
        self._lanes.load(path)

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
            self._lanes.note(lane, seed=seed)
        if context is not None:
            self._lanes.begin(lane, context, None if prompts is None else prompts.embeds[:1], negative)
            negative = None
        current = 0 if context is not None else -1
        made = 0
        while frames is None or made < frames:
            index = 0 if prompts is None else prompts.schedule.at(made / self.fps)
            if prompts is not None and index != current:
                self._lanes.set_prompts(lane, prompts.embeds[index : index + 1], negative, sinks == "keep")
                current, negative = index, None
            elif negative is not None:
                self._lanes.set_prompts(lane, None, negative, sinks == "keep")
                negative = None
            block = self._next_block(lane)
            block = block if frames is None else block[: frames - made]
            made += len(block)
            yield block

    def _next_block(self, lane: int) -> np.ndarray:
        """Draw, decode and commit one block, uint8 [T, H, W, 3]."""
        lanes, decoder = self._lanes, self.decoder
        lanes.check_prompted(lane)
        state, rows = lanes.states[lane], lanes.rows(lane)
        stream = self.engine.stream
        count = stream.frames_per_block
        if not state.history.frames:
            count = stream.first_block_frames or count
        key = (state.record.seed, lane, state.history.frames)
        before = decoder.snapshot()
        try:
            clean = self._draw(key, count, rows)
            pixels = fetch(to_pixels(decoder.decode(clean, lanes=lane))[0])
            history = state.history.extend(clean)
            self.engine.step(lanes.tokens(clean, key, rows), lanes=rows, timestep=self.sampler.commit.timestep)
        except BaseException as error:
            decoder.restore(before)
            if isinstance(error, NumericsError):
                place = f"block {state.record.blocks} (latent frame {state.history.frames})"
                raise NumericsError(f"{place}: {error}") from error
            raise
        lanes.states[lane] = Lane(history, state.record._replace(blocks=state.record.blocks + 1))
        return pixels()

    def _draw(self, key: Key, count: int, rows: Sequence[int]) -> Tensor:
        size = self.engine.model.config

        def predict(x: Tensor, timestep: float) -> Tensor:
            tokens = patchify(x, size.patch).expand(len(rows), -1, -1)
            out = self.engine.step(tokens, commit=False, lanes=rows, timestep=timestep)
            flow = unpatchify(out, size.latent_height, size.latent_width, size.patch)
            return self.sampler.guide(flow[:1], flow[1:]) if self._lanes.guided else flow

        shape = (1, size.channels, count, size.latent_height, size.latent_width)
        return self.sampler.draw(predict, key, shape, self.engine.device)

    def _embed(self, prompt: Prompt | None) -> EmbeddedPrompts | None:
        return None if prompt is None else embed_prompt(prompt, self.encoder, self.engine.device)

    def _check_switch(self, lane: int, negative: Any, sinks: str) -> None:
        check_int("lane", lane, 0, self.lanes)
        if sinks not in SINKS:
            raise ConfigError(f"sinks: expected one of {SINKS}, got {sinks!r}")
        if negative is not None and not self._lanes.guided:
            raise ConfigError("negative: expected none without guidance, got a prompt")
