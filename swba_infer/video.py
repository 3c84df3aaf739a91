"""Frames in and out: uint8 [F, H, W, 3] RGB from videos and images, H.264 files and contact sheets from frames.

PyAV and Pillow come with `pip install swba-infer[video]` and are imported on first use.
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from numbers import Real
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .errors import ConfigError
from .files import check_writable, replacing

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov")
RESIZE = ("area", "nearest", "bicubic")


def read_frames(
    source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], limit: int | None = None
) -> np.ndarray:
    """Read frames as uint8 [F, H, W, 3].

    Args:
        source: a video, an image, a directory of images (in name order), or a list of images.
        limit: keep only the last `limit` frames; no more are held at a time, however long the video.

    Raises:
        ConfigError: nothing there, no frames in it, not decodable, or images of different sizes.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            paths = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        elif not path.is_file():
            raise ConfigError(f"context: expected a video, an image or a directory of images, got {path}: no such file")
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            paths = [path]
        else:
            return _stack(_decode(path, limit), path)
    else:
        paths = [Path(p) for p in source]
    sizes = {_image_size(p) for p in paths}
    if len(sizes) > 1:
        raise ConfigError(f"context: expected images of one size, got {sorted(sizes)} (height, width)")
    return _stack([_read_image(p) for p in (paths if limit is None else paths[-limit:])], source)


def resize_frames(frames: np.ndarray, height: int, width: int, method: str = "area") -> np.ndarray:
    """Resize uint8 [F, H, W, 3] to [F, height, width, 3]; `method` is "area", "nearest" or "bicubic"."""
    if method not in RESIZE:
        raise ConfigError(f"resize: expected one of {RESIZE}, got {method!r}")
    image = require("PIL.Image")
    how = {"area": image.Resampling.BOX, "nearest": image.Resampling.NEAREST, "bicubic": image.Resampling.BICUBIC}
    return np.stack([np.asarray(image.fromarray(frame).resize((width, height), how[method])) for frame in frames])


