"""Few-step flow matching: which noise levels a frame passes through, and noise that can be drawn again.

Noise level t in [0, 1]: x_t = (1 - t) x_0 + t eps; t = 0 is clean, t = 1 is pure noise. The model predicts x_0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .config import check_keys
from .errors import ConfigError

_MASK = (1 << 64) - 1


def _splitmix64(state: int) -> int:
    """Return the splitmix64 hash of a 64-bit number (Steele, Lea and Flood 2014)."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def noise_key(*parts: int) -> int:
    """Hash integers, in order, to a 63-bit generator seed."""
    key = 0
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int):
            raise ConfigError(f"noise key: expected ints, got {type(part).__name__} {part!r}")
        key = _splitmix64(key ^ (part & _MASK))
    return key >> 1


def draw_noise(
    seed: int, lane: int, block: int, step: int, shape: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """Draw float32 normal noise that only (seed, lane, block, step) and the kind of device decide."""
    generator = torch.Generator(device if device is not None else "cpu")
    generator.manual_seed(noise_key(seed, lane, block, step))
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSampler:
    """How a frame is drawn.

    Args:
        steps: denoising steps a frame, at least 1.
        shift: warps the evenly spaced levels u to shift u / (1 + (shift - 1) u); above 1 spends more steps at high
            noise.
        context_noise: noise level in [0, 1) at which a finished frame enters the history; the model is told.
    """

    steps: int = 2
    shift: float = 3.0
    context_noise: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigError(f"steps: expected an int of at least 1, got {self.steps!r}")
        for name in ("shift", "context_noise"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
        if not 0 < self.shift < float("inf"):
            raise ConfigError(f"shift: expected a positive number, got {self.shift!r}")
        if not 0 <= self.context_noise < 1:
            raise ConfigError(f"context_noise: expected a number in [0, 1), got {self.context_noise!r}")

    def times(self) -> tuple[float, ...]:
        """Return the noise levels from 1 down to 0, `steps + 1` numbers."""
        even = [1 - i / self.steps for i in range(self.steps + 1)]
        return tuple(self.shift * u / (1 + (self.shift - 1) * u) for u in even)

    def noise(
        self,
        seed: int,
        lane: int,
        block: int,
        step: int,
        shape: Sequence[int],
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw a block's noise; by convention step 0 is its start and step `steps` the noise of its commit."""
        return draw_noise(seed, lane, block, step, shape, device)

    @staticmethod
    def advance(x: Tensor, clean: Tensor, t: float, s: float) -> Tensor:
        """Take one Euler step from level `t` to the lower level `s`, given the prediction `clean` of x_0."""
        return clean if s == 0 else torch.lerp(clean, x, s / t)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dict, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FlowSampler:
        """Build from a dict such as `to_dict` returns; unknown keys raise ConfigError."""
        check_keys("sampler", cls, values)
        return cls(**values)
