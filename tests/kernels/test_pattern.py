from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swba_kernels import BlockWindow
from swba_kernels.reference import ring_layout, visible_mask


@st.composite
def patterns(draw: st.DrawFn) -> BlockWindow:
    block_size = draw(st.integers(1, 9))
    window = block_size + draw(st.integers(0, 20))
    return BlockWindow(block_size, window, draw(st.integers(0, 25)), draw(st.integers(0, block_size)))


def defined_visible(p: BlockWindow, q: int, k: int, n: int) -> bool:
    """The design's definition, block by block from the first one."""
    end = p.first_block or p.block_size
    while end <= q:
        end += p.block_size
    end = min(end, n)
    return k < end and (k >= end - p.window or k < p.sink)


@settings(max_examples=60, deadline=None)
@given(patterns(), st.integers(1, 40))
def test_every_view_of_the_pattern_agrees_with_its_definition(p: BlockWindow, n: int) -> None:
    expected = torch.tensor([[defined_visible(p, q, k, n) for k in range(n)] for q in range(n)])
    assert torch.equal(p.mask(n), expected)
    assert [[p.visible(q, k, n) for k in range(n)] for q in range(n)] == expected.tolist()
    assert torch.equal(visible_mask(p.block_ends(n), p.window, p.sink, keys=n), expected)
    assert p.pairs(n) == int(expected.sum())
    for start, end in p.blocks(n):
        keys = [k for lo, hi in p.key_ranges(start, end) for k in range(lo, hi)]
        assert keys == torch.nonzero(expected[start]).flatten().tolist()
        assert (expected[start:end] == expected[start]).all()


@settings(max_examples=60, deadline=None)
@given(patterns(), st.integers(1, 60))
def test_blocks_tile_the_sequence_on_the_grid(p: BlockWindow, n: int) -> None:
    blocks = list(p.blocks(n))
    assert [b for b, _ in blocks] == [0, *(e for _, e in blocks[:-1])]
    assert [e for _, e in blocks] == p.block_ends(n)
    assert blocks[-1][1] == n
    for i, (start, end) in enumerate(blocks):
        assert start == max(0, p.grid_start + i * p.block_size)
        assert end == min(n, p.grid_start + (i + 1) * p.block_size)
        assert start < end


@settings(max_examples=60, deadline=None)
@given(patterns(), st.integers(1, 80))
def test_a_ring_holds_exactly_the_visible_keys_after_each_block(p: BlockWindow, n: int) -> None:
    capacity = p.sink + p.window
    for start, end in p.blocks(n):
        tokens, slots = ring_layout(end, capacity, p.sink)
        assert tokens == [k for k in range(end) if p.visible(start, k, end)]
        assert sorted(slots) == list(range(min(end, capacity)))


def test_classic_pattern_sees_whole_blocks() -> None:
    mask = BlockWindow.from_blocks(3, 2, sink_blocks=1).mask(12)
    block = torch.arange(12) // 3
    q, k = block[:, None], block[None, :]
    assert torch.equal(mask, (k <= q) & ((k > q - 2) | (k < 1)))


def test_from_frames_counts_in_tokens() -> None:
    p = BlockWindow.from_frames(10, 3, 7, sink_frames=2, first_block_frames=1)
    assert p == BlockWindow(30, 70, sink=20, first_block=10)
    assert p.grid_start == -20


def test_pattern_is_frozen_and_hashable() -> None:
    p = BlockWindow(4, 8)
    assert {p: 1}[BlockWindow(4, 8)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.window = 9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "block_size: expected at least 1, got 0"),
        ((4, 3), r"window: expected at least block_size \(4\), got 3"),
        ((4, 4, -1), "sink: expected at least 0, got -1"),
        ((4, 4, 0, 5), r"first_block: expected at most block_size \(4\), got 5"),
        ((4, 4, 0, -1), "first_block: expected at least 0, got -1"),
    ],
)
def test_out_of_range_sizes_are_rejected(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockWindow(*arguments)


@pytest.mark.parametrize("value", [4.0, "4", True, None])
def test_sizes_that_are_not_ints_are_rejected(value: object) -> None:
    with pytest.raises(TypeError, match="block_size: expected an int"):
        BlockWindow(value, 8)  # type: ignore[arg-type]


def test_factories_name_their_own_arguments() -> None:
    with pytest.raises(ValueError, match="ws: expected at least 1"):
        BlockWindow.from_blocks(4, 0)
    with pytest.raises(ValueError, match="window_frames: expected at least frames_per_block"):
        BlockWindow.from_frames(10, 3, 2)
    with pytest.raises(ValueError, match="first_block_frames: expected at most"):
        BlockWindow.from_frames(10, 3, 6, first_block_frames=4)


def test_copies_are_equal_and_share_nothing_that_a_compiler_could_take_for_one() -> None:
    pattern = BlockWindow(5, 13, 4, 2)
    copies = (copy.copy(pattern), copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern)), replace(pattern))
    for made in copies:
        assert (made, hash(made), made.sizes) == (pattern, hash(pattern), (5, 13, 4, -3))
        assert made._dynamic == pattern.sizes
        assert made._dynamic is not pattern._dynamic


def test_nothing_but_the_four_sizes_shows() -> None:
    assert repr(BlockWindow(5, 13)) == "BlockWindow(block_size=5, window=13, sink=0, first_block=0)"
    assert dataclasses.asdict(BlockWindow(5, 13)) == {"block_size": 5, "window": 13, "sink": 0, "first_block": 0}
    assert {type(size) for size in BlockWindow(5, 13).sizes} == {int}
