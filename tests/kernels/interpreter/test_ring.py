from __future__ import annotations

import pytest
import torch
from kernel_cases import SMALL, Case, check_ring_write

from swba_kernels import BlockWindow, reference

pytest.importorskip("triton")

from swba_kernels.portable import ring as module
from swba_kernels.portable.ring import ring_write


def write(k_ring, v_ring, k, v, position, lanes, sink) -> None:
    ring_write(k_ring, v_ring, k, v, position, lanes, sink=sink)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_ring_write_equals_writing_token_by_token(case, seed) -> None:
    check_ring_write(case, torch.float32, write, seed=seed)


def test_several_tiles_of_tokens_longer_than_the_ring() -> None:
    case = Case(BlockWindow(30, 61, 5), 300, head_dim=64)
    for seed in range(3):
        check_ring_write(case, torch.float16, write, seed=seed)


def test_tokens_that_do_not_survive_are_never_written(monkeypatch) -> None:
    kernel = module._ring_write_kernel

    class FirstTile:
        def __getitem__(self, grid):
            return kernel[(1,)]

    monkeypatch.setattr(module, "_ring_write_kernel", FirstTile())
    rings = [torch.zeros(1, 1, 66, 64) for _ in range(2)]
    new = torch.ones(1, 1, 300, 64)
    write(*rings, new, new, torch.tensor([3]), None, 5)
    for ring in rings:
        assert torch.nonzero(ring[0, 0, :, 0]).flatten().tolist() == [3, 4]


def test_rows_without_lanes_leave_the_other_lanes_alone() -> None:
    rings = [torch.zeros(3, 2, 6, 16) for _ in range(2)]
    new = [torch.randn(2, 4, 2, 16).transpose(1, 2) for _ in range(2)]
    position = torch.tensor([0, 5])
    expected = [x.clone() for x in rings]
    write(*rings, *new, position, None, 2)
    reference.ring_write_reference(*expected, *new, position, sink=2)
    assert torch.equal(rings[0], expected[0])
    assert torch.equal(rings[1], expected[1])
    assert not rings[0][2].any()


def test_positions_beyond_32_bits() -> None:
    rings = [torch.zeros(1, 1, 7, 8) for _ in range(2)]
    k = torch.randn(1, 1, 3, 8)
    start = 5 * 2**40 + 3
    write(*rings, k, k, torch.tensor([start]), None, 2)
    for i in range(3):
        assert torch.equal(rings[0][0, 0, 2 + (start + i - 2) % 5], k[0, 0, i])
