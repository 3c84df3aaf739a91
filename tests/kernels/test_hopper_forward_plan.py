"""The schedule of the Hopper forward in plain Python: every row once, exactly the visible keys, evenly spread."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from swba_kernels import BlockWindow
from swba_kernels.reference import ring_layout

pytest.importorskip("triton.experimental.gluon")

from swba_kernels.hopper import forward_plan, forward_small
from swba_kernels.hopper.forward_plan import Plan, plan_forward

place_of, rows_of = forward_plan.place_of.fn, forward_plan.rows_of.fn
rounds_of, item_of = forward_plan.rounds_of.fn, forward_plan.item_of.fn
own_keys, ring_keys = forward_plan.own_keys.fn, forward_plan.ring_keys.fn
block_end, start_of, stop_of = (getattr(forward_small, name).fn for name in ("block_end", "start_of", "stop_of"))
is_low_edge, unseen_of = forward_small.is_low_edge.fn, forward_small.unseen_of.fn


@st.composite
def patterns(draw, largest: int = 40) -> BlockWindow:
    block = draw(st.integers(1, largest))
    window = block + draw(st.integers(0, 3 * largest))
    return BlockWindow(block, window, draw(st.integers(0, 2 * largest)), draw(st.integers(0, block)))


def places(plan: Plan, heads: int) -> list[tuple[int, int, int]]:
    """Return (head, block, tile) of every work item, in order."""
    shared = (heads * plan.heavy, heads * plan.per_block, *plan)
    return [place_of(i, *shared) for i in range(heads * plan.tiles)]


def sizes(pattern: BlockWindow) -> tuple[int, int, int, int]:
    return pattern.block_size, pattern.window, pattern.sink, pattern.grid_start


@settings(max_examples=400, deadline=None)
@given(patterns(), st.integers(1, 200), st.integers(1, 5), st.sampled_from([1, 3, 8, 64]), st.booleans())
def test_items_hold_every_row_of_every_head_once_and_never_straddle_blocks(pattern, n, heads, rows, on_ring) -> None:
    weighed = (0, 0) if on_ring else (pattern.window, pattern.sink)
    plan = plan_forward(n, pattern.block_size, *weighed, pattern.grid_start, rows)
    seen = []
    for head, block, tile in places(plan, heads):
        first, end = rows_of(block, tile, n, pattern.block_size, pattern.grid_start, rows)
        assert first < end
        assert any(start <= first and end == stop for start, stop in pattern.blocks(n))
        seen += [(head, row) for row in range(first, min(first + rows, end))]
    assert sorted(seen) == [(head, row) for head in range(heads) for row in range(n)]


@settings(max_examples=200, deadline=None)
@given(patterns(), st.integers(1, 200), st.integers(1, 5), st.sampled_from([3, 8, 64]))
def test_heavy_items_come_first_and_late_blocks_before_early_ones(pattern, n, heads, rows) -> None:
    plan = plan_forward(n, *sizes(pattern), rows)
    items = places(plan, heads)
    full = [
        (block + 1) * pattern.block_size + pattern.grid_start >= pattern.window + pattern.sink for _, block, _ in items
    ]
    heavy = heads * plan.heavy
    assert full == [True] * heavy + [False] * (len(items) - heavy)
    assert [x[0] for x in items[:heavy]] == sorted(x[0] for x in items[:heavy])
    if plan.lacking == 0:
        light = [block for _, block, _ in items[heavy:]]
        assert light == sorted(light, reverse=True)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 500), st.integers(1, 40))
def test_ctas_share_the_items(items, ctas) -> None:
    full, rest = divmod(items, ctas)
    seen = []
    for cta in range(ctas):
        mine = [item_of(i, full, cta, ctas) for i in range(rounds_of(full, rest, cta))]
        assert mine == sorted(mine)
        seen += mine
    assert sorted(seen) == list(range(items))


def test_falling_weights_are_spread_evenly() -> None:
    """21 blocks of 1560 tokens, window 6 blocks, 12 heads; and 7 blocks of 4680, fully causal."""
    for pattern, n in ((BlockWindow(1560, 1560 * 6), 1560 * 21), (BlockWindow(4680, 4680 * 7), 4680 * 7)):
        plan = plan_forward(n, *sizes(pattern), 128)
        work = []
        for _, block, tile in places(plan, 12):
            first, end = rows_of(block, tile, n, pattern.block_size, 0, 128)
            work.append(min(end, pattern.window) * (1.0 if end - first > 64 else 0.6))
        full, rest = divmod(len(work), 132)
        loads = [sum(work[item_of(i, full, c, 132)] for i in range(rounds_of(full, rest, c))) for c in range(132)]
        assert max(loads) < 1.03 * sum(loads) / 132


@settings(max_examples=300, deadline=None)
@given(patterns(), st.integers(1, 200))
def test_own_keys_are_those_the_pattern_shows(pattern, n) -> None:
    for start, end in pattern.blocks(n):
        first, sinks = own_keys(end, pattern.window, pattern.sink)
        assert sinks == 0 or sinks < first
        seen = [*range(sinks), *range(first, end)]
        assert seen == [k for k in range(n) if pattern.visible(start, k, n)]


def ring_slots(position: int, end: int, pattern: BlockWindow, ring_window: int) -> list[int]:
    """Return the slots that a block ending `end` tokens after `position` reads, the way the kernel finds them."""
    filled = min(position, 1 << 30)
    turn = (position - pattern.sink) % (1 << 64) % ring_window
    start, count, low = ring_keys(filled, turn, end, pattern.window, pattern.sink, ring_window)
    assert start >= 0 or count == 0
    assert start + count <= pattern.sink + ring_window or count == 0
    return [*range(low), *range(start, start + count)]


@settings(max_examples=600, deadline=None)
@given(patterns(), st.integers(0, 500), st.integers(1, 60), st.sampled_from([0, 0, 1, 7, 50]))
def test_ring_segments_hold_exactly_the_visible_history(pattern, position, n, spare) -> None:
    ring_window = pattern.window + spare
    tokens, slots = ring_layout(position, pattern.sink + ring_window, pattern.sink)
    slot_of = dict(zip(tokens, slots, strict=True))
    for end in (e for e in pattern.block_ends(n)):
        oldest = position + end - pattern.window
        visible = [p for p in range(position) if p >= oldest or p < pattern.sink]
        assert sorted(ring_slots(position, end, pattern, ring_window)) == sorted(slot_of[p] for p in visible)


@pytest.mark.parametrize("position", [(1 << 30) - 1, 1 << 30, (1 << 31) + 5, 10**12 + 7])
def test_a_ring_has_no_last_position(position) -> None:
    for sink in (0, 3):
        pattern = BlockWindow(5, 17, sink)
        expected = {p if p < sink else sink + (p - sink) % 17 for p in range(position - 12, position)} | set(
            range(sink)
        )
        assert sorted(ring_slots(position, 5, pattern, 17)) == sorted(expected)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 100), st.integers(1, 400), st.sampled_from([64, 128]))
def test_tiles_of_a_segment_show_every_key_once(start, length, columns) -> None:
    """The tile walk of forward_producer._copy, with the mask of forward_consumer._hide."""
    tiles = -(-length // columns)
    hidden = tiles * columns - length
    row, seen = start + length - columns, []
    for j in range(tiles):
        seen += [row + c for c in range(columns) if j > 0 or c >= hidden]
        if length >= columns:
            assert start <= row <= start + length - columns
        row = start + (tiles - 2 - j) * columns
    assert sorted(seen) == list(range(start, start + length))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, forward_small.KEYS + 20), st.integers(0, 300), st.integers(0, 126), st.integers(1, 500))
@example(128, 0, 1, 300)
@example(128, 172, 65, 500)
@example(1000, 0, 100, 127)
@example(1, 499, 0, 600)
def test_small_blocks_every_row_meets_its_keys_once_and_some_of_them_at_once(block, more, first_block, n) -> None:
    """The masks of the kernel: all bounds in its first tile, the lower ones and the overlap in its last two."""
    pattern = BlockWindow(block, block + more, 0, min(first_block, block))
    keys = forward_small.KEYS
    if not forward_small.serves(64, block, n, 0):
        return
    ends = [min(block_end(row, block, pattern.grid_start), n) for row in range(n)]
    lows = [max(end - pattern.window, 0) for end in ends]
    for row in range(0, n, 64):
        rows = range(row, min(row + 64, n))
        first, end = lows[row], min(block_end(row + 63, block, pattern.grid_start), n)
        assert (first, end) == (min(lows[r] for r in rows), max(ends[r] for r in rows))
        tiles = -(-(end - first) // keys)
        starts = [start_of(tile, tiles, first, end, keys) for tile in range(tiles)]
        assert starts[0] + max(unseen_of(first, end, keys), 0) >= 0
        assert tiles == 1 or min(starts) == first
        for r in rows:
            met = [key for key in range(starts[0], starts[0] + keys) if lows[r] <= key < ends[r]]
            assert met, "an online softmax needs a score in its first tile"
            for tile in range(1, tiles):
                tile_keys = range(starts[tile], starts[tile] + keys)
                low, stop = (lows[r], stop_of(tile, end, keys)) if is_low_edge(tile, tiles) else (0, n)
                met += [key for key in tile_keys if low <= key < stop]
            assert sorted(met) == [key for key in range(n) if pattern.visible(r, key, n)]
        if tiles == 1:
            cleared = range(starts[0], starts[0] + max(unseen_of(first, end, keys), 0))
            assert list(cleared) == [key for key in range(end - keys, end) if key < first]


def test_the_kernel_for_small_blocks_is_for_what_its_masks_allow() -> None:
    assert forward_small.serves(64, 127, 4000, 0)
    assert forward_small.serves(64, 4000, 127, 0)
    assert not forward_small.serves(64, 128, 128, 0)
    assert not forward_small.serves(64, 48, 4000, 1)
    assert not forward_small.serves(128, 48, 4000, 0)
