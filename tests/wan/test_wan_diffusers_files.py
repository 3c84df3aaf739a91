"""Our folders are diffusers' folders, and the other way round; its table of names agrees with ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers_wan import SIZES, random_reference
from wan_files import official

from swba_infer.wan import load_wan
from swba_infer.wan.convert import convert

diffusers = pytest.importorskip("diffusers", reason="needs the extra [wan]")


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_what_diffusers_saves_loads_here(tmp_path):
    reference = random_reference()
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder in ("whole", "shards"):
        model = load_wan(tmp_path / folder, device="cpu", latent_size=(SIZES.latent_height, SIZES.latent_width))
        assert same(model.state_dict(), reference.state_dict())
        assert model.config.num_attention_heads == SIZES.num_attention_heads


@pytest.mark.parametrize("limit", [50_000, 10**9], ids=["shards", "whole"])
def test_what_we_convert_loads_in_diffusers(tmp_path, limit):
    reference = random_reference(seed=5)
    reference.save_pretrained(tmp_path / "given")
    convert(tmp_path / "given", tmp_path / "made", max_shard_bytes=limit)
    again = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "made", local_files_only=True)
    assert same(again.state_dict(), reference.state_dict())


def test_names_are_those_of_diffusers_own_converter():
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    tensors = random_reference(seed=6).state_dict()
    assert same(convert_wan_transformer_to_diffusers(official(tensors)), tensors)


def test_diffusers_and_transformers_import_beside_our_kernels_folder():
    """Both import a package called `kernels` if they find one; ours must not look like it."""
    pytest.importorskip("transformers", reason="needs the extra [wan]")
    root = Path(__file__).parent.parent.parent
    code = "from diffusers import AutoencoderKLWan, WanTransformer3DModel; from transformers import UMT5EncoderModel"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
