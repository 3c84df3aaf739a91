"""Flow matching with a noise level of its own for every frame.

Some frames of each sequence are noisy and learn, the others are its clean history, as in a stream. To prepare the
model for its own mistakes, history may carry a little noise that the model is told about (`context_noise`), or be
replaced by predictions of the model itself (`self_context`); the same predictions stand in for the truth under part of
the noise, because that is what the second step of a sampler starts from (`refine`).

Small errors count by their square and large ones by their size. Squares alone are ruled by a few misplaced bright
edges, and ask for the mean of the places where such an edge may be, which is soft; their median is sharp. Sizes alone
would let uncertain texture go flat, since its median is plain: continued from one set of weights for nine minutes of a
CPU core each, a bend at 0.03 gave 0.5 dB more than squares in the first frames of a rollout, and 5% less edge energy.

B sequences, F frames, P tokens of a frame, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """How sequences are made noisy and what the errors weigh.

    Args:
        noisy_low, noisy_high: each sequence draws its share of noisy frames between these; its last is always noisy.
        all_noisy: share of sequences whose frames are all noisy.
        apart: share of sequences in which every second or third frame is noisy instead, so that each has a clean frame
            before it, as in a stream; what a frame shows is mostly decided by the one before.
        pure: share of the noisy frames that are pure noise, where sampling starts.
        shift: of the other noise levels, as in `FlowSampler`.
        context_noise: highest noise level of a history that carries noise.
        context_noise_rate: share of sequences whose history carries noise.
        action_dropout: share of frames whose action is hidden.
        self_low, self_high: share of the history that self-context replaces, drawn per sequence.
        self_passes: how often it does so, each time looking back on its own pictures of the times before.
        self_pure: share of self-context's predictions that start from pure noise, as a stream's do.
        refine: share of the frames that learn, where self-context predicted them, whose noise is laid over that
            prediction instead of the truth.
        bend: size of an error, pixels in [-1, 1], below which the penalty is quadratic and above which it is linear.
        weight_cap: the largest weight of an error; weights are 1 at pure noise and grow as noise falls.
    """

    noisy_low: float = 0.1
    noisy_high: float = 0.5
    all_noisy: float = 0.1
    apart: float = 0.6
    pure: float = 0.25
    shift: float = 3.0
    context_noise: float = 0.2
    context_noise_rate: float = 0.5
    action_dropout: float = 0.05
    self_low: float = 0.2
    self_high: float = 0.6
    self_passes: int = 1
    self_pure: float = 0.25
    refine: float = 0.25
    bend: float = 0.1
    weight_cap: float = 2.0


class Levels(NamedTuple):
    """Noise level t [B, F] of each frame, and which frames learn, bool [B, F]."""

    t: Tensor
    learns: Tensor


class Losses(NamedTuple):
    """Scalars: the loss to minimise, and plain squared errors of frames at pure noise and of all frames that learn."""

    loss: Tensor
    pure: Tensor
    mean: Tensor


def draw_levels(batch: int, frames: int, config: LossConfig, generator: torch.Generator) -> Levels:
    """Draw which frames learn and the noise level of every frame."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device)

    share = config.noisy_low + (config.noisy_high - config.noisy_low) * uniform(batch, 1)
    share = torch.where(uniform(batch, 1) < config.all_noisy, 1.0, share)
    learns = uniform(batch, frames) < share
    learns[:, -1] = True
    stride = torch.randint(2, 4, (batch, 1), generator=generator, device=generator.device)
    apart = torch.arange(frames - 1, -1, -1, device=generator.device) % stride == 0
    learns = torch.where(uniform(batch, 1) < config.apart, apart, learns)
    u = uniform(batch, frames)
    t = (config.shift * u / (1 + (config.shift - 1) * u)).clamp(min=0.02)
    t = torch.where(uniform(batch, frames) < config.pure, 1.0, t)
    history = config.context_noise * uniform(batch, 1) * (uniform(batch, 1) < config.context_noise_rate)
    return Levels(torch.where(learns, t, history), learns)


