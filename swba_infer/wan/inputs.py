"""What a `WanGenerator` is called with: prompts in any form, frames that come before, and numbers.

P prompts, N text tokens, C text channels, T frames, H, W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .prompts import PromptSchedule
from .text import EmbeddedPrompts, TextEncoder
from .vae import FRAMES_PER_LATENT, FeatureCache, WanVAE, from_pixels

T = TypeVar("T")
SINKS = ("keep", "refresh")

Prompt = str | Tensor | PromptSchedule | EmbeddedPrompts
Encoder = TextEncoder | str | os.PathLike[str]


def embed_prompt(prompt: Prompt, encoder: Encoder | None, device: torch.device) -> EmbeddedPrompts:
    """Return prompts over time with their embeddings [P, N, C]; an encoder loaded from a folder is dropped again.

    Raises:
        ConfigError: a prompt of another type or shape, embeddings that are not finite, or text without an encoder.
    """
    if isinstance(prompt, EmbeddedPrompts):
        return _check_embedded(prompt)
    if isinstance(prompt, Tensor):
        if prompt.ndim != 2:
            raise ConfigError(f"prompt: expected an embedding [tokens, channels], got {list(prompt.shape)}")
        return _check_embedded(EmbeddedPrompts(PromptSchedule.single("an embedding"), prompt[None]))
    if isinstance(prompt, str):
        texts: Sequence[str] = [prompt]
        schedule = PromptSchedule.single(prompt.strip() or "no text")
    elif isinstance(prompt, PromptSchedule):
        texts, schedule = prompt.texts, prompt
    else:
        raise ConfigError(f"prompt: expected text, an embedding or a schedule, got {type(prompt).__name__}")
    if encoder is None:
        raise ConfigError("prompt: expected an embedding, since there is no text encoder; got text")
    if isinstance(encoder, TextEncoder):
        return EmbeddedPrompts(schedule, encoder.encode_all(texts))
    with TextEncoder.from_pretrained(encoder, device) as opened:
        return EmbeddedPrompts(schedule, opened.encode_all(texts))


def _check_embedded(prompts: EmbeddedPrompts) -> EmbeddedPrompts:
    schedule = check_type("prompt.schedule", prompts.schedule, PromptSchedule)
    embeds = check_type("prompt.embeds", prompts.embeds, Tensor)
    if embeds.ndim != 3 or len(embeds) != len(schedule) or not embeds.is_floating_point():
        raise ConfigError(
            f"prompt: expected floating embeddings [{len(schedule)} prompts, tokens, channels], "
            f"got {embeds.dtype} {list(embeds.shape)}"
        )
    if not bool(torch.isfinite(embeds).all()):
        raise ConfigError("prompt: expected finite embeddings, got NaN or infinity")
    return prompts


def check_context(context: Any, height: int, width: int) -> Tensor:
    """Return frames as a tensor; raise ConfigError unless they are uint8 [1 + 4 n, H, W, 3]."""
    frames = torch.from_numpy(np.array(context)) if isinstance(context, np.ndarray) else context
    expected = f"uint8 [1 + 4 n, {height}, {width}, 3]"
    if not isinstance(frames, Tensor):
        raise ConfigError(f"context: expected {expected}, got {type(context).__name__}")
    fits = frames.ndim == 4 and tuple(frames.shape[1:]) == (height, width, 3)
    if frames.dtype != torch.uint8 or not fits or len(frames) % FRAMES_PER_LATENT != 1:
        raise ConfigError(f"context: expected {expected}, got {frames.dtype} {list(frames.shape)}")
    return frames


def encode_clip(vae: WanVAE, frames: Tensor) -> Tensor:
    """Encode pixel frames [T, H, W, 3] to latents [1, C, F, h, w], a second or two at a time."""
    cache: FeatureCache | None = None
    parts = []
    cuts = [0, *range(1, len(frames), 8 * FRAMES_PER_LATENT), len(frames)]
    for begin, end in pairwise(cuts):
        latents, cache = vae.encode(from_pixels(frames[begin:end].to(vae.device)[None]), cache)
        parts.append(latents)
    return torch.cat(parts, dim=2)


def check_type(name: str, value: Any, kind: type[T]) -> T:
    """Return the value if it is of the kind; raise ConfigError if not."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
    return value


def check_int(name: str, value: Any, low: int | None = None, below: int | None = None) -> int:
    """Return an int; raise ConfigError unless it is one in `low` .. `below` - 1."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (low is not None and value < low) or (below is not None and value >= below):
        limit = "" if low is None else f" of at least {low}" if below is None else f" in {low} to {below - 1}"
        raise ConfigError(f"{name}: expected an int{limit}, got {value!r}")
    return value


def latent_sides(size: tuple[int, int], scale: int, patch: int = 2) -> tuple[int, int]:
    """Return height and width in latents of a video of `size` pixels; raise ConfigError if they do not divide."""
    for name, value in zip(("height", "width"), size, strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % (scale * patch):
            raise ConfigError(f"{name}: expected a positive multiple of {scale * patch} pixels, got {value!r}")
    return size[0] // scale, size[1] // scale
