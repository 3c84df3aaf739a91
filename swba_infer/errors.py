"""The exceptions of swba_infer: one root, four kinds, each also a ValueError."""

from __future__ import annotations


class SwbaError(Exception):
    """Root of every error that swba_infer raises on purpose."""


class ConfigError(SwbaError, ValueError):
    """A configuration or a model that cannot work: caught before anything is allocated."""


class StreamStateError(SwbaError, ValueError):
    """A call that does not fit the stream as it stands; the stream is unchanged."""


class CheckpointError(SwbaError, ValueError):
    """A file that is damaged, or that belongs to another model or stream; nothing was loaded."""


class NumericsError(SwbaError, ValueError):
    """NaN or infinity where finite numbers were asked for; the stream is unchanged."""
