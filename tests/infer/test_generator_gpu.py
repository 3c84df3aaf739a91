"""The generator on a GPU: the captured loop against the eager one, reproducible and flat."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny_world import ACTIONS, tiny_dit, tiny_stream

from swba_infer import VideoGenerator
from swba_infer.sampling import FlowSampler

pytestmark = pytest.mark.gpu
WALK = [1, 1, 2, 3, 0, 1, 2, 2, 1] * 2


def generator(dtype=torch.bfloat16, **options) -> VideoGenerator:
    return VideoGenerator(tiny_dit().to("cuda", dtype), tiny_stream(), FlowSampler(steps=2), ACTIONS, **options)


def collect(iterator) -> np.ndarray:
    return np.stack(list(iterator))


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_the_same_seed_gives_the_same_frames(cuda_graph):
    a, b = (collect(generator(cuda_graph=cuda_graph).stream(actions=WALK, seed=3)) for _ in range(2))
    np.testing.assert_array_equal(a, b)


def test_captured_and_eager_steps_give_the_same_frames():
    context = np.random.default_rng(0).integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
    a, b = (collect(generator(cuda_graph=g).stream(context, actions=WALK)) for g in (True, False))
    np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("full_float32")
def test_a_step_on_the_gpu_gives_what_the_cpu_gives():
    context = np.random.default_rng(0).integers(0, 256, (6, 24, 32, 3), dtype=np.uint8)
    tokens = torch.randn(1, 12, 8 * 8 * 3, generator=torch.Generator().manual_seed(0))
    outputs = []
    for device in ("cuda", "cpu"):
        made = VideoGenerator(tiny_dit().to(device), tiny_stream(), FlowSampler(steps=2), ACTIONS)
        assert list(made.stream(context, actions=[])) == []  # prefills only
        action = torch.tensor([[1]], device=device)
        outputs.append(made.engine.step(tokens.to(device), commit=False, timestep=0.5, action=action).cpu())
    torch.testing.assert_close(*outputs, atol=2e-3, rtol=2e-3)


def test_a_stream_waits_for_nothing_but_its_frames():
    """Waiting for the event behind a frame's copy is allowed, waiting for the whole stream is not."""
    stream = generator().stream(actions=itertools.cycle(WALK))
    for _ in range(4):
        next(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        frames = [next(stream) for _ in range(8)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len({frame.tobytes() for frame in frames}) == len(frames)


def test_a_frame_is_not_overwritten_by_later_ones():
    stream = generator().stream(actions=itertools.cycle(WALK))
    first = next(stream)
    before = first.copy()
    for _ in range(10):
        next(stream)
    np.testing.assert_array_equal(first, before)


def test_a_long_stream_reserves_no_more_memory():
    stream = generator().stream(actions=itertools.cycle(WALK))
    for _ in range(20):
        next(stream)
    before = torch.cuda.memory_reserved()
    for _ in range(300):
        next(stream)
    assert torch.cuda.memory_reserved() == before
