"""The sizes of a stream, in frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from swba_kernels.choice import check_served
from swba_kernels.pattern import BlockWindow

from .errors import ConfigError

SINK_DISTANCES = ("growing", "bounded")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """Say how a stream is cut into frames and blocks, and how far a block sees.

    Args:
        tokens_per_frame: tokens of one (latent) frame, at least 1.
        frames_per_block: frames that are generated together and see each other fully, at least 1.
        window_frames: most recent frames that a block sees, its own included; at least `frames_per_block`.
        sink_frames: first frames of the stream, seen for ever, in addition to the window.
        first_block_frames: frames of the first block where it is shorter than the others; 0 means it is not.
        sink_distance: how far away a block sees the sinks. "growing": where they are, farther with every block.
            "bounded": never farther than if they stood right before its window, in whole frames; in an endless stream
            positions then stay within the range that the model was trained on. Keys keep their rotation; the model
            turns a second query, see `AttentionContext.sink_positions`.

    Raises:
        ConfigError: a field is of another type or out of its range.
    """

    tokens_per_frame: int
    frames_per_block: int
    window_frames: int
    sink_frames: int = 0
    first_block_frames: int = 0
    sink_distance: str = "growing"

    def __post_init__(self) -> None:
        if self.sink_distance not in SINK_DISTANCES:
            raise ConfigError(f"sink_distance: expected one of {SINK_DISTANCES}, got {self.sink_distance!r}")
        for field in fields(self):
            if field.name == "sink_distance":
                continue
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{field.name}: expected an int, got {type(value).__name__} {value!r}")
            low = 0 if field.name in ("sink_frames", "first_block_frames") else 1
            if value < low:
                raise ConfigError(f"{field.name}: expected at least {low}, got {value}")
        if self.window_frames < self.frames_per_block:
            raise ConfigError(
                f"window_frames: expected at least frames_per_block ({self.frames_per_block}), got {self.window_frames}"
            )
        if self.first_block_frames > self.frames_per_block:
            raise ConfigError(
                f"first_block_frames: expected at most frames_per_block ({self.frames_per_block}), "
                f"got {self.first_block_frames}"
            )

    @property
    def block_tokens(self) -> int:
        """Tokens of a regular block."""
        return self.tokens_per_frame * self.frames_per_block

    @property
    def window_tokens(self) -> int:
        """Tokens of the window: the longest step, too."""
        return self.tokens_per_frame * self.window_frames

    @property
    def sink_tokens(self) -> int:
        """Tokens that are seen for ever."""
        return self.tokens_per_frame * self.sink_frames

    @property
    def capacity_tokens(self) -> int:
        """Slots of the ring: sinks and window."""
        return self.sink_tokens + self.window_tokens

    @property
    def bounds_sinks(self) -> bool:
        """Whether there are sinks that stay at a bounded distance."""
        return self.sink_distance == "bounded" and self.sink_frames > 0

    def sink_positions(self, positions: Tensor, ends: Tensor) -> Tensor:
        """Return the positions from which queries see the sinks at a bounded distance.

        A block that ends at most sink + window tokens into the stream sees them from where it stands; a later one from
        as many whole frames nearer as it is further on, so that coordinates inside a frame stay what they are.

        Args:
            positions: absolute positions of the queries, int64 [...].
            ends: absolute end of each query's block, broadcasting against it.
        """
        passed = (ends - self.capacity_tokens).clamp(min=0)
        return positions - passed.div(self.tokens_per_frame, rounding_mode="floor") * self.tokens_per_frame

    @property
    def pattern(self) -> BlockWindow:
        """The pattern that trains what this stream plays."""
        return BlockWindow.from_frames(
            self.tokens_per_frame,
            self.frames_per_block,
            self.window_frames,
            sink_frames=self.sink_frames,
            first_block_frames=self.first_block_frames,
        )

    def to_dict(self) -> dict[str, int | str]:
        """Return the fields as a plain dict, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StreamConfig:
        """Build from a dict such as `to_dict` returns; unknown or missing keys raise ConfigError."""
        names = check_keys("stream", cls, values)
        missing = [name for name in names[:3] if name not in values]
        if missing:
            raise ConfigError(f"stream: expected the keys {names[:3]}, {missing} missing")
        return cls(**values)


def check_keys(name: str, config: Any, values: Mapping[str, Any]) -> list[str]:
    """Return the field names of a dataclass; raise ConfigError if `values` has other keys."""
    names = [field.name for field in fields(config)]
    unknown = sorted(set(values) - set(names))
    if unknown:
        raise ConfigError(f"{name}: expected only the keys {names}, got {unknown}")
    return names


def check_sizes(
    layers: int, lanes: int, kv_heads: int, head_dim: int, stream: StreamConfig, dtype: torch.dtype
) -> None:
    """Raise ConfigError unless a ring cache can be made of these sizes."""
    for name, value in (("layers", layers), ("lanes", lanes), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: expected an int of at least 1, got {value!r}")
    if head_dim % 8 or head_dim > 256:
        raise ConfigError(f"head_dim: expected a multiple of 8 up to 256, got {head_dim}")
    if not isinstance(stream, StreamConfig):
        raise ConfigError(f"stream: expected a StreamConfig, got {type(stream).__name__}")
    check_dtype(dtype)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ConfigError unless keys and values can have this dtype."""
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype: expected a floating dtype (float16, bfloat16, float32 or float64), got {dtype}")


def check_impl(impl: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raise ConfigError unless the implementation asked for can serve such a ring on this device."""
    try:
        check_served(impl, torch.empty((0, 0, 0, head_dim), dtype=dtype, device=device), "decode")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from error
