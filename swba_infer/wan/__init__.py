"""The Wan family: checkpoints under diffusers' and the official names, converted pickles, and streams from them.

Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .generator import WanGenerator
    from .load import load_wan

__all__ = ["WanGenerator", "load_wan"]

_HOME = {"WanGenerator": "generator", "load_wan": "load"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