class VideoWriter:
    """Write H.264 frame by frame; the file appears under its name when the `with` block ends without an exception.

    One encoder thread, so the same frames give the same bytes. With `keep_partial` the file grows under `partial`, in
    fragments of about a second, and stays there if the block ends with an exception or the process is killed: what
    was finished by then plays.

    Args:
        path: of the video (mp4, mkv, mov); checked for writability at once, as is that of the partial file.
        fps: frames per second, 0.001 to 1000.
        scale: integer enlargement, every pixel becomes scale x scale.
        crf: quality, 0 (lossless) to 51.
        keep_partial: keep what an interrupted run has written.

    Raises:
        ConfigError: an unwritable path, a bad option, or PyAV is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float = 10.0,
        scale: int = 1,
        crf: int = 16,
        keep_partial: bool = False,
    ) -> None:
        self.path = check_writable(path)
        if self.path.suffix.lower() not in VIDEO_SUFFIXES:
            raise ConfigError(f"output: expected a name ending in one of {VIDEO_SUFFIXES}, got {self.path}")
        if not isinstance(fps, Real) or not 0.001 <= fps <= 1000:
            raise ConfigError(f"fps: expected a number from 0.001 to 1000, got {fps!r}")
        if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1:
            raise ConfigError(f"scale: expected an int of at least 1, got {scale!r}")
        self.frames = 0
        self.partial = None
        if keep_partial:
            self.partial = check_writable(self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}"))
        self._av = require("av")
        self._rate = Fraction(fps).limit_denominator(1000)
        self._scale, self._crf = scale, crf
        self._shape: tuple[int, ...] | None = None
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(self.path) if self.partial is None else self._growing())
            options = {"movflags": "faststart", "fflags": "+bitexact"}
            if self.partial is not None:
                options |= {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
            self._container = self._av.open(str(temporary), "w", options=options)
            self._stack = stack.pop_all()
        return self

    def write(self, frame: np.ndarray) -> None:
        """Append one uint8 [H, W, 3] frame; all of one size."""
        if self._container is None:
            raise ConfigError("frame: expected a writer opened by a `with` block, got one that is not")
        if not isinstance(frame, np.ndarray):
            raise ConfigError(f"frame: expected a uint8 array [H, W, 3], got {type(frame).__name__}")
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
            raise ConfigError(f"frame: expected uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}")
        if self._stream is None:
            self._stream = self._open_stream(frame)
        elif frame.shape != self._shape:
            raise ConfigError(f"frame: expected {list(self._shape or ())}, got {list(frame.shape)}")
        frame = np.ascontiguousarray(frame.repeat(self._scale, axis=0).repeat(self._scale, axis=1))
        picture = self._av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts = self.frames
        self._container.mux(self._stream.encode(picture))
        self.frames += 1

    def _open_stream(self, frame: np.ndarray) -> Any:
        height, width = frame.shape[0] * self._scale, frame.shape[1] * self._scale
        if height % 2 or width % 2:
            raise ConfigError(f"frame: expected even height and width after scaling, got {height} x {width}")
        self._shape = frame.shape
        stream = self._container.add_stream("libx264", rate=self._rate)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p"
        # x264's macroblock tree is not reproducible: now and then the same small pictures give another file.
        stream.options = {"crf": str(self._crf), "preset": "medium", "threads": "1", "x264-params": "no-mbtree=1"}
        stream.codec_context.thread_count = 1
        if self.partial is not None:
            stream.codec_context.gop_size = max(1, round(self._rate))
        stream.codec_context.time_base = 1 / self._rate
        return stream

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            try:
                if error is None or (self.partial is not None and self.frames):
                    self._finish()
            finally:
                self._container.close()
            if error is not None:
                raise error

    @contextmanager
    def _growing(self) -> Iterator[Path]:
        """Yield the partial path; rename it onto the final one on success, keep it on failure if it has a frame."""
        assert self.partial is not None
        try:
            yield self.partial
            self.partial.replace(self.path)
        finally:
            if not self.frames:
                self.partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._stream is None:
            raise ConfigError("frames: expected at least one frame, got none")
        self._container.mux(self._stream.encode())


def contact_sheet(
    frames: Sequence[np.ndarray] | np.ndarray,
    columns: int,
    path: str | os.PathLike[str] | None = None,
    labels: Sequence[str] | None = None,
    scale: int = 1,
) -> np.ndarray:
    """Lay frames [H, W, 3] out in rows of `columns`, a label under each if given; write a PNG if `path` is given."""
    if len(frames) == 0 or columns < 1:
        raise ConfigError(f"frames: expected at least one frame and column, got {len(frames)} and {columns}")
    if labels is not None and len(labels) != len(frames):
        raise ConfigError(f"labels: expected {len(frames)}, got {len(labels)}")
    image, draw = require("PIL.Image"), require("PIL.ImageDraw")
    height, width = frames[0].shape[0] * scale, frames[0].shape[1] * scale
    gap, text = 2, 14 if labels is not None else 0
    rows = -(-len(frames) // columns)
    sheet = image.new("RGB", (columns * (width + gap) + gap, rows * (height + text + gap) + gap), (24, 24, 24))
    for i, frame in enumerate(frames):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + text + gap)
        sheet.paste(image.fromarray(np.asarray(frame)).resize((width, height), image.Resampling.NEAREST), (x, y))
        if labels is not None:
            draw.Draw(sheet).text((x + 2, y + height + 1), labels[i], fill=(230, 230, 230))
    if path is not None:
        with replacing(path) as temporary:
            sheet.save(temporary, format="PNG")
    return np.asarray(sheet)


def require(module: str) -> Any:
    """Import a module of the `video` extra; raise ConfigError saying how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{module.split('.')[0]} is needed for video files: pip install swba-infer[video]") from error


@contextmanager
def _opened_image(path: Path) -> Iterator[Any]:
    image = require("PIL.Image")
    try:
        with image.open(path) as opened:
            yield opened
    except OSError as error:
        raise ConfigError(f"context: expected a readable image, got {path}: {error}") from error


def _image_size(path: Path) -> tuple[int, int]:
    """Return height and width from the header; the pixels are not read."""
    with _opened_image(path) as opened:
        return opened.height, opened.width


def _read_image(path: Path) -> np.ndarray:
    with _opened_image(path) as opened:
        return np.asarray(opened.convert("RGB"))


def _decode(path: Path, limit: int | None) -> list[np.ndarray]:
    av = require("av")
    try:
        with av.open(str(path)) as container:
            kept = deque(container.decode(video=0), maxlen=limit)
            frames = [frame.to_ndarray(format="rgb24") for frame in kept]
    except (av.FFmpegError, IndexError, UnicodeDecodeError) as error:
        raise ConfigError(f"context: expected a readable video, got {path}: {error}") from error
    return frames


def _stack(frames: list[np.ndarray], source: Any) -> np.ndarray:
    if not frames:
        raise ConfigError(f"context: expected at least one frame, got none in {source}")
    return np.stack(frames)