def add_noise(tokens: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
    """Return (1 - t) tokens + t noise for tokens [B, F P, C] and levels t [B, F]."""
    noise = torch.randn(tokens.shape, generator=generator, device=tokens.device, dtype=tokens.dtype)
    return torch.lerp(tokens, noise, _per_token(t, tokens))


def weights(t: Tensor, config: LossConfig) -> Tensor:
    """Return the weight of an error of x_0 at level t: 1 / t, which makes it the flow's error, capped."""
    return t.clamp(min=1e-3).reciprocal().clamp(max=config.weight_cap)


def penalty(error: Tensor, bend: float) -> Tensor:
    """Return sqrt(error^2 + bend^2) - bend (Charbonnier): about |error| where that is far above `bend`."""
    return (error.square() + bend * bend).sqrt() - bend


@torch.no_grad()
def self_context(
    predict: Predict, tokens: Tensor, actions: Tensor, config: LossConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Replace some frames of `tokens` by one-pass predictions from high noise, `config.self_passes` times.

    Each pass looks back on what the passes before it imagined.

    Returns:
        tokens [B, N, C], and which frames of them are imagined, bool [B, F]
    """
    batch, frames = actions.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=tokens.device)

    imagined = torch.zeros((batch, frames), dtype=torch.bool, device=tokens.device)
    for _ in range(config.self_passes):
        share = config.self_low + (config.self_high - config.self_low) * uniform(batch, 1)
        replaced = uniform(batch, frames) < share
        t = torch.where(uniform(batch, frames) < config.self_pure, 1.0, 0.4 + 0.6 * uniform(batch, frames))
        t = torch.where(replaced, t, 0.0)
        guess = predict(add_noise(tokens, t, generator), t, actions).to(tokens.dtype).clamp(-1, 1)
        tokens = torch.where(_per_token(replaced, tokens), guess, tokens)
        imagined |= replaced
    return tokens, imagined


def flow_loss(
    predict: Predict,
    tokens: Tensor,
    actions: Tensor,
    unknown: int,
    config: LossConfig,
    generator: torch.Generator,
    own: int = 0,
) -> Losses:
    """Compute the loss of a batch.

    Args:
        predict: (noisy tokens [B, N, C], levels [B, F], actions [B, F]) to clean tokens [B, N, C].
        tokens: clean tokens [B, F P, C] in [-1, 1].
        actions: int64 [B, F]; action f led to frame f.
        unknown: index that hides an action.
        own: number of sequences, from the first, whose history is partly the model's own.
    """
    batch, frames = actions.shape
    hidden = torch.rand(actions.shape, generator=generator, device=actions.device) < config.action_dropout
    given = torch.where(hidden, unknown, actions)
    t, learns = draw_levels(batch, frames, config, generator)
    source = tokens
    if own:
        made, imagined = self_context(predict, tokens[:own], actions[:own], config, generator)
        refined = torch.rand((own, frames), generator=generator, device=tokens.device) < config.refine
        use = imagined & (refined | ~learns[:own])
        source = torch.cat((torch.where(_per_token(use, made), made, tokens[:own]), tokens[own:]))
    prediction = predict(add_noise(source, t, generator), t, given).float()
    error = (prediction - tokens).unflatten(1, (frames, -1))
    weighted = penalty(error, config.bend).mean((2, 3)) * weights(t, config)
    squared = error.detach().square().mean((2, 3))
    pure = learns & (t == 1)
    return Losses(
        (weighted * learns).sum() / learns.sum(),
        (squared * pure).sum() / pure.sum().clamp(min=1),
        (squared * learns).sum() / learns.sum(),
    )


def _per_token(frames: Tensor, tokens: Tensor) -> Tensor:
    return frames.repeat_interleave(tokens.shape[1] // frames.shape[1], dim=1)[..., None]
