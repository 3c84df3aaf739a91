from __future__ import annotations

import math

import pytest
import torch

from swba_infer.errors import ConfigError
from swba_infer.rope import grid_positions, rope_angles, rope_columns, turn_pairs


def test_angles_match_exact_arithmetic_at_huge_positions():
    position = 10**10 + 7
    angles = rope_angles([torch.tensor([position])], [8], 10000.0)
    for i in range(4):
        exact = math.remainder(position * 10000.0 ** (-2 * i / 8), 2 * math.pi)
        assert math.cos(float(angles[0, i]) - exact) == pytest.approx(1, abs=1e-6)


def test_scores_depend_on_the_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, 16)

    def score(i: int, j: int) -> torch.Tensor:
        turn = rope_angles([torch.tensor([i, j])], [16])
        a, b = turn_pairs(torch.stack((q, k)), *rope_columns(turn, torch.float32))
        return a @ b

    torch.testing.assert_close(score(5, 2), score(1_000_005, 1_000_002), atol=1e-4, rtol=1e-4)


def test_rotation_keeps_lengths_and_pairs_are_interleaved():
    x = torch.tensor([1.0, 0.0, 0.0, 1.0])
    turn = torch.tensor([math.pi / 2, 0.0])
    turned = turn_pairs(x, *rope_columns(turn, torch.float32))
    torch.testing.assert_close(turned, torch.tensor([0.0, 1.0, 0.0, 1.0]), atol=1e-6, rtol=0)


def test_each_axis_owns_its_slice():
    frame, row, column = grid_positions(torch.arange(96)[None], 6, 8)
    assert frame.unique().tolist() == [0, 1]
    assert (row[0, 17], column[0, 17]) == (2, 1)
    angles = rope_angles([frame, row, column], [4, 4, 4], [100.0, 10.0, 10.0])
    assert angles.shape == (1, 96, 6)
    assert angles[0, 0].abs().sum() == 0
    assert angles[0, 1, :4].abs().sum() == 0
    assert angles[0, 1, 4] == 1


def test_mismatched_axes_are_rejected():
    with pytest.raises(ConfigError, match="dims"):
        rope_angles([torch.arange(3)], [4, 4])
    with pytest.raises(ConfigError, match="even"):
        rope_angles([torch.arange(3)], [3])
