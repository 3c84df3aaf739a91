"""Models written against the attention context: they train, prefill and stream with one forward."""

from __future__ import annotations

from .video_dit import VideoDiT, VideoDiTConfig
from .wan import WanTransformer
from .wan_config import WanConfig

__all__ = ["VideoDiT", "VideoDiTConfig", "WanConfig", "WanTransformer"]
