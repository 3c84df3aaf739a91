from __future__ import annotations

from typing import Any

import pytest
import torch

SMALL = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.8, 2.0, 1.0]}
RESIDUAL = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}


def small_autoencoder(residual: bool = False, **fields: Any) -> Any:
    """Return an `AutoencoderKLWan` of Wan 2.1's or (residual) Wan 2.2's shape with random weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {**SMALL, **STATISTICS, **(RESIDUAL if residual else {}), **fields}
    return diffusers.AutoencoderKLWan(**sizes).eval().requires_grad_(False)


@pytest.fixture(params=[False, True], ids=["wan2.1", "wan2.2"])
def autoencoder(request: pytest.FixtureRequest) -> Any:
    return small_autoencoder(request.param)


@pytest.fixture(params=[False, True], ids=["wan2.1", "wan2.2"])
def shallow(request: pytest.FixtureRequest) -> Any:
    """Return layers of every kind, but one residual layer a block: quick to compile."""
    return small_autoencoder(request.param, num_res_blocks=0)


@pytest.fixture
def small() -> Any:
    return small_autoencoder()


@pytest.fixture(autouse=True)
def _single_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
