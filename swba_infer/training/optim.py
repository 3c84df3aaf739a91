"""Muon for the hidden matrices, all matrices of one shape in one batched iteration, and AdamW for the rest.

Muon: Jordan et al. 2024, with the update scaled to AdamW's as in Liu et al. 2025 ("Muon is scalable for LLM training").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..models.video_dit import VideoDiT


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of matrices [..., m, n] towards 1 by a quintic Newton-Schulz iteration.

    It runs in bfloat16 on a GPU and in float32 elsewhere.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; matrices [m, n] only.

    The matrices of a group with `parts` > 1 are that many stacked by rows (q, k, v; gate, up), each
    orthogonalised alone.
    """

    def __init__(self, matrices: Iterable[Any], lr: float = 2.5e-3, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            parts, shapes = group["parts"], {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault((parts, matrix.shape[0] // parts, matrix.shape[1]), []).append(matrix)
            for shape, matrices in shapes.items():
                for matrix in matrices:
                    if "momentum" not in self.state[matrix]:
                        self.state[matrix]["momentum"] = torch.zeros_like(matrix)
                gradients = [matrix.grad for matrix in matrices]
                momenta = [self.state[matrix]["momentum"] for matrix in matrices]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
                update = orthogonalise(torch.stack(list(ahead)).view(len(matrices), *shape))
                update = update.flatten(1, 2).to(matrices[0].dtype).unbind(0)
                scale = 0.2 * max(shape[1:]) ** 0.5
                torch._foreach_add_(matrices, list(update), alpha=-group["lr"] * scale)


def build_optimizers(model: VideoDiT, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of `model.blocks` and AdamW for every other parameter.

    Each group keeps its peak rate in `peak`, for schedules to scale.
    """
    blocks: list[Any] = list(model.blocks)
    groups = [
        {"params": [block.qkv.weight for block in blocks], "parts": 3 if blocks[0].heads == blocks[0].kv_heads else 1},
        {"params": [block.gate_up.weight for block in blocks], "parts": 2},
        {"params": [weight for block in blocks for weight in (block.out.weight, block.down.weight)]},
    ]
    chosen = {id(p) for group in groups for p in group["params"]}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    fused = rest[0].is_cuda
    optimizers: list[torch.optim.Optimizer] = [
        Muon(groups, lr=muon_lr),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


class Average:
    """Exponential moving average of a model's parameters in float32.

    A young average forgets faster, unless it is `seeded`: begun from weights that are worth keeping.
    """

    def __init__(self, model: nn.Module, decay: float, *, seeded: bool = False) -> None:
        self.decay, self.seeded = decay, seeded
        self.tensors = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model's parameters after optimiser step `step` (from 0)."""
        decay = self.decay if self.seeded else min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.tensors.values()), [p.detach().float() for p in model.parameters()], 1 - decay)
