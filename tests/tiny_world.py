"""A world model with random weights, small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from swba_infer.checkpoint import save_model
from swba_infer.config import StreamConfig
from swba_infer.models.video_dit import VideoDiT, VideoDiTConfig
from swba_infer.sampling import FlowSampler

ACTIONS = ("wait", "forward", "left", "right", "forward_left", "forward_right")
SIZE = VideoDiTConfig(
    height=24, width=32, patch=8, dim=32, depth=2, heads=2, kv_heads=1, mlp=32, cell_dim=8, actions=len(ACTIONS)
)


def tiny_stream(**changes: Any) -> StreamConfig:
    sizes = {"tokens_per_frame": SIZE.tokens_per_frame, "frames_per_block": 1, "window_frames": 4, **changes}
    return StreamConfig(**sizes)


def tiny_dit(seed: int = 0) -> VideoDiT:
    """Return a model whose every weight matters; a fresh one would ignore its history."""
    generator = torch.Generator().manual_seed(seed)
    model = VideoDiT(SIZE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval().requires_grad_(False)


def tiny_config(**changes: Any) -> dict[str, Any]:
    return {
        "architecture": "video_dit",
        "model": SIZE.to_dict(),
        "stream": tiny_stream().to_dict(),
        "sampler": FlowSampler(steps=2).to_dict(),
        "actions": list(ACTIONS),
        "fps": 12.5,
        **changes,
    }


def save_tiny_world(directory: Path, **changes: Any) -> Path:
    save_model(directory, tiny_config(**changes), tiny_dit().state_dict(), max_shard_bytes=60_000)
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (5, SIZE.height, SIZE.width, 3), dtype=torch.uint8, generator=generator)
    save_file({"frames": frames, "actions": torch.tensor([1, 1, 2, 0, 1])}, directory / "context.safetensors")
    return directory
