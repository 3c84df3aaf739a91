"""Sampling as few-step causal Wan checkpoints were trained (CausVid, Self-Forcing, LongLive).

Noise level s in [0, 1]: x_s = (1 - s) x_0 + s eps. The model is told the timestep 1000 s and predicts the flow
eps - x_0. Each step jumps to x_0, and fresh noise brings x_0 back to the next, lower level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import check_keys
from ..errors import ConfigError
from ..sampling import draw_noise

TRAIN_TIMESTEPS = 1000

Key = tuple[int, int, int]


class DenoisingStep(NamedTuple):
    """What the model is told, and how noisy its input is."""

    timestep: float
    level: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RenoisingSampler:
    """How a block is drawn by a model that was distilled to jump to x_0 (distribution matching, Yin et al. 2024).

    Args:
        timesteps: where the model looks, falling, in (0, 1000]; one denoising step each.
        shift: of the checkpoint's training schedule: u becomes shift u / (1 + (shift - 1) u).
        warp: whether `timesteps` are meant before the shift (Self-Forcing, LongLive) or after it (CausVid). Without it
            the noise level of a timestep is that of the nearest of the 1000 shifted training steps, as in training.
        context_noise: timestep in [0, 1000) at which a finished block enters the history; above 0 the block is made as
            noisy as the model is told.
        guidance: scale of classifier-free guidance; 1 needs no second lane.
    """

    timesteps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    warp: bool = True
    context_noise: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        steps = self.timesteps
        if isinstance(steps, str) or not isinstance(steps, Sequence) or not all(_is_number(t) for t in steps):
            raise ConfigError(f"timesteps: expected a sequence of numbers, got {steps!r}")
        falling = all(a > b for a, b in pairwise(steps))
        if not steps or not falling or not 0 < steps[-1] <= steps[0] <= TRAIN_TIMESTEPS:
            raise ConfigError(f"timesteps: expected falling numbers in (0, {TRAIN_TIMESTEPS}], got {list(steps)}")
        object.__setattr__(self, "timesteps", tuple(float(t) for t in steps))
        for name in ("shift", "context_noise", "guidance"):
            if not _is_number(getattr(self, name)):
                raise ConfigError(f"{name}: expected a number, got {getattr(self, name)!r}")
        if not isinstance(self.warp, bool):
            raise ConfigError(f"warp: expected a bool, got {self.warp!r}")
        if not 0 < self.shift < float("inf"):
            raise ConfigError(f"shift: expected a positive number, got {self.shift!r}")
        if not 0 <= self.context_noise < TRAIN_TIMESTEPS:
            raise ConfigError(f"context_noise: expected a number in [0, {TRAIN_TIMESTEPS}), got {self.context_noise!r}")
        if not 0 < self.guidance < float("inf"):
            raise ConfigError(f"guidance: expected a positive number, got {self.guidance!r}")

    @classmethod
    def with_steps(cls, steps: int, **fields: Any) -> RenoisingSampler:
        """Spread a number of steps evenly before the shift: four give 1000, 750, 500, 250."""
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= TRAIN_TIMESTEPS:
            raise ConfigError(f"steps: expected an int of 1 to {TRAIN_TIMESTEPS}, got {steps!r}")
        return cls(timesteps=tuple(TRAIN_TIMESTEPS * (steps - i) / steps for i in range(steps)), **fields)

    @property
    def steps(self) -> int:
        """Denoising steps of a block."""
        return len(self.timesteps)

    @property
    def commit(self) -> DenoisingStep:
        """What the model is told when a finished block enters the history."""
        return DenoisingStep(self.context_noise, self.context_noise / TRAIN_TIMESTEPS)

    def schedule(self) -> tuple[DenoisingStep, ...]:
        """Return the denoising steps, from the noisiest."""
        if self.warp:
            levels = [self._shifted(t / TRAIN_TIMESTEPS) for t in self.timesteps]
            return tuple(DenoisingStep(TRAIN_TIMESTEPS * level, level) for level in levels)
        trained = [self._shifted(i / TRAIN_TIMESTEPS) for i in range(TRAIN_TIMESTEPS, 0, -1)]
        levels = [min(trained, key=lambda level: abs(TRAIN_TIMESTEPS * level - t)) for t in self.timesteps]
        return tuple(DenoisingStep(t, level) for t, level in zip(self.timesteps, levels, strict=True))

    def draw(
        self,
        predict: Callable[[Tensor, float], Tensor],
        key: Key,
        shape: Sequence[int],
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw one clean block in float32.

        Args:
            predict: maps the noisy block and its timestep to the predicted flow; called once a step.
            key: (seed, lane, block); with the step it decides the noise, so a retry draws the same.
            shape: of the block, for one lane.
        """
        steps = self.schedule()
        x = draw_noise(*key, 0, shape, device)
        for i, step in enumerate(steps):
            clean = self.to_clean(x, predict(x, step.timestep), step.level)
            if i + 1 == len(steps):
                return clean
            x = torch.lerp(clean, draw_noise(*key, i + 1, shape, device), steps[i + 1].level)
        raise AssertionError("a schedule has at least one step")

    def context(self, clean: Tensor, key: Key) -> Tensor:
        """Return a finished block at the noise level at which the model reads its history."""
        if not self.context_noise:
            return clean
        return torch.lerp(clean, draw_noise(*key, self.steps, clean.shape, clean.device), self.commit.level)

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Combine two predictions by classifier-free guidance (Ho and Salimans 2022)."""
        return torch.lerp(unconditional.float(), conditional.float(), self.guidance)

    @staticmethod
    def to_clean(x: Tensor, flow: Tensor, level: float) -> Tensor:
        """Return x_0 in float32, from a noisy block and the predicted flow; computed in float64."""
        return (x.double() - level * flow.double()).float()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dict, for JSON."""
        return {**asdict(self), "timesteps": list(self.timesteps)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RenoisingSampler:
        """Build from a dict such as `to_dict` returns; unknown keys raise ConfigError."""
        check_keys("sampler", cls, values)
        return cls(**values)

    def _shifted(self, u: float) -> float:
        return self.shift * u / (1 + (self.shift - 1) * u)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
