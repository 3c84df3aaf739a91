"""The Hopper forward on a GPU against the float64 reference, on ordinary, poisoned and adversarial inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import pytest
import torch
from forward_calls import call, equal_rows, ring_of
from kernel_cases import Case, qkv, ring_case
from tolerance import assert_close, assert_lse_close
from torch import Tensor

from swba_kernels import BlockWindow, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="kernels for Hopper"
    ),
]

DTYPES = [torch.bfloat16, torch.float16]
PATTERNS = [
    (BlockWindow(64, 64 * 5), 64 * 9),
    (BlockWindow(64, 200, 10, 7), 999),
    (BlockWindow(144, 144 * 3), 144 * 6),
    (BlockWindow(256, 256 * 4), 256 * 8),
    (BlockWindow(256, 300, 31, 100), 1111),
    (BlockWindow(333, 999), 333 * 4 + 5),
    (BlockWindow(512, 512 * 3), 512 * 5),
    (BlockWindow(880, 880 * 2, 100), 880 * 3),
    (BlockWindow(1560, 1560 * 2), 1560 * 3),
    (BlockWindow(2025, 2025, 2025), 2025 * 2 + 1),
    (BlockWindow(2025, 5000), 1300),
    (BlockWindow(1, 3), 70),
    (BlockWindow(1, 500), 600),
    (BlockWindow(17, 51, 0, 5), 333),
    (BlockWindow(48, 768), 48 * 40),
    (BlockWindow(48, 100, 0, 48), 1000),
    (BlockWindow(95, 190, 0, 45), 900),
    (BlockWindow(127, 127), 130),
    (BlockWindow(127, 600, 0, 1), 63),
    (BlockWindow(128, 128, 0, 1), 300),
    (BlockWindow(128, 300, 0, 65), 500),
    (BlockWindow(1000, 1000, 0, 100), 127),
    (BlockWindow(17, 40, 3, 5), 333),
    (BlockWindow(100, 130, 500), 777),
]


SMALL = BlockWindow(48, 200, 0, 7)


def check(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockWindow, scale: float | None = None, configs: Iterable = (None,)
) -> None:
    double = [x.double() for x in (q, k, v)]
    oracle, oracle_lse = reference.block_window_reference(*double, pattern, sm_scale=scale, return_lse=True)
    eager = reference.block_window_reference(q, k, v, pattern, sm_scale=scale)
    for config in configs:
        out, lse = call(q, k, v, pattern, scale, config=config)
        assert_close(out, oracle, eager, f"out by {config}")
        assert_lse_close(lse, oracle_lse)
        assert out.stride() == torch.empty_like(q).stride()


def candidates(head_dim: int, block_size: int) -> list:
    """Return every (configuration, whether its tiles straddle blocks) that may serve blocks of this size.

    None leaves the choice, among others that of the kernel for small blocks.
    """
    from swba_kernels.hopper.forward import CONFIGS, SMALLEST_STRADDLED

    straddle = (False, True) if block_size >= SMALLEST_STRADDLED else (False,)
    return [None, *itertools.product(CONFIGS[head_dim], straddle)]


def straddling(head_dim: int) -> list:
    return [x for x in candidates(head_dim, 1000) if x and x[1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("pattern", "n"), PATTERNS, ids=str)
def test_forward_equals_the_reference(pattern, n, head_dim, dtype) -> None:
    configs = candidates(head_dim, pattern.block_size)
    check(*qkv(Case(pattern, n, 3, 3, head_dim), dtype, "cuda"), pattern, configs=configs)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sink", [0, 1, 70, 300])
@pytest.mark.parametrize("block", [64, 96, 100, 130, 144, 200, 333])
def test_tiles_that_straddle_blocks(block, sink, head_dim) -> None:
    """Windows of one block and of many, or all before; grids that start before the sequence; one row in a last tile."""
    for window, first_block, n in (
        (block, 0, 6 * block),
        (block + 33, 1, 5 * block + 17),
        (3 * block, block - 1, 1025),
        (5 * block, block // 2, 770),
        (1000, 40, 513),
    ):
        pattern = BlockWindow(block, window, sink, first_block)
        heads = (4, 4) if first_block == 0 else (6, 2)
        dtype = DTYPES[first_block % 2]
        check(*qkv(Case(pattern, n, *heads, head_dim), dtype, "cuda"), pattern, configs=straddling(head_dim))


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_grouped_heads(head_dim, kv_heads) -> None:
    for pattern in (BlockWindow(200, 500, 30, 50), SMALL):
        inputs = qkv(Case(pattern, 1100, 6, kv_heads, head_dim), torch.bfloat16, "cuda")
        check(*inputs, pattern, configs=candidates(head_dim, pattern.block_size))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_items_than_multiprocessors(head_dim) -> None:
    pattern = BlockWindow(144, 144 * 4, 20)
    inputs = qkv(Case(pattern, 144 * 8, 12, 4, head_dim, batch=3), torch.bfloat16, "cuda")
    check(*inputs, pattern, configs=candidates(head_dim, 144))


def test_views_with_strides_of_their_own() -> None:
    pattern = BlockWindow(333, 700, 12)
    packed = torch.randn(2, 1000, 3, 4, 128, device="cuda", dtype=torch.bfloat16)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    check(q, k, v, pattern, configs=candidates(128, 333))
    padded = torch.randn(3, 2, 5, 1200, 256, device="cuda", dtype=torch.bfloat16)[:, :, 1:4, 100:1100, 64:192]
    check(*padded, pattern, configs=candidates(128, 333))
    check(*(x.contiguous() for x in padded), pattern)
    check(*padded[..., :64], SMALL)
    check(*packed[..., 64:].permute(2, 0, 3, 1, 4), SMALL)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-3, 3.0])
def test_any_scale(scale, head_dim) -> None:
    for pattern in (BlockWindow(200, 500), SMALL):
        inputs = qkv(Case(pattern, 900, 2, 2, head_dim), torch.bfloat16, "cuda")
        check(*inputs, pattern, scale, candidates(head_dim, pattern.block_size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "pattern", [BlockWindow(256, 1024, 40), BlockWindow(100, 1024, 40), BlockWindow(48, 1024)], ids=str
)
def test_adversarial_scores(pattern, head_dim, dtype) -> None:
    q, k, v = qkv(Case(pattern, 2048, 2, 2, head_dim), dtype, "cuda")
    configs = candidates(head_dim, pattern.block_size)
    check(q * 10, k * 10, v, pattern, configs=configs)
    check(q.abs() * 10, k.abs() * -10, v, pattern, configs=configs)
    check(q, torch.ones_like(k), v, pattern, configs=configs)
    check(torch.ones_like(q), torch.zeros_like(k), v, pattern, configs=configs)
    dominant = k.clone()
    dominant[:, :, 1000] = 4 * q[:, :, 1200]
    check(q, dominant, v, pattern, configs=configs)
    rising = k + torch.arange(2048, device="cuda", dtype=dtype)[:, None] / 100
    check(q.abs(), rising, v, pattern, configs=configs)
    position = torch.arange(2048, device="cuda")[:, None]
    check(q.abs() * (position % 3 == 0), rising.flip(2), v, pattern, configs=configs)  # not all rows of a warp rise
    # The first tile of most rows is 12 powers of two below what a thread's other tiles add up to: just not raised.
    later = torch.where(position % 256 < 128, 4.5 * head_dim**-0.5, 0.0).to(dtype).expand_as(k).contiguous()
    check(torch.ones_like(q), later, v, pattern, configs=configs)
    louder = k.clone()  # sinks, which come last
    louder[:, :, :40] *= 20
    check(q, louder, v, pattern, configs=configs)
    check(q.abs(), rising.flip(2), v, pattern, configs=configs)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block", [3, 60, 64, 100, 128, 200, 333, 1000])
def test_keys_that_no_row_sees_do_not_matter(block, head_dim) -> None:
    """NaN in future blocks, and between sinks and window: the rows that see none of it keep every bit.

    By tiles that do not straddle blocks, chosen or not.
    """
    from swba_kernels.hopper.forward import choose_config

    pattern, n = BlockWindow(block, block + block // 3, min(block, 50)), 6 * block
    configs = [x for x in candidates(head_dim, block) if x not in straddling(head_dim)]
    if choose_config(head_dim, block, pattern.window + pattern.sink, False, True)[1]:
        configs.remove(None)
    for blocks in (1, 2, 4):
        end = blocks * block
        q, k, v = qkv(Case(pattern, n, 2, 2, head_dim), torch.bfloat16, "cuda")
        clean = [call(q, k, v, pattern, config=config) for config in configs]
        _, (lo, _) = pattern.key_ranges(end - block, end)
        for x in (k, v):
            x[:, :, end:] = float("nan")
            x[:, :, min(pattern.sink, lo) : lo] = float("nan")
        for config, expected in zip(configs, clean, strict=True):
            equal_rows(call(q, k, v, pattern, config=config), expected, slice(end - block, end))


def see_only_their_own(pattern: BlockWindow, n: int, head_dim: int, height: int, rows: list[int], config=None) -> None:
    """Other values in the keys that a row does not see keep its bits; NaN does where no row of its tile sees them."""
    q, k, v = qkv(Case(pattern, n, 2, 2, head_dim), torch.bfloat16, "cuda")
    clean = call(q, k, v, pattern, config=config)
    visible = pattern.mask(n, "cuda")
    for row in rows:
        tile = row // height * height
        seen_by_tile = visible[tile : tile + height].any(0)
        for seen, other in ((visible[row], torch.randn_like(k)), (seen_by_tile, torch.full_like(k, math.nan))):
            inputs = (torch.where(seen[:, None], x, other) for x in (k, v))
            equal_rows(call(q, *inputs, pattern, config=config), clean, slice(row, row + 1))


@pytest.mark.parametrize("block", [1, 17, 48, 64, 100, 127])
def test_rows_that_share_a_tile_with_other_small_blocks_see_only_their_own(block) -> None:
    see_only_their_own(BlockWindow(block, 2 * block), 640, 64, 64, [0, 63, 64, 200, 400, 639])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sink", [0, 30, 150])
@pytest.mark.parametrize("block", [64, 100, 200, 333])
def test_rows_of_tiles_that_straddle_blocks_see_only_their_own(block, sink, head_dim) -> None:
    pattern, n = BlockWindow(block, 2 * block, sink, 7), 5 * block + 3
    for config in straddling(head_dim):
        rows = [0, 6, 7, 127, 128, 2 * block + 6, 2 * block + 7, n - 1]
        see_only_their_own(pattern, n, head_dim, config[0].groups * 64, rows, config)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("block", "n"), [(100, 1000), (256, 1000), (333, 333), (64, 640), (2000, 70)])
def test_only_the_rows_of_the_call_are_written(block, n, head_dim, monkeypatch) -> None:
    pattern = BlockWindow(block, 2 * block)
    q, k, v = qkv(Case(pattern, n, 3, 3, head_dim), torch.bfloat16, "cuda")
    whole = torch.full((2, n + 300, 3, head_dim), float("nan"), device="cuda", dtype=torch.bfloat16)
    for config in candidates(head_dim, block):
        whole.fill_(float("nan"))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", lambda x: whole[:, 100 : 100 + n].transpose(1, 2))
            out, lse = call(q, k, v, pattern, config=config)
        assert torch.isfinite(lse).all()
        assert torch.isfinite(out).all()
        assert torch.isnan(whole[:, :100]).all()
        assert torch.isnan(whole[:, 100 + n :]).all()
        assert torch.equal(out, call(q, k, v, pattern, config=config)[0])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_runs_agree_in_every_bit(head_dim) -> None:
    for pattern in (BlockWindow(333, 999, 64, 20), BlockWindow(100, 400, 0, 30)):
        q, k, v = qkv(Case(pattern, 3000, 6, 2, head_dim), torch.bfloat16, "cuda")
        for config in candidates(head_dim, pattern.block_size):
            first = call(q, k, v, pattern, config=config)
            for _ in range(50):
                equal_rows(call(q, k, v, pattern, config=config), first, slice(None))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_graph_hands_out_its_items_anew_at_every_replay(head_dim) -> None:
    """More items than multiprocessors, so that CTAs ask for them."""
    pattern = BlockWindow(144, 144 * 4, 20)
    q, k, v = qkv(Case(pattern, 144 * 12, 12, 4, head_dim), torch.bfloat16, "cuda")
    for config in candidates(head_dim, 144):
        expected = call(q, k, v, pattern, config=config)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(q, k, v, pattern, config=config)
        for _ in range(3):
            for x in captured:
                x.fill_(float("nan"))
            graph.replay()
            equal_rows(captured, expected, slice(None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("sink", "spare"), [(0, 0), (0, 70), (40, 0), (200, 33)])
def test_prefill_on_rings_at_every_stage(sink, spare, head_dim, dtype) -> None:
    from swba_kernels.portable.forward import Ring

    pattern = BlockWindow(150, 450, sink)
    total = pattern.sink + pattern.window + spare
    stages = [0, 1, sink, sink + 1, 149, total - 1, total, total + 1, total + 230, 3 * total + 17]
    rings = ring_of(pattern, stages, 2, head_dim, dtype, spare)
    lanes = torch.tensor([3, 9, 0, 7, 1, 8, 4, 2, 6, 5], device="cuda")
    position = torch.tensor(stages, device="cuda")[lanes]
    louder = torch.stack([rings[0] * 20, rings[1]])  # what comes after a call's own keys raises the maximum
    for n, history in ((40, rings), (150, rings), (150, louder), (400, rings), (400, louder), (700, rings)):
        q, k, v = qkv(Case(pattern, n, 4, 2, head_dim, batch=len(stages)), dtype, "cuda")
        out, lse = call(q, k, v, pattern, ring=Ring(*history, position, lanes))
        args = (pattern, *history, position)
        oracle, oracle_lse = reference.prefill_reference(
            q.double(), k.double(), v.double(), pattern, *history.double(), position, lanes=lanes, return_lse=True
        )
        assert_close(out, oracle, reference.prefill_reference(q, k, v, *args, lanes=lanes))
        assert_lse_close(lse, oracle_lse)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seed", range(4))
def test_prefill_without_lane_numbers_and_with_small_blocks(seed, head_dim) -> None:
    from swba_kernels.portable.forward import Ring

    pattern = BlockWindow([7, 60, 64, 129][seed], [20, 100, 64, 700][seed], [3, 64, 0, 10][seed], seed)
    case = ring_case(Case(pattern, 260, 4, 2, head_dim), torch.bfloat16, "cuda", seed, seed)
    q, k, v, k_ring, v_ring, position, lanes = case
    k_ring, v_ring = k_ring[lanes], v_ring[lanes]
    out, lse = call(q, k, v, pattern, ring=Ring(k_ring, v_ring, position))
    double = [x.double() for x in (q, k, v)]
    oracle, oracle_lse = reference.prefill_reference(
        *double, pattern, k_ring.double(), v_ring.double(), position, return_lse=True
    )
    assert_close(out, oracle, reference.prefill_reference(q, k, v, pattern, k_ring, v_ring, position))
    assert_lse_close(lse, oracle_lse)


@pytest.mark.parametrize("straddle", [False, True])
def test_sizes_compile_nothing_new(straddle) -> None:
    from swba_kernels.hopper import forward

    config = (forward.CONFIGS[128][0], straddle)

    def run(n, block, window, sink, batch) -> None:
        pattern = BlockWindow(block, window, sink)
        call(*qkv(Case(pattern, n, 4, 2, 128, batch=batch), torch.bfloat16, "cuda"), pattern, config=config)

    def compiled() -> int:
        return len(forward._forward.device_caches[torch.cuda.current_device()][0])

    run(1000, 256, 512, 16, 2)
    before = compiled()
    for sizes in ((1024, 256, 512, 1, 1), (777, 100, 300, 33, 3), (80, 64, 64, 1, 1), (4096, 1024, 1024, 128, 1)):
        run(*sizes)
    if not straddle:
        run(16, 1, 1, 1, 1)
    assert compiled() == before


@pytest.mark.slow
def test_tensors_beyond_two_to_the_31_elements() -> None:
    pattern = BlockWindow(250, 500)
    q, k, v = (torch.randn(1, 17, 1_000_000, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    assert q.numel() > 1 << 31
    tail = [x[:, -1:, -500:] for x in (q, k, v)]
    oracle, oracle_lse = reference.block_window_reference(*(x.double() for x in tail), pattern, return_lse=True)
    eager = reference.block_window_reference(*tail, pattern)
    for config in (None, *straddling(128)):
        out, lse = call(q, k, v, pattern, config=config)
        assert_close(out[:, -1:, -250:], oracle[:, :, -250:], eager[:, :, -250:])
        assert_lse_close(lse[:, -1:, -250:], oracle_lse[:, :, -250:])
