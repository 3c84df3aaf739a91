from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

INTERPRETER = Path(__file__).parent / "kernels" / "interpreter"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the interpreter folder, and skip what this process cannot run."""
    import torch

    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if INTERPRETER in item.path.parents:
            item.add_marker(pytest.mark.interpreter)
        if item.get_closest_marker("interpreter") and not interpreting:
            item.add_marker(pytest.mark.skip(reason="runs under TRITON_INTERPRET=1 only"))
        if item.get_closest_marker("aot") and interpreting:
            item.add_marker(pytest.mark.skip(reason="ahead-of-time compiles need TRITON_INTERPRET unset"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a small world with random weights: 32 x 24 pixels, 12 tokens a frame."""
    from tiny_world import save_tiny_world

    return save_tiny_world(tmp_path_factory.mktemp("worlds") / "tiny")


@pytest.fixture
def full_float32() -> Iterator[None]:
    """Keep convolutions and matrix products from rounding to TF32; by hand, since monkeypatch cannot restore these."""
    import torch

    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value
