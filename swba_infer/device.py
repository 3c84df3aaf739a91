"""Which device to run on when none, or only a name, is given, and what fits its memory."""

from __future__ import annotations

import os

import torch

from .errors import ConfigError


def pick_device(device: torch.device | str | None) -> torch.device:
    """Return the device; None means cuda if there is one, else cpu. Raise ConfigError if torch cannot use it."""
    try:
        picked = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device: expected cuda, cuda:0 or cpu, got {device!r}") from error
    if picked.type not in ("cuda", "cpu"):
        raise ConfigError(f"device: expected cuda, cuda:0 or cpu, got {str(device)!r}")
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {str(device)!r}")
    return picked


def check_memory(name: str, size: int, device: torch.device) -> None:
    """Raise ConfigError if `size` bytes are more than all the memory that the device has, free or not."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ConfigError(
            f"{name}: expected at most the {memory / 2**30:.1f} GiB of {device}, got {size / 2**30:.1f} GiB"
        )
