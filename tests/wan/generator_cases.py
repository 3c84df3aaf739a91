"""A tiny Wan with a tiny autoencoder, random weights: 48 x 32 pixels, 6 tokens a frame, blocks of 2 frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from wan_files import SIZES

from swba_infer import StreamConfig, StreamingEngine
from swba_infer.models.wan import WanTransformer
from swba_infer.wan.sampler import RenoisingSampler
from swba_infer.wan.synthetic import random_wan

TOKENS = SIZES.tokens_per_frame
STREAM = StreamConfig(tokens_per_frame=TOKENS, frames_per_block=2, window_frames=4, sink_frames=1)
SAMPLER = RenoisingSampler(timesteps=(1000, 500))
GUIDED = RenoisingSampler(timesteps=(1000, 500), guidance=3.0)
VAE = {
    "base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.8, 2.0, 1.0],
}  # fmt: skip


def tiny_autoencoder() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.AutoencoderKLWan(**VAE).eval().requires_grad_(False)


def tiny_wan() -> WanTransformer:
    return random_wan(SIZES, device="cpu", dtype=torch.float32)


def make_generator(stream: StreamConfig = STREAM, **options: Any) -> Any:
    from swba_infer.wan.generator import WanGenerator
    from swba_infer.wan.vae import WanVAE

    return WanGenerator(tiny_wan(), WanVAE(tiny_autoencoder()), stream, **options)


def sizes_of(generator: Any) -> tuple[Any, ...]:
    """Return the bytes that a generator holds."""
    return generator.engine.memory(), generator.decoder.bytes, generator._lanes.states[0].history.last.nbytes


def embedding(seed: int, tokens: int = 5) -> Tensor:
    return torch.randn(tokens, SIZES.text_dim, generator=torch.Generator().manual_seed(seed))


def collect(generator: Any, blocks: int, **options: Any) -> np.ndarray:
    """Return the frames of the next blocks, [T, H, W, 3]."""
    made = generator.blocks(**options)
    return np.concatenate([next(made) for _ in range(blocks)])


def started(blocks: int = 4, **options: Any) -> Any:
    """Return a generator that has streamed some blocks."""
    generator = make_generator(**{"sampler": SAMPLER, **options})
    negative = embedding(9) if generator.sampler.guidance != 1 else None
    collect(generator, blocks, prompt=embedding(1), seed=3, negative=negative)
    return generator


def fresh_engine(text: Tensor, stream: StreamConfig = STREAM) -> StreamingEngine:
    """Return an engine of its own under a prompt."""
    engine = StreamingEngine(tiny_wan(), stream)
    for name, value in engine.model.encode_prompt(text[None]).items():
        engine.set_state(name, value)
    return engine


def clip(frames: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (frames, 8 * SIZES.latent_height, 8 * SIZES.latent_width, 3), np.uint8)


def latents_of(generator: Any, start: int, end: int, lane: int = 0) -> Tensor:
    return generator._lanes.states[lane].history.between(start, end)


def state_of(generator: Any) -> list[Any]:
    """Return all that a stream is, to be compared."""
    snapshot = generator.engine.snapshot()
    lanes = [
        (lane.record, lane.history.frames, lane.history.first, lane.history.last) for lane in generator._lanes.states
    ]
    decoder = generator.decoder.state_dict()
    return [snapshot.ring.position, snapshot.ring.k, snapshot.ring.v, snapshot.state, lanes, decoder]


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, Sequence) and not isinstance(a, str):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def fail_after(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, calls: int, error: BaseException) -> None:
    """Let a method raise from a call on, counted from 0."""
    real, count = getattr(target, name), iter(range(calls))

    def failing(*args: Any, **options: Any) -> Any:
        if next(count, None) is None:
            raise error
        return real(*args, **options)

    monkeypatch.setattr(target, name, failing)
