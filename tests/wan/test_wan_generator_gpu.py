"""The block-by-block loop on a GPU: graphs, half precision, and the kernels that a CPU does not run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from generator_cases import VAE, assert_same, collect, embedding, state_of
from wan_files import SIZES

from swba_infer import StreamConfig, StreamingEngine
from swba_infer.models.wan import patchify
from swba_infer.wan.synthetic import random_wan

pytestmark = pytest.mark.gpu

CONFIG = replace(SIZES, num_layers=3, num_attention_heads=2, latent_height=24, latent_width=32)
STREAM = StreamConfig(tokens_per_frame=CONFIG.tokens_per_frame, frames_per_block=3, window_frames=9, sink_frames=1)


def gpu_generator(**options: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    from swba_infer.wan.generator import WanGenerator
    from swba_infer.wan.vae import WanVAE

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(**VAE).to("cuda", torch.bfloat16)
    return WanGenerator(random_wan(CONFIG, device="cuda"), WanVAE(vae), STREAM, **options)


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize("frames", [9, 11])
def test_a_history_built_anew_is_that_of_torchs_attention(impl, sink, frames):
    """Frames that blocks of 3 do not divide begin with a shorter block, on sinks that lie far behind."""
    stream = replace(STREAM, sink_frames=sink)
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, CONFIG.channels, 40, CONFIG.latent_height, CONFIG.latent_width)
    latents = torch.randn(shape, generator=generator, device="cuda")
    rings = []
    for name in (impl, "sdpa"):
        model = random_wan(CONFIG, device="cuda")
        engine = StreamingEngine(model, stream, impl=name)
        for key, value in model.encode_prompt(embedding(1)[None].cuda()).items():
            engine.set_state(key, value)
        for ring in (engine.cache.k, engine.cache.v):
            ring.fill_(float("nan"))
        if sink:
            engine.prefill(patchify(latents[:, :, :sink]), timestep=0, history_start=0)
        start = (40 - frames) * CONFIG.tokens_per_frame
        engine.prefill(patchify(latents[:, :, 40 - frames :]), timestep=0, history_start=start)
        rings.append((engine.cache.k.float(), engine.cache.v.float()))
    for ours, theirs in zip(*rings, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_graphs_and_eager_steps_stream_the_same_video():
    options = {"prompt": embedding(1), "seed": 3}
    eager, captured = (collect(gpu_generator(cuda_graph=on), 6, **options) for on in (False, True))
    assert np.array_equal(eager, captured)
    assert np.array_equal(captured, collect(gpu_generator(), 6, **options))


def test_prompts_windows_and_files_in_mid_stream(tmp_path):
    generator = gpu_generator()
    collect(generator, 6, prompt=embedding(1))
    generator.set_prompt(embedding(2))
    collect(generator, 1)
    generator.set_prompt(embedding(3), sinks="refresh")
    generator.reconfigure(window_frames=12)
    generator.reconfigure(window_frames=9)
    collect(generator, 1)
    generator.save(tmp_path / "stream")
    again = gpu_generator()
    again.load(tmp_path / "stream")
    assert_same(state_of(again), state_of(generator))
    assert np.array_equal(collect(again, 3), collect(generator, 3))
