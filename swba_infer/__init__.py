"""A streaming engine for autoregressive video transformers.

Names are imported on first use: `import swba_infer` loads neither triton nor any video library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import RingKVCache
    from .config import StreamConfig
    from .context import AttentionContext, FullSequence, Streaming
    from .engine import StreamingEngine
    from .errors import CheckpointError, ConfigError, NumericsError, StreamStateError, SwbaError
    from .generator import VideoGenerator

__all__ = [
    "AttentionContext",
    "CheckpointError",
    "ConfigError",
    "FullSequence",
    "NumericsError",
    "RingKVCache",
    "StreamConfig",
    "StreamStateError",
    "Streaming",
    "StreamingEngine",
    "SwbaError",
    "VideoGenerator",
]

_HOME = {
    "AttentionContext": "context",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "FullSequence": "context",
    "NumericsError": "errors",
    "RingKVCache": "cache",
    "StreamConfig": "config",
    "StreamStateError": "errors",
    "Streaming": "context",
    "StreamingEngine": "engine",
    "SwbaError": "errors",
    "VideoGenerator": "generator",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
