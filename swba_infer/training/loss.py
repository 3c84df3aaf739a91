"""Flow matching with a noise level of its own for every frame.

Some frames of each sequence are noisy and learn, the others are its clean history, as in a stream. To prepare the
model for its own mistakes, history may carry a little noise that the model is told about (`context_noise`), or be
replaced by predictions of the model itself (`self_context`).

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
        pure: share of the noisy frames that are pure noise, where sampling starts.
        shift: of the other noise levels, as in `FlowSampler`.
        context_noise: highest noise level of a history that carries noise.
        context_noise_rate: share of sequences whose history carries noise.
        action_dropout: share of frames whose action is hidden.
        self_low, self_high: share of the history that self-context replaces, drawn per sequence.
        weight_cap: the largest weight of a squared error; weights are 1 at pure noise and grow as noise falls.
    """

    noisy_low: float = 0.1
    noisy_high: float = 0.5
    all_noisy: float = 0.1
    pure: float = 0.25
    shift: float = 3.0
    context_noise: float = 0.2
    context_noise_rate: float = 0.5
    action_dropout: float = 0.05
    self_low: float = 0.2
    self_high: float = 0.6
    weight_cap: float = 4.0


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
    """Return the weight of the squared error of x_0 at level t: 1 / t^2, which makes it the flow's error, capped."""
    return t.clamp(min=1e-3).square().reciprocal().clamp(max=config.weight_cap)


@torch.no_grad()
def self_context(
    predict: Predict, tokens: Tensor, actions: Tensor, config: LossConfig, generator: torch.Generator
) -> Tensor:
    """Replace some frames of `tokens` by one-pass predictions from high noise."""
    batch, frames = actions.shape
    share = torch.rand((batch, 1), generator=generator, device=tokens.device)
    share = config.self_low + (config.self_high - config.self_low) * share
    replaced = torch.rand((batch, frames), generator=generator, device=tokens.device) < share
    t = 0.4 + 0.6 * torch.rand((batch, frames), generator=generator, device=tokens.device)
    t = torch.where(replaced, t, 0.0)
    guess = predict(add_noise(tokens, t, generator), t, actions).to(tokens.dtype).clamp(-1, 1)
    return torch.where(_per_token(replaced, tokens), guess, tokens)


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
        imagined = self_context(predict, tokens[:own], actions[:own], config, generator)
        source = torch.cat((torch.where(_per_token(learns[:own], imagined), tokens[:own], imagined), tokens[own:]))
    prediction = predict(add_noise(source, t, generator), t, given).float()
    error = (prediction - tokens).square().unflatten(1, (frames, -1)).mean((2, 3))
    pure = learns & (t == 1)
    return Losses(
        (error * weights(t, config) * learns).sum() / learns.sum(),
        ((error * pure).sum() / pure.sum().clamp(min=1)).detach(),
        ((error * learns).sum() / learns.sum()).detach(),
    )


def _per_token(frames: Tensor, tokens: Tensor) -> Tensor:
    return frames.repeat_interleave(tokens.shape[1] // frames.shape[1], dim=1)[..., None]
