"""What a GPU says of itself while it works: how fast its multiprocessors run, and how much power it draws.

A GPU at its power limit lowers its clock, so of two kernels that take as many cycles the one that needs less energy is
faster. Without these numbers a ratio of a few percent cannot be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Reading(NamedTuple):
    """Clock of the multiprocessors in MHz, and the GPU's power in watts: its mean over about the last second."""

    sm_mhz: float
    watts: float


def sensors(device: torch.device) -> tuple[Callable[[], Reading | None], str]:
    """Return a function that reads the sensors of a GPU, and "" or the reason why it can only return None."""
    if device.type != "cuda" or torch.version.hip:
        return lambda: None, f"no sensors on {'ROCm' if torch.version.hip else device.type}"
    try:
        _ask(device)
    except Exception as error:  # torch asks nvidia-ml-py, which may be missing and has errors of its own
        return lambda: None, f"{type(error).__name__}: {error}".splitlines()[0]

    def read() -> Reading | None:
        try:
            return _ask(device)
        except Exception:  # as above; the times that are being taken are worth more than the clock beside them
            return None

    return read, ""


def _ask(device: torch.device) -> Reading:
    return Reading(float(torch.cuda.clock_rate(device)), torch.cuda.power_draw(device) / 1000)
