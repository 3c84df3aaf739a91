"""The frame-by-frame loop: frames and actions in, frames out, for as long as one likes.

F frames, H height, W width, N tokens, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoint import load_model, parse_part, resolve_directory
from .config import StreamConfig
from .device import pick_device
from .engine import StreamingEngine
from .errors import CheckpointError, ConfigError, NumericsError
from .models.video_dit import VideoDiT, compile_layers, patchify, unpatchify
from .sampling import FlowSampler

DEFAULT_FPS = 12.0


class VideoGenerator:
    """Stream video from an action-conditioned `VideoDiT`.

    Each frame is drawn by a few uncommitted engine steps from pure noise to a clean frame, and one committed step that
    makes the clean frame part of the history. Noise is keyed by (seed, lane, first frame of the block, denoising
    step): the same seed on the same device gives the same video, bit for bit.

    Args:
        model: the transformer, in its final dtype and on its device.
        stream: the pattern it was trained with.
        sampler: denoising steps and noise levels.
        actions: names of the model's actions, in the order of its indices.
        fps: frames per second at which the video plays.
        lanes: independent streams.
        impl, cuda_graph, check_finite: see `StreamingEngine`.
    """

    def __init__(
        self,
        model: VideoDiT,
        stream: StreamConfig,
        sampler: FlowSampler | None = None,
        actions: Sequence[str] = (),
        fps: float = DEFAULT_FPS,
        lanes: int = 1,
        impl: str = "auto",
        cuda_graph: bool = True,
        check_finite: bool = False,
    ) -> None:
        size = model.config
        if stream.tokens_per_frame != size.tokens_per_frame:
            raise ConfigError(
                f"stream: expected {size.tokens_per_frame} tokens per frame, got {stream.tokens_per_frame}"
            )
        self.actions = tuple(actions) or tuple(str(i) for i in range(size.actions))
        if len(self.actions) != size.actions or len(set(self.actions)) != size.actions:
            raise ConfigError(f"actions: expected {size.actions} different names, got {list(self.actions)}")
        self.height, self.width, self.fps = size.height, size.width, fps
        self.sampler = sampler or FlowSampler()
        self.engine = StreamingEngine(
            model, stream, lanes=lanes, impl=impl, cuda_graph=cuda_graph, check_finite=check_finite
        )
        self._size, self._stream = size, stream
        self._seed = [0] * lanes

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        impl: str = "auto",
        lanes: int = 1,
        compile: bool = False,
        steps: int | None = None,
        context_noise: float | None = None,
        cuda_graph: bool = True,
        check_finite: bool = False,
    ) -> VideoGenerator:
        """Load a shipped model ("freedoom") or a model directory.

        Args:
            device: default: cuda if there is one, else cpu.
            dtype: default: as stored on CUDA, float32 on the CPU.
            compile: run the pointwise work through torch.compile; the first frame then takes a minute or so.
            steps, context_noise: override the model's `FlowSampler`.

        Raises:
            ConfigError: no such model, or a config that does not describe one.
            CheckpointError: damaged or contradictory weights.
        """
        device = pick_device(device)
        if dtype is None and device.type == "cpu":
            dtype = torch.float32
        model, stream, config = load_model(resolve_directory(name_or_dir), dtype, device)
        if not isinstance(model, VideoDiT):
            raise ConfigError(f"model: expected a VideoDiT, got {type(model).__name__}")
        sampler = parse_part(FlowSampler, config, "sampler")
        given = {"steps": steps, "context_noise": context_noise}
        sampler = replace(sampler, **{name: value for name, value in given.items() if value is not None})
        # As the convolutions' inputs come; otherwise each call copies its weights.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile:
            compile_layers(model)
        return cls(
            model,
            stream,
            sampler,
            actions=config.get("actions", ()),
            fps=config.get("fps", DEFAULT_FPS),
            lanes=lanes,
            impl=impl,
            cuda_graph=cuda_graph,
            check_finite=check_finite,
        )

    @property
    def position(self) -> tuple[int, ...]:
        """Frames in each lane's history, context included."""
        return tuple(tokens // self._stream.tokens_per_frame for tokens in self.engine.position)

    @property
    def context_frames(self) -> int | None:
        """How many of the last context frames can matter to what follows, in whole blocks; None with sinks: all.

        A frame's keys carry what its own window showed, so each layer reaches one window further back.
        """
        stream = self._stream
        if stream.sink_frames:
            return None
        blocks = -(-self._size.depth * stream.window_frames // stream.frames_per_block)
        return stream.first_block_frames + blocks * stream.frames_per_block

    def stream(
        self,
        context: np.ndarray | Tensor | None = None,
        context_actions: Iterable[int | str] | Tensor | None = None,
        actions: Iterable[int | str] | Tensor | None = None,
        frames: int | None = None,
        seed: int | None = None,
        lane: int = 0,
    ) -> Iterator[np.ndarray]:
        """Yield frames, uint8 [H, W, 3], one at a time; nothing runs before the first is asked for.

        Blocks of several frames are computed whole. Closing the iterator early leaves the stream at the end of the
        block that was computed last; another call without `context` goes on from there.

        Args:
            context: uint8 frames [F, H, W, 3] that come before; they start the lane afresh. None goes on with the
                lane's history (at first an empty one).
            context_actions: the action before each context frame; None for unknown ones.
            actions: the action before each new frame, indices or names; the stream ends with them. None: unknown.
            frames: at most this many new frames; None: no limit.
            seed: of the noise; None keeps the lane's seed (at first 0).
            lane: which stream.

        Raises:
            ConfigError: an argument is of the wrong type, shape or range; raised at the call, except for the single
                actions, which are read as they are needed.
            NumericsError: with `check_finite`, NaN or infinity came up; names the frame; the frame is not committed.
        """
        lane = self._check_index("lane", lane, self.engine.lanes)
        if frames is not None:
            frames = self._check_index("frames", frames, None)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ConfigError(f"seed: expected an int, got {seed!r}")
        if context is None and context_actions is not None:
            raise ConfigError("context_actions: expected None without context, got a value")
        source = None if actions is None else iter(_plain_actions("actions", actions))
        start = None
        if context is not None:
            tensor = self._check_context(context)
            start = tensor, self._check_context_actions(context_actions, len(tensor))
        return self._run(start, source, frames, seed, lane)

    def reset(self, lane: int | None = None) -> None:
        """Make one lane (None: all) an empty stream with seed 0."""
        chosen = range(self.engine.lanes) if lane is None else [self._check_index("lane", lane, self.engine.lanes)]
        self.engine.reset(None if lane is None else [lane])
        for i in chosen:
            self._seed[i] = 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the stream and its seeds, atomically; see `StreamingEngine.save`."""
        self.engine.save(path, extra={f"seed.{i}": str(seed) for i, seed in enumerate(self._seed)})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on with a saved stream, bit-identically; raise CheckpointError if it is not one of this model."""
        before = self.engine.snapshot()
        extra = self.engine.load(path)
        try:
            self._seed = [int(extra[f"seed.{i}"]) for i in range(self.engine.lanes)]
        except (KeyError, ValueError) as error:
            self.engine.restore(before)
            raise CheckpointError(f"{path}: expected a stream saved by VideoGenerator, missing {error}") from error

    def action_index(self, action: int | str) -> int:
        """Return the index of an action given by index or name; raise ConfigError if there is none."""
        if isinstance(action, str):
            if action not in self.actions:
                raise ConfigError(f"action: expected one of {list(self.actions)}, got {action!r}")
            return self.actions.index(action)
        if isinstance(action, np.integer):
            action = int(action)
        if isinstance(action, bool) or not isinstance(action, int) or not 0 <= action <= len(self.actions):
            raise ConfigError(
                f"action: expected a name, 0 to {len(self.actions) - 1}, or {len(self.actions)} (unknown), "
                f"got {action!r}"
            )
        return action

    def _run(
        self,
        start: tuple[Tensor, Tensor] | None,
        source: Iterator[int | str] | None,
        frames: int | None,
        seed: int | None,
        lane: int,
    ) -> Iterator[np.ndarray]:
        if start is not None:
            self._prefill(*start, lane, self._seed[lane] if seed is None else seed)
        if seed is not None:
            self._seed[lane] = seed
        left = frames
        while left is None or left > 0:
            count = self._block_frames(lane)
            wanted = count if left is None else min(count, left)
            indices = [len(self.actions)] * wanted
            if source is not None:
                indices = [self.action_index(action) for action in islice(source, wanted)]
            if not indices:
                return
            made = self._next_block(indices + indices[-1:] * (count - len(indices)), lane)
            yield from made[: len(indices)]
            left = None if left is None else left - len(indices)

    def _next_block(self, actions: list[int], lane: int) -> np.ndarray:
        """Draw and commit one block, uint8 [F, H, W, 3]."""
        sampler, engine = self.sampler, self.engine
        lanes = None if engine.lanes == 1 else [lane]
        shape = (1, len(actions) * self._stream.tokens_per_frame, self._size.token_channels)
        key = (self._seed[lane], lane, self.position[lane])
        action = torch.tensor([actions]).to(engine.device, non_blocking=True)
        times = sampler.times()
        x = sampler.noise(*key, 0, shape, engine.device)
        try:
            for t, s in pairwise(times):
                clean = engine.step(x, commit=False, lanes=lanes, timestep=t, action=action).float()
                x = sampler.advance(x, clean, t, s)
            x = x.clamp(-1, 1)
            frames = fetch(unpatchify(x, self.height, self.width, self._size.patch, self._size.channels)[0])
            engine.step(self._blur(x, key, sampler.steps), lanes=lanes, timestep=sampler.context_noise, action=action)
        except NumericsError as error:
            raise NumericsError(f"frame {self.position[lane]}: {error}") from error
        return frames()

    def _prefill(self, context: Tensor, actions: Tensor, lane: int, seed: int) -> None:
        """Start a lane afresh from context frames; on failure the lane is as it was."""
        lanes = None if self.engine.lanes == 1 else [lane]
        before = self.engine.snapshot() if self.engine.position[lane] else None
        try:
            self.engine.reset(lanes)
            tokens = patchify(context[None].to(self.engine.device), self._size.patch)
            tokens = self._blur(tokens, (seed, lane, len(context)), -1)
            level, actions = self.sampler.context_noise, actions[None].to(self.engine.device)
            self.engine.prefill(tokens, lanes=lanes, timestep=level, action=actions)
        except BaseException:
            if before is not None:
                self.engine.restore(before)
            raise

    def _blur(self, clean: Tensor, key: tuple[int, int, int], step: int) -> Tensor:
        """Bring clean tokens to the noise level at which this model reads its history."""
        level = self.sampler.context_noise
        if not level:
            return clean
        return torch.lerp(clean, self.sampler.noise(*key, step, clean.shape, clean.device), level)

    def _block_frames(self, lane: int) -> int:
        if self._stream.first_block_frames and self.engine.position[lane] == 0:
            return self._stream.first_block_frames
        return self._stream.frames_per_block

    def _check_context(self, context: Any) -> Tensor:
        frames = context
        expected = f"uint8 [frames >= 1, {self.height}, {self.width}, 3]"
        if isinstance(context, np.ndarray):
            if context.dtype != np.uint8:
                raise ConfigError(f"context: expected {expected}, got {context.dtype} {list(context.shape)}")
            frames = torch.from_numpy(np.require(context, requirements=["C", "W"]))
        if not isinstance(frames, Tensor):
            raise ConfigError(f"context: expected {expected}, got {type(context).__name__}")
        if frames.dtype != torch.uint8 or frames.ndim != 4 or len(frames) == 0:
            raise ConfigError(f"context: expected {expected}, got {frames.dtype} {list(frames.shape)}")
        if tuple(frames.shape[1:]) != (self.height, self.width, 3):
            raise ConfigError(
                f"context: expected {expected}, got {list(frames.shape)}; swba_infer.video.resize_frames resizes"
            )
        return frames

    def _check_context_actions(self, actions: Iterable[int | str] | Tensor | None, count: int) -> Tensor:
        if actions is None:
            return torch.full((count,), len(self.actions))
        indices = [self.action_index(action) for action in _plain_actions("context_actions", actions)]
        if len(indices) != count:
            raise ConfigError(f"context_actions: expected {count}, one per context frame, got {len(indices)}")
        return torch.tensor(indices)

    @staticmethod
    def _check_index(name: str, value: Any, below: int | None) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (below is not None and value >= below):
            limit = "at least 0" if below is None else f"in 0 to {below - 1}"
            raise ConfigError(f"{name}: expected an int {limit}, got {value!r}")
        return value


def fetch(frames: Tensor) -> Callable[[], np.ndarray]:
    """Start to copy frames to the host; what is returned waits for that copy, but not for later work on the device.

    So the commit of a block runs on the device while its frames are looked at and the next step is prepared.
    """
    host = frames.to("cpu", non_blocking=True)
    if not frames.is_cuda:
        return host.numpy
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(frames.device))

    def wait() -> np.ndarray:
        copied.synchronize()
        return host.numpy().copy()  # `host` is pinned, and is not for a caller to keep

    return wait


def _plain_actions(name: str, actions: Iterable[int | str] | Tensor) -> Iterable[int | str]:
    plain: Any = actions.tolist() if isinstance(actions, Tensor) else actions
    if isinstance(plain, str) or not isinstance(plain, Iterable):
        raise ConfigError(f"{name}: expected names or indices, one for each frame, got {type(actions).__name__}")
    return plain
