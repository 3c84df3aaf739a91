"""The block-by-block loop on a GPU: graphs, half precision, and the kernels that a CPU does not run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from generator_cases import VAE, assert_same, collect, embedding, state_of
from wan_files import SIZES

from swba_infer import RingKVCache, StreamConfig
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


def rebuilt(impl: str, sink: int, frames: int, device: str = "cuda") -> torch.Tensor:
    """Return what a prefill of the last frames of 40 gives after the sinks, in a ring that was full of NaN."""
    tokens, dtype = 96, torch.bfloat16
    stream = StreamConfig(tokens_per_frame=tokens, frames_per_block=3, window_frames=9, sink_frames=sink)
    cache = RingKVCache(
        layers=1, lanes=1, kv_heads=2, head_dim=128, stream=stream, dtype=dtype, device=device, impl=impl
    )  # fmt: skip
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40 * tokens, 128, generator=generator).to(device, dtype) for _ in range(3))
    q = 2 * q  # so that a key that is seen or not makes a difference
    outs = []
    for start, end in ([(0, sink)] if sink else []) + [(40 - frames, 40)]:
        part = slice(start * tokens, end * tokens)
        outs.append(cache.prefill(0, q[:, :, part], k[:, :, part], v[:, :, part], history_start=start * tokens))
        cache.commit()
    assert cache.position == (40 * tokens,)
    assert torch.isfinite(cache.k).all()
    return torch.cat(outs, dim=2).float()


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize("frames", [9, 11])
def test_a_history_built_anew_is_that_of_torchs_attention(impl, sink, frames):
    """Frames that blocks of 3 do not divide begin with a shorter block, on sinks that lie far behind."""
    ours, theirs = rebuilt(impl, sink, frames), rebuilt("sdpa", sink, frames)
    assert (ours - theirs).norm() < 0.01 * theirs.norm()


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
