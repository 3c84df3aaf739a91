"""What a GPU says of itself while it works: how fast its multiprocessors run, and how much power it draws.

A GPU at its power limit lowers its clock, so of two kernels that take as many cycles the one that needs less energy is
faster. Without these numbers a ratio of a few percent cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Reading(NamedTuple):
    """Clock of the multiprocessors in MHz and power of the GPU in watts (NVML's mean over its own last period)."""

    sm_mhz: float
    watts: float


def sensors(device: torch.device) -> tuple[Callable[[], Reading] | None, str]:
    """Return a function that reads the sensors of a GPU and "", or None and the reason why they cannot be read."""
    if device.type != "cuda":
        return None, f"no sensors on {device.type}"

    def read() -> Reading:
        return Reading(torch.cuda.clock_rate(device), torch.cuda.power_draw(device) / 1000)

    try:
        read()
    except (ImportError, RuntimeError) as error:  # torch asks nvidia-ml-py, and that the driver
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    return read, ""
