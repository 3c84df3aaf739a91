"""The state of a training run in one safetensors file, from which it goes on exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..files import replacing
from .optim import Average


def save_state(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: Average,
    generator: torch.Generator,
    numbers: dict[str, Any],
) -> None:
    """Write weights, averaged weights, optimiser state, the generator and `numbers` (plain JSON), atomically."""
    from safetensors.torch import save_file

    tensors = {f"model.{name}": p for name, p in model.state_dict().items()}
    tensors |= {f"average.{name}": p for name, p in average.tensors.items()}
    for i, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{index}.{key}": value for key, value in values.items()}
    tensors["generator"] = generator.get_state()
    plain = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata={"run": json.dumps(numbers)})


def load_state(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    average: Average,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Read what `save_state` wrote and return its `numbers`; raise CheckpointError if it is of another run."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            numbers = json.loads(file.metadata()["run"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: expected the state of a training run, got {error!r}") from error

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    if {name: value.shape for name, value in part("model.").items()} != {
        name: value.shape for name, value in model.state_dict().items()
    }:
        raise CheckpointError(f"{path}: expected the tensors of this model, got those of another")
    model.load_state_dict(part("model."))
    for name, value in part("average.").items():
        average.tensors[name].copy_(value)
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in part(f"optimizer.{i}.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    generator.set_state(tensors["generator"])
    return numbers
