"""Wan checkpoints load whole or not at all, under whichever names they were published."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from wan_files import DIFFUSERS_CONFIG, OFFICIAL_CONFIG, SIZES, official, weights, write_folder

from swba_infer.errors import CheckpointError, ConfigError
from swba_infer.models.wan import WanTransformer
from swba_infer.models.wan_config import wan_1_3b, wan_14b, wan_ti2v_5b
from swba_infer.wan import load_wan
from swba_infer.wan.synthetic import random_wan

SHARD = "diffusion_pytorch_model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return weights()


def check(model, tensors) -> None:
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    for name in tensors:
        assert torch.equal(state[name], tensors[name]), name
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_diffusers_folders_load_with_and_without_shards(tmp_path, tensors):
    for shards in (1, 3):
        folder = write_folder(tmp_path / str(shards), DIFFUSERS_CONFIG, tensors, shards)
        check(load_wan(folder, device="cpu"), tensors)


def test_a_pipeline_folder_gives_its_transformer(tmp_path, tensors):
    write_folder(tmp_path / "transformer", DIFFUSERS_CONFIG, tensors)
    (tmp_path / "model_index.json").write_text("{}")
    check(load_wan(tmp_path, device="cpu"), tensors)


def test_official_names_load_from_shards_with_their_config(tmp_path, tensors):
    folder = write_folder(tmp_path / "wan", OFFICIAL_CONFIG, official(tensors), 3)
    check(load_wan(folder, device="cpu"), tensors)
    check(load_wan(folder / SHARD, device="cpu"), tensors)


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model.", "generator.model._fsdp_wrapped_module."])
def test_a_single_file_needs_no_config_and_may_have_wrapper_prefixes(tmp_path, tensors, prefix):
    save_file(official(tensors, prefix), tmp_path / "krea.safetensors")
    model = load_wan(tmp_path / "krea.safetensors", device="cpu", latent_size=(4, 6))
    check(model, tensors)
    assert model.config == SIZES
    (tmp_path / "config.json").write_text('{"_class_name": "Other"}')
    check(load_wan(tmp_path / "krea.safetensors", device="cpu"), tensors)


def test_half_precision_leaves_norms_modulation_and_time_in_float32(tmp_path, tensors):
    folder = write_folder(tmp_path / "wan", DIFFUSERS_CONFIG, tensors)
    model = load_wan(folder, device="cpu", dtype=torch.bfloat16)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {name for name in tensors if "norm" in name or "table" in name or "time" in name}
    assert all(torch.equal(p, tensors[name].to(p.dtype)) for name, p in model.named_parameters())


def test_the_stored_dtype_is_kept_when_none_is_asked_for(tmp_path, tensors):
    narrow = {name: x if "norm" in name else x.bfloat16() for name, x in tensors.items()}
    folder = write_folder(tmp_path / "wan", DIFFUSERS_CONFIG, narrow)
    model = load_wan(folder, device="cpu")
    assert model.proj_out.weight.dtype == torch.bfloat16
    assert model.blocks[0].attn1.norm_q.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: t.pop("blocks.1.cross_attn.norm_k.weight"),
            r"missing tensors \['blocks.1.cross_attn.norm_k.weight'",
        ),
        (lambda t: t.update({"blocks.0.cross_attn.k_img.weight": torch.zeros(1)}), r"extra tensors .*k_img"),
        (lambda t: t.update({"blocks.1.ffn.2.bias": torch.zeros(127)}), r"ffn.2.bias': expected \[128\], got \[127\]"),
        (lambda t: t.update({"head.modulation": torch.zeros(2, 128)}), r"head.modulation': expected \[1, 2, 128\]"),
        (lambda t: t.update({"model.head.head.bias": torch.zeros(16)}), "are both 'head.head.bias'"),
        (lambda t: t.update({"head.head.bias": torch.zeros(16, dtype=torch.int32)}), "head.head.bias.*I32"),
        (lambda t: [t.pop(name) for name in list(t) if "blocks.1" in name], r"expected|missing tensors \['blocks.1"),
    ],
)
@pytest.mark.parametrize("config", [OFFICIAL_CONFIG, None], ids=["config", "shapes"])
def test_names_and_shapes_that_do_not_fit_are_named(tmp_path, tensors, damage, message, config):
    stored = official(tensors)
    damage(stored)
    folder = write_folder(tmp_path / "wan", config, stored)
    if config is None and not any("blocks.1" in name for name in stored):
        assert load_wan(folder, device="cpu").layers == 1
        return
    with pytest.raises(CheckpointError, match=message):
        load_wan(folder, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "HunyuanVideoTransformer3DModel"}, "expected a WanTransformer3DModel .*Hunyuan"),
        ({"image_dim": 1280}, "image_dim: expected None"),
        ({"in_channels": 8, "out_channels": 4}, "out_channels: expected 8"),
        ({"patch_size": [2, 2, 2]}, "patch_size"),
        ({"vace_layers": [0]}, "vace_layers"),
        ({"num_layers": "2"}, "num_layers: expected an int"),
        ({"qk_norm": None}, "qk_norm"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, tensors, change, message):
    folder = write_folder(tmp_path / "wan", {**DIFFUSERS_CONFIG, **change}, tensors)
    with pytest.raises(ConfigError, match=message):
        load_wan(folder, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, r"missing tensors \['blocks.2"),
        ({"num_layers": 10**9}, "expected 1000000000 layers"),
        ({"num_layers": 1}, r"extra tensors \['blocks.1"),
        ({"ffn_dim": 64}, r"ffn.net.0.proj.weight': expected \[64, 128\], got \[48, 128\]"),
        ({"num_attention_heads": 2}, "expected .*256"),
        ({"cross_attn_norm": False}, r"extra tensors \['blocks.0.norm2.bias'"),
        ({"text_dim": 4096}, r"text_embedder.linear_1.weight': expected \[128, 4096\]"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(tmp_path, tensors, change, message):
    folder = write_folder(tmp_path / "wan", {**DIFFUSERS_CONFIG, **change}, tensors)
    with pytest.raises(CheckpointError, match=message):
        load_wan(folder, device="cpu")


def test_a_missing_a_truncated_and_a_doubled_shard_are_named(tmp_path, tensors):
    folder = write_folder(tmp_path / "wan", OFFICIAL_CONFIG, official(tensors), 3)
    path = folder / SHARD
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=f"{SHARD}.*truncated"):
        load_wan(folder, device="cpu")
    path.unlink()
    with pytest.raises(CheckpointError, match=f"missing shards .*{SHARD}"):
        load_wan(folder, device="cpu")
    path.write_bytes((folder / SHARD.replace("00002-of", "00001-of")).read_bytes())
    with pytest.raises(CheckpointError, match=f"{SHARD}.*is already in"):
        load_wan(folder, device="cpu")
    path.write_bytes(whole)
    (folder / "other.safetensors").write_bytes(whole)
    with pytest.raises(CheckpointError, match="expected one checkpoint"):
        load_wan(folder, device="cpu")


def test_an_index_that_speaks_of_other_files_is_refused(tmp_path, tensors):
    folder = write_folder(tmp_path / "wan", DIFFUSERS_CONFIG, tensors, 3)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(files)}}))
    check(load_wan(folder, device="cpu"), tensors)
    for content in (json.dumps({"weight_map": {"a": files[0]}}), "{}", "[", '{"weight_map": [1]}'):
        index.write_text(content)
        with pytest.raises(CheckpointError, match="index"):
            load_wan(folder, device="cpu")


def test_not_a_number_is_found_on_request(tmp_path, tensors):
    bad = {**tensors, "blocks.1.attn1.to_v.bias": torch.full((128,), float("nan"))}
    folder = write_folder(tmp_path / "wan", DIFFUSERS_CONFIG, bad)
    load_wan(folder, device="cpu")
    with pytest.raises(CheckpointError, match=r"blocks.1.attn1.to_v.bias.*NaN"):
        load_wan(folder, device="cpu", check_finite=True)


def test_paths_that_hold_no_checkpoint_say_what_would(tmp_path, tensors):
    with pytest.raises(ConfigError, match="nowhere"):
        load_wan(tmp_path / "nowhere", device="cpu")
    torch.save({"generator": official(tensors)}, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="swba-infer convert"):
        load_wan(tmp_path / "model.pt", device="cpu")
    with pytest.raises(CheckpointError, match=r"swba-infer convert.*model.pt"):
        load_wan(tmp_path, device="cpu")
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"expected a Wan transformer with 'patch_embedding\.weight'"):
        load_wan(tmp_path / "a.safetensors", device="cpu")


def test_latents_that_the_patch_does_not_divide_are_refused(tmp_path, tensors):
    folder = write_folder(tmp_path / "wan", DIFFUSERS_CONFIG, tensors)
    assert load_wan(folder, device="cpu", latent_size=(8, 10)).config.tokens_per_frame == 20
    with pytest.raises(ConfigError, match="latent_width: expected a multiple of the patch size 2, got 7"):
        load_wan(folder, device="cpu", latent_size=(4, 7))
    with pytest.raises(ConfigError, match="height: expected a positive multiple of 16 pixels, got 488"):
        SIZES.at(488, 832, scale=8)
    assert (SIZES.at(480, 832, scale=8).rows, SIZES.at(480, 832, scale=8).columns) == (30, 52)


def test_presets_have_the_published_sizes():
    for config, parameters, tokens in (
        (wan_1_3b(), 1.42e9, 1560),
        (wan_14b(), 14.3e9, 1560),
        (wan_ti2v_5b(), 5e9, 880),
    ):
        with torch.device("meta"):
            count = sum(p.numel() for p in WanTransformer(config).parameters())
        assert count == pytest.approx(parameters, rel=0.01)
        assert config.tokens_per_frame == tokens
        assert config.rope_dims == (44, 42, 42)


MEASURE = """
import sys, torch
from swba_infer.wan import load_wan
def anonymous():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("RssAnon")) * 1024
load_wan(sys.argv[2], device="cpu")
before = anonymous()
model = load_wan(sys.argv[1], device="cpu", dtype=getattr(torch, sys.argv[3]))
touched = sum(float(p.sum()) for p in model.parameters())
print(anonymous() - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of unshared memory")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_no_second_copy(tmp_path, tensors, dtype):
    """Same dtype: the file is mapped and none of it copied. Another dtype: one copy, of the new size."""
    sizes = replace(SIZES, ffn_dim=65536)
    big = write_folder(tmp_path / "big", {**DIFFUSERS_CONFIG, "ffn_dim": 65536}, weights(config=sizes), 2)
    small = write_folder(tmp_path / "small", DIFFUSERS_CONFIG, tensors)
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(big), str(small), dtype], capture_output=True, text=True, check=False,
        cwd=root, env={"PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown, total = map(int, done.stdout.split())
    assert total > (130e6 if dtype == "float32" else 65e6)
    allowed = 0 if dtype == "float32" else total
    largest = 65536 * 128 * 4
    assert grown < allowed + largest + 8e6, (grown, total)


def test_random_weights_are_the_same_for_a_seed_and_give_finite_numbers():
    a, b, c = (random_wan(SIZES, device="cpu", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["proj_out.weight"], c["proj_out.weight"])
    assert a["proj_out.weight"].dtype == torch.bfloat16
