"""A Wan transformer with random weights, made on the device in its final dtype: for benchmarks and tests."""

from __future__ import annotations

import torch

from ..device import pick_device
from ..models.wan import WanTransformer, parameter_dtype
from ..models.wan_config import WanConfig


def random_wan(
    config: WanConfig,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> WanTransformer:
    """Return a model in eval mode whose activations have the size that a trained model's have, and no meaning.

    The same seed on the same kind of device gives the same weights.
    """
    device = pick_device(device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = WanTransformer(config)
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        weight = torch.empty(parameter.shape, device=device, dtype=parameter_dtype(name, dtype))
        if "norm" in name and name.endswith("weight"):
            weight.fill_(1)
        elif parameter.ndim == 1:
            weight.zero_()
        else:
            fan_in = config.dim if name.endswith("scale_shift_table") else parameter[0].numel()
            weight.normal_(std=fan_in**-0.5, generator=generator)
        weights[name] = weight
    model.load_state_dict(weights, strict=True, assign=True)
    return model.requires_grad_(False).eval()
