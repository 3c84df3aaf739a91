"""Attention kernels for autoregressive video: the block window in training, prefill and streaming decode."""

from __future__ import annotations

from .api import (
    attention,
    block_window_attention,
    prefill_attention,
    ring_write,
    window_decode_attention,
)
from .choice import Choice, choose_impl
from .pattern import BlockWindow

__all__ = [
    "BlockWindow",
    "Choice",
    "attention",
    "block_window_attention",
    "choose_impl",
    "prefill_attention",
    "ring_write",
    "window_decode_attention",
]
