"""Models written against the attention context: they train, prefill and stream with one forward."""

from __future__ import annotations

from .video_dit import VideoDiT, VideoDiTConfig

__all__ = ["VideoDiT", "VideoDiTConfig"]
