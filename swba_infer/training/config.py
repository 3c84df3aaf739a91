"""What a training run is made of, and the presets that ship."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..config import StreamConfig
from ..errors import ConfigError
from ..models.video_dit import VideoDiTConfig
from ..sampling import FlowSampler
from .loss import LossConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A training run.

    Args:
        model, stream, sampler, loss: what is trained, for which streams, how it will be sampled, against which errors.
        frames: frames of a training sequence.
        batch: sequences of a step.
        steps: optimiser steps, and `minutes`: wall-clock limit (0: none); the schedule follows whichever is further on.
        warmup: steps over which the learning rates rise.
        muon_lr, adam_lr: peak rates of the hidden matrices and of everything else; both fall linearly to zero.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights, which are the ones that ship.
        own_from: share of the run after which histories are partly the model's own.
        own: share of the sequences of a step with such a history.
        export_minutes: how often the model directory and the state are written while training (0: at the end only).
        compile: compile the layers with torch.compile.
        seed: of weights, batches and noise.
        init: shipped model or model directory whose weights the run starts from; empty: fresh weights.
    """

    model: VideoDiTConfig = field(default_factory=VideoDiTConfig)
    stream: StreamConfig = field(
        default_factory=lambda: StreamConfig(tokens_per_frame=48, frames_per_block=1, window_frames=16)
    )
    sampler: FlowSampler = field(default_factory=FlowSampler)
    loss: LossConfig = field(default_factory=LossConfig)
    frames: int = 32
    batch: int = 64
    steps: int = 1_000_000
    minutes: float = 0.0
    warmup: int = 100
    muon_lr: float = 2.5e-3
    adam_lr: float = 1.5e-3
    clip: float = 1.0
    ema: float = 0.999
    own_from: float = 0.6
    own: float = 0.5
    export_minutes: float = 3.0
    compile: bool = False
    seed: int = 0
    init: str = ""

    def __post_init__(self) -> None:
        if self.stream.tokens_per_frame != self.model.tokens_per_frame:
            raise ConfigError(
                f"stream: expected tokens_per_frame {self.model.tokens_per_frame}, got {self.stream.tokens_per_frame}"
            )
        for name in ("frames", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("minutes", "muon_lr", "adam_lr", "export_minutes"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"{name}: expected a number of at least 0, got {value}")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain dicts, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from a dict such as `to_dict` returns."""
        parts = {"model": VideoDiTConfig, "stream": StreamConfig, "sampler": FlowSampler, "loss": LossConfig}
        return cls(**{name: parts[name](**value) if name in parts else value for name, value in values.items()})


def world() -> TrainConfig:
    """Return the configuration of the shipped world: about 20 M parameters, minutes on one GPU."""
    return TrainConfig(compile=True)


def further() -> TrainConfig:
    """Return the configuration that trains the shipped world further, from its weights (`init`).

    The rates rise again to somewhat less than those of a fresh run and fall to zero by the clock. The weights can
    already draw, so a part of the histories is the model's own from the first step on, of two generations, which is
    nearer to a long stream than one.
    """
    return TrainConfig(
        loss=LossConfig(self_passes=2),
        warmup=200,
        muon_lr=2e-3,
        adam_lr=1e-3,
        own_from=0.0,
        own=0.375,
        compile=True,
        init="freedoom",
    )


def tiny() -> TrainConfig:
    """Return a configuration that learns something visible on a CPU within a minute."""
    return TrainConfig(
        model=VideoDiTConfig(dim=64, depth=2, heads=2, mlp=128, cell_dim=16),
        stream=StreamConfig(tokens_per_frame=48, frames_per_block=1, window_frames=4),
        frames=8,
        batch=4,
        steps=60,
        warmup=5,
        ema=0.9,
    )


PRESETS = {"world": world, "further": further, "tiny": tiny}


def preset(name: str, **changes: Any) -> TrainConfig:
    """Return a preset by name, with some fields changed."""
    if name not in PRESETS:
        raise ConfigError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
    return replace(PRESETS[name](), **changes)
