"""Checkpoints of the Wan family: diffusers' and the official names, safetensors and converted pickles."""

from __future__ import annotations

from .load import load_wan

__all__ = ["load_wan"]
