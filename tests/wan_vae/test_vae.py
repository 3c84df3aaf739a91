"""Chunk by chunk, the autoencoder gives what diffusers gives for the whole clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor

from swba_infer.errors import CheckpointError, ConfigError, StreamStateError
from swba_infer.wan.convolution import CausalPass, stack_weights
from swba_infer.wan.vae import FeatureCache, WanVAE, fold_patches, from_pixels, to_pixels, unfold_patches

diffusers = pytest.importorskip("diffusers")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def denormalise(autoencoder: Any, latents: Tensor) -> Tensor:
    config = autoencoder.config
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    return latents * std + mean


def whole_clip(autoencoder: Any, latents: Tensor) -> Tensor:
    return autoencoder.decode(denormalise(autoencoder, latents)).sample


def latents_of(frames: int, seed: int = 1, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunks", [(1,) * 7, (3, 3, 1), (1, 2, 4), (7,)], ids=str)
@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("stack", [False, True], ids=["conv3d", "stacked"])
def test_decoding_in_chunks_equals_the_whole_clip(
    autoencoder: Any, chunks: tuple[int, ...], at_once: int, stack: bool
) -> None:
    latents = latents_of(sum(chunks), batch=2)
    expected = whole_clip(autoencoder, latents)
    vae, cache, parts = WanVAE(autoencoder, frames_at_once=at_once, channels_last=stack, stack_frames=stack), None, []
    for chunk in latents.split(list(chunks), dim=2):
        frames, cache = vae.decode(chunk, cache)
        parts.append(frames)
    assert relative_error(torch.cat(parts, dim=2), expected) < 1e-5
    assert cache is not None
    assert cache.frames == sum(chunks)


def test_frame_by_frame_is_bitwise_what_diffusers_computes(autoencoder: Any) -> None:
    latents = latents_of(5)
    frames, _ = WanVAE(autoencoder).decode(latents)
    assert torch.equal(frames, whole_clip(autoencoder, latents))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("stack", [False, True], ids=["conv3d", "stacked"])
def test_the_memory_layout_does_not_change_what_is_decoded(autoencoder: Any, channels_last: bool, stack: bool) -> None:
    latents = latents_of(4)
    expected = whole_clip(autoencoder, latents)
    frames, cache = WanVAE(autoencoder, channels_last=channels_last, stack_frames=stack).decode(latents)
    assert relative_error(frames, expected) < 1e-5
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    assert all(x.is_contiguous(memory_format=layout) for x in cache.tensors)


@pytest.mark.parametrize("stack", [False, True], ids=["conv3d", "stacked"])
def test_the_cache_keeps_its_shapes_from_the_first_frame_on(autoencoder: Any, stack: bool) -> None:
    vae, cache = WanVAE(autoencoder, stack_frames=stack), None
    shapes = vae.decoder_shapes(4, 6)
    for latents in latents_of(4).split(1, dim=2):
        _, cache = vae.decode(latents, cache)
        assert [list(x.shape) for x in cache.tensors] == shapes


def test_a_cache_is_not_changed_by_going_on_from_it(autoencoder: Any) -> None:
    vae = WanVAE(autoencoder)
    _, cache = vae.decode(latents_of(2))
    kept = [x.clone() for x in cache.tensors]
    first, _ = vae.decode(latents_of(2, seed=2), cache)
    second, _ = vae.decode(latents_of(2, seed=2), cache)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(kept, cache.tensors, strict=True))


def test_streams_do_not_touch_the_caches_of_the_module(autoencoder: Any) -> None:
    autoencoder.clear_cache()
    vae = WanVAE(autoencoder)
    vae.decode(latents_of(3))
    vae.encode(torch.rand(1, 3, 5, 2 * vae.scale, 2 * vae.scale))
    assert set(autoencoder._feat_map + autoencoder._enc_feat_map) == {None}


@pytest.mark.parametrize(("channels_last", "stack"), [(False, False), (True, False), (True, True)])
def test_one_compiled_graph_serves_a_whole_stream(
    autoencoder: Any, channels_last: bool, stack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr(
        "swba_infer.wan.vae._compile",
        lambda function: torch.compile(function, dynamic=False, fullgraph=True, backend=counter),
    )
    torch._dynamo.reset()
    latents = latents_of(6)
    expected = whole_clip(autoencoder, latents)
    vae = WanVAE(autoencoder, compile=True, channels_last=channels_last, stack_frames=stack)
    cache, parts = None, []
    for chunk in latents.split(3, dim=2):
        frames, cache = vae.decode(chunk, cache)
        parts.append(frames)
    assert relative_error(torch.cat(parts, dim=2), expected) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("stack", [False, True], ids=["conv3d", "stacked"])
def test_compiled_decoding_equals_eager_decoding_frames_and_caches(small: Any, stack: bool) -> None:
    compiled, eager = (WanVAE(small, compile=c, channels_last=True, stack_frames=stack) for c in (True, False))
    compiled_cache = eager_cache = None
    for latents in latents_of(4).split(1, dim=2):
        expected, eager_cache = eager.decode(latents, eager_cache)
        frames, compiled_cache = compiled.decode(latents, compiled_cache)
        assert relative_error(frames, expected) < 1e-5
        for actual, feature in zip(compiled_cache.tensors, eager_cache.tensors, strict=True):
            assert relative_error(actual, feature) < 1e-5


def test_stacked_weights_are_copies_and_the_module_keeps_its_own(autoencoder: Any) -> None:
    before = {name: x.clone() for name, x in autoencoder.state_dict().items()}
    vae = WanVAE(autoencoder, channels_last=True, stack_frames=True)
    expected = whole_clip(autoencoder, latents_of(3))
    vae.decode(latents_of(3))
    after = autoencoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert torch.equal(whole_clip(autoencoder, latents_of(3)), expected)


def test_convolutions_of_few_channels_run_over_stacked_frames() -> None:
    def layer(channels: int, out: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> torch.nn.Conv3d:
        return torch.nn.Conv3d(channels, out, kernel, device="meta")

    few, others = [layer(96, 96), layer(16, 384)], [layer(192, 192), layer(96, 3), layer(96, 192, (3, 1, 1))]
    weights = stack_weights(torch.nn.ModuleList(few + others))
    assert set(weights) == set(few)
    assert weights[few[1]].shape == (384, 48, 3, 3)


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
def test_a_stacked_convolution_is_the_causal_convolution(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(5, 7, 3).double().requires_grad_(False)
    before, x = (
        torch.randn(2, 5, 2, 3, 4).double(),
        torch.randn(2, 5, 3, 3, 4).double().contiguous(memory_format=layout),
    )
    expected = torch.nn.functional.conv3d(torch.cat((before, x), dim=2), layer.weight, layer.bias, padding=(0, 1, 1))
    causal = CausalPass([before], stack_weights(layer))
    out = causal.convolve(layer, x)
    assert relative_error(out, expected) < 1e-14
    assert out.transpose(1, 2).flatten(0, 1).data_ptr() == out.data_ptr()
    assert torch.equal(causal.features[0], x[:, :, -2:])
    causal = CausalPass([before], stack_weights(layer))
    assert relative_error(causal.convolve(layer, x[:, :, :1]), expected[:, :, :1]) < 1e-14
    assert torch.equal(causal.features[0], torch.cat((before[:, :, 1:], x[:, :, :1]), dim=2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_decoding_on_a_gpu_is_as_good_as_eager_decoding(shallow: Any, dtype: torch.dtype) -> None:
    """Each case compiles a graph of its own, which takes time by the kernel, and more if kernels are tuned."""
    latents = latents_of(7)
    exact = whole_clip(shallow.double(), latents.double()).float()
    module = shallow.to("cuda", dtype)
    errors = []
    for compile_ in (False, True):
        vae, cache, parts = WanVAE(module, compile=compile_), None, []
        with inductor.patch({"triton.autotune_pointwise": False}):
            for chunk in latents.cuda().split([1, 3, 3], dim=2):
                frames, cache = vae.decode(chunk, cache)
                parts.append(frames.float().cpu())
        errors.append(relative_error(torch.cat(parts, dim=2), exact))
    assert errors[1] <= 2 * errors[0] + 1e-5
    assert errors[0] < (1e-2 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("chunks", [(1, 4, 4, 4), (5, 8), (13,)], ids=str)
def test_encoding_in_chunks_equals_the_whole_clip(autoencoder: Any, chunks: tuple[int, ...]) -> None:
    vae = WanVAE(autoencoder)
    side = 2 * vae.scale
    clip = torch.rand(2, 3, sum(chunks), side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1
    expected = autoencoder.encode(clip).latent_dist.mode()
    cache, parts = None, []
    for chunk in clip.split(list(chunks), dim=2):
        latents, cache = vae.encode(chunk, cache)
        parts.append(latents)
    latents = torch.cat(parts, dim=2)
    assert relative_error(denormalise(autoencoder, latents), expected) < 1e-5
    assert cache is not None
    assert cache.frames == latents.shape[2] == 1 + (sum(chunks) - 1) // 4


def test_half_precision_decodes_to_finite_frames_in_range(autoencoder: Any) -> None:
    latents = latents_of(3)
    expected = whole_clip(autoencoder, latents)
    frames, cache = WanVAE(autoencoder.to(torch.bfloat16)).decode(latents)
    assert frames.dtype == torch.bfloat16
    assert {x.dtype for x in cache.tensors} == {torch.bfloat16}
    assert relative_error(frames.float(), expected) < 0.1


@pytest.mark.parametrize("patch", [1, 2])
def test_patches_fold_as_in_diffusers(patch: int) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    frames = torch.randn(2, 3, 5, 4, 6)
    assert torch.equal(fold_patches(frames, patch), patchify(frames, patch))
    assert torch.equal(unfold_patches(fold_patches(frames, patch), patch), frames)


def test_pixels_survive_the_way_there_and_back() -> None:
    pixels = torch.randint(0, 256, (1, 3, 4, 5, 3), dtype=torch.uint8)
    assert torch.equal(to_pixels(from_pixels(pixels)), pixels)
    assert to_pixels(torch.full((1, 3, 1, 1, 1), 1.5)).flatten().tolist() == [255] * 3


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(1, 5, 1, 4, 6), r"latents: expected floating \['B', 4"),
        (torch.zeros(1, 4, 4, 6), "latents: expected floating"),
        (torch.zeros(1, 4, 0, 4, 6), "latents: expected floating"),
        (torch.zeros(1, 4, 1, 4, 6, dtype=torch.int64), "got torch.int64"),
        ("no tensor", "latents: expected a tensor"),
    ],
)
def test_latents_that_do_not_fit_are_refused(autoencoder: Any, latents: Any, message: str) -> None:
    with pytest.raises(StreamStateError, match=message):
        WanVAE(autoencoder).decode(latents)


def test_a_stream_keeps_its_size(autoencoder: Any) -> None:
    vae = WanVAE(autoencoder)
    _, cache = vae.decode(latents_of(1))
    with pytest.raises(StreamStateError, match=r"\[1, 4, 'F', 4, 6\], got .*\[1, 4, 1, 4, 8\]"):
        vae.decode(torch.zeros(1, 4, 1, 4, 8), cache)


@pytest.mark.parametrize(
    ("goes_on", "frames", "rows", "message"),
    [
        (False, 4, 16, "expected 1 more than a multiple of 4 frames, got 4"),
        (True, 3, 16, "expected a multiple of 4 frames, got 3"),
        (False, 5, 20, "expected sides that (8|16) divides, got 20 x 16"),
        (True, 4, 32, r"expected floating \[1, 3, 'T', 16, 16\], got torch.float32 \[1, 3, 4, 32, 16\]"),
    ],
)
def test_frames_that_do_not_fit_are_refused(
    autoencoder: Any, goes_on: bool, frames: int, rows: int, message: str
) -> None:
    vae, cache = WanVAE(autoencoder), None
    if goes_on:
        _, cache = vae.encode(torch.zeros(1, 3, 1, 16, 16))
    with pytest.raises(StreamStateError, match=message):
        vae.encode(torch.zeros(1, 3, frames, rows, 16), cache)


def save(autoencoder: Any, folder: Path) -> Path:
    autoencoder.save_pretrained(folder)
    return folder


def test_a_folder_of_diffusers_loads_and_decodes_the_same(autoencoder: Any, tmp_path: Path) -> None:
    save(autoencoder, tmp_path / "vae")
    latents = latents_of(3)
    for directory in (tmp_path, tmp_path / "vae"):
        vae = WanVAE.from_pretrained(directory, device="cpu")
        assert vae.dtype == torch.float32
        assert torch.equal(vae.decode(latents)[0], whole_clip(autoencoder, latents))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, ConfigError, "expected _class_name 'AutoencoderKLWan', got 'AutoencoderKL'"),
        ({"bass_dim": 3}, ConfigError, r"unknown keys \['bass_dim'\]"),
        ({"base_dim": "wide"}, ConfigError, "expected sizes of an autoencoder"),
        ({"z_dim": 8}, CheckpointError, r"conv_in.weight: expected floating \[32, 8, .*, got torch.float32 \[32, 4, "),
        ({"latents_std": [1.0, 1.0]}, ConfigError, "latents_std: expected 4 finite numbers"),
        ({"latents_std": [1.0, 1.0, 0.0, 1.0]}, ConfigError, "latents_std: expected positive numbers"),
        ({"num_res_blocks": 2}, CheckpointError, "missing tensors"),
        ({"temperal_downsample": [False, False, True]}, CheckpointError, r"extra tensors \['decoder"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_the_weights_is_refused(
    small: Any, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = save(small, tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=message):
        WanVAE.from_pretrained(tmp_path, device="cpu")


def test_damaged_and_missing_files_are_named(autoencoder: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a diffusers folder"):
        WanVAE.from_pretrained(tmp_path, device="cpu")
    (weights,) = save(autoencoder, tmp_path).glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=weights.name):
        WanVAE.from_pretrained(tmp_path, device="cpu")
    weights.unlink()
    with pytest.raises(CheckpointError, match="expected safetensors files, got none"):
        WanVAE.from_pretrained(tmp_path, device="cpu")
    weights.write_bytes(whole)
    (tmp_path / "again.safetensors").write_bytes(whole)
    with pytest.raises(CheckpointError, match="are in another file"):
        WanVAE.from_pretrained(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="expected a readable JSON file"):
        WanVAE.from_pretrained(tmp_path, device="cpu")


def test_other_modules_and_options_are_refused(autoencoder: Any) -> None:
    with pytest.raises(ConfigError, match="expected a AutoencoderKLWan, got Linear"):
        WanVAE(torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="frames_at_once"):
        WanVAE(autoencoder, frames_at_once=0)
    assert FeatureCache().bytes == 0
