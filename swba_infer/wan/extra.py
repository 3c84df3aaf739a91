"""What comes with `pip install swba-infer[wan]`, imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import ConfigError


def require(module: str) -> Any:
    """Import a module of the `wan` extra; raise ConfigError saying how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ConfigError(f"{package} is needed for this ({error}): pip install swba-infer[wan]") from error
