"""The Wan transformer on a GPU: captured steps, compiled layers, half precision, and loading straight to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from wan_files import DIFFUSERS_CONFIG, weights, write_folder

from swba_infer import StreamConfig, StreamingEngine
from swba_infer.models.wan import WanTransformer, compile_layers
from swba_infer.models.wan_config import WanConfig
from swba_infer.wan import load_wan
from swba_infer.wan.synthetic import random_wan

pytestmark = pytest.mark.gpu

SIZES = WanConfig(num_layers=3, num_attention_heads=4, ffn_dim=1024, text_dim=64, latent_height=20, latent_width=26)
STREAM = StreamConfig(tokens_per_frame=SIZES.tokens_per_frame, frames_per_block=3, window_frames=6, sink_frames=1)


def run(model: WanTransformer, blocks: int = 5, **options) -> Tensor:
    """Stream some blocks, a noisy step and a commit each, and return all outputs on the CPU."""
    engine = StreamingEngine(model, STREAM, lanes=2, **options)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 20, SIZES.text_dim, generator=generator).to(engine.device)
    for name, value in model.encode_prompt(text).items():
        engine.set_state(name, value)
    outs = []
    for _ in range(blocks):
        x = torch.randn(2, STREAM.block_tokens, SIZES.token_channels, generator=generator).to(engine.device)
        outs.append(engine.step(x, commit=False, timestep=937.5))
        outs.append(engine.step(x, commit=True, timestep=0.0))
    return torch.cat(outs, 1).float().cpu()


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def exact() -> Tensor:
    return run(random_wan(SIZES, device="cpu", dtype=torch.float32))


def on_gpu(dtype: torch.dtype) -> WanTransformer:
    """Return the model of `exact`: the same weights, rounded."""
    return random_wan(SIZES, device="cpu", dtype=torch.float32).place("cuda", dtype)


@pytest.mark.usefixtures("full_float32")
def test_float32_equals_the_cpu(exact):
    assert error(run(on_gpu(torch.float32), impl="sdpa"), exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_by_its_rounding(exact, dtype):
    assert error(run(on_gpu(dtype)), exact) < 2 * torch.finfo(dtype).eps


def test_captured_steps_equal_eager_ones_bit_for_bit():
    model = on_gpu(torch.bfloat16)
    assert torch.equal(run(model, cuda_graph=True), run(model, cuda_graph=False))


def test_compiled_layers_err_no_more_than_eager_ones(exact):
    eager = error(run(on_gpu(torch.bfloat16)), exact)
    model = on_gpu(torch.bfloat16)
    compile_layers(model)
    assert error(run(model), exact) < 1.2 * eager


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_to_the_gpu_tensor_by_tensor(tmp_path, dtype):
    wide = {**DIFFUSERS_CONFIG, "ffn_dim": 65536, "num_layers": 4}
    sizes = WanConfig(
        num_layers=4, num_attention_heads=1, ffn_dim=65536, channels=4, text_dim=24, freq_dim=16,
        latent_height=4, latent_width=6,
    )  # fmt: skip
    tensors = weights(config=sizes)
    folder = write_folder(tmp_path / "wan", wide, tensors, 2)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_wan(folder, device="cuda", dtype=dtype)
    total = sum(p.nbytes for p in model.parameters())
    largest = max(x.nbytes for x in tensors.values())
    assert torch.cuda.max_memory_allocated() - before < total + largest + (8 << 20)
    assert all(torch.equal(p.cpu(), tensors[name].to(p.dtype)) for name, p in model.named_parameters())
