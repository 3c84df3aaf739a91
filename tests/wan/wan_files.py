"""Small Wan checkpoints, in each of the forms in which they are published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from swba_infer.models.wan_config import WanConfig
from swba_infer.wan.synthetic import random_wan

# Heads of 128 channels, so that the shapes alone tell the architecture.
SIZES = WanConfig(
    num_layers=2, num_attention_heads=1, ffn_dim=48, channels=4, text_dim=24, freq_dim=16, latent_height=4,
    latent_width=6,
)  # fmt: skip

OFFICIAL_CONFIG = {
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 128, "eps": 1e-06, "ffn_dim": 48, "freq_dim": 16,
    "in_dim": 4, "model_type": "t2v", "num_heads": 1, "num_layers": 2, "out_dim": 4, "text_dim": 24, "text_len": 512,
}  # fmt: skip
DIFFUSERS_CONFIG = {
    "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.35.0", "added_kv_proj_dim": None,
    "attention_head_dim": 128, "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": 48, "freq_dim": 16, "image_dim": None,
    "in_channels": 4, "num_attention_heads": 1, "num_layers": 2, "out_channels": 4, "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": 24,
}  # fmt: skip

# diffusers' name and Wan's own, for one block and what is around the blocks, spelled out.
NAMES = {
    "patch_embedding.weight": "patch_embedding.weight",
    "patch_embedding.bias": "patch_embedding.bias",
    "condition_embedder.time_embedder.linear_1.weight": "time_embedding.0.weight",
    "condition_embedder.time_embedder.linear_1.bias": "time_embedding.0.bias",
    "condition_embedder.time_embedder.linear_2.weight": "time_embedding.2.weight",
    "condition_embedder.time_embedder.linear_2.bias": "time_embedding.2.bias",
    "condition_embedder.time_proj.weight": "time_projection.1.weight",
    "condition_embedder.time_proj.bias": "time_projection.1.bias",
    "condition_embedder.text_embedder.linear_1.weight": "text_embedding.0.weight",
    "condition_embedder.text_embedder.linear_1.bias": "text_embedding.0.bias",
    "condition_embedder.text_embedder.linear_2.weight": "text_embedding.2.weight",
    "condition_embedder.text_embedder.linear_2.bias": "text_embedding.2.bias",
    "scale_shift_table": "head.modulation",
    "proj_out.weight": "head.head.weight",
    "proj_out.bias": "head.head.bias",
}
BLOCK_NAMES = {
    "scale_shift_table": "modulation",
    "attn1.norm_q.weight": "self_attn.norm_q.weight",
    "attn1.norm_k.weight": "self_attn.norm_k.weight",
    "attn1.to_q.weight": "self_attn.q.weight",
    "attn1.to_q.bias": "self_attn.q.bias",
    "attn1.to_k.weight": "self_attn.k.weight",
    "attn1.to_k.bias": "self_attn.k.bias",
    "attn1.to_v.weight": "self_attn.v.weight",
    "attn1.to_v.bias": "self_attn.v.bias",
    "attn1.to_out.0.weight": "self_attn.o.weight",
    "attn1.to_out.0.bias": "self_attn.o.bias",
    "norm2.weight": "norm3.weight",
    "norm2.bias": "norm3.bias",
    "attn2.norm_q.weight": "cross_attn.norm_q.weight",
    "attn2.norm_k.weight": "cross_attn.norm_k.weight",
    "attn2.to_q.weight": "cross_attn.q.weight",
    "attn2.to_q.bias": "cross_attn.q.bias",
    "attn2.to_k.weight": "cross_attn.k.weight",
    "attn2.to_k.bias": "cross_attn.k.bias",
    "attn2.to_v.weight": "cross_attn.v.weight",
    "attn2.to_v.bias": "cross_attn.v.bias",
    "attn2.to_out.0.weight": "cross_attn.o.weight",
    "attn2.to_out.0.bias": "cross_attn.o.bias",
    "ffn.net.0.proj.weight": "ffn.0.weight",
    "ffn.net.0.proj.bias": "ffn.0.bias",
    "ffn.net.2.weight": "ffn.2.weight",
    "ffn.net.2.bias": "ffn.2.bias",
}


def weights(seed: int = 0, config: WanConfig = SIZES) -> dict[str, Tensor]:
    """Return float32 tensors under diffusers' names."""
    return dict(random_wan(config, device="cpu", dtype=torch.float32, seed=seed).state_dict())


def official(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors under Wan's own names."""
    renamed = {}
    for name, tensor in tensors.items():
        _, _, rest = name.partition("blocks.")
        layer, _, inner = rest.partition(".")
        renamed[prefix + (f"blocks.{layer}.{BLOCK_NAMES[inner]}" if rest else NAMES[name])] = tensor
    return renamed


def write_folder(folder: Path, config: Mapping | None, tensors: Mapping[str, Tensor], shards: int = 1) -> Path:
    """Write a folder as the hubs have it."""
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    for i in range(shards):
        part = f"-{i + 1:05d}-of-{shards:05d}" if shards > 1 else ""
        shard = {name: tensors[name].contiguous() for name in names[i::shards]}
        save_file(shard, folder / f"diffusion_pytorch_model{part}.safetensors")
    return folder
