from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import SINKS, SMALL, Case, check_decode, decode_case, second_query

from swba_kernels import BlockWindow, reference

pytest.importorskip("triton")

from swba_kernels.portable import decode as module
from swba_kernels.portable.decode import DecodeTile, decode, decode_splits, decode_tile

TILE = DecodeTile(16, 16, 4, 2)
LONG = Case(BlockWindow(6, 90, 7), 6, heads=4, kv_heads=2, head_dim=24)


def decode_with(splits: int | None, tile: DecodeTile | None = TILE, scale: float | None = None):
    def call(q, k_ring, v_ring, valid, lanes, **options):
        chosen = q.shape[-1] ** -0.5 if scale is None else scale
        return decode(q, k_ring, v_ring, valid, lanes, scale=chosen, splits=splits, tile=tile, **options)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_decode_equals_the_reference(case, dtype) -> None:
    check_decode(case, dtype, decode_with(None), seed=1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("splits", [1, 2, 3, 5, 40])
def test_any_number_of_splits_equals_the_reference(splits, seed) -> None:
    check_decode(LONG, torch.float32, decode_with(splits), seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", SINKS, ids=str)
def test_decode_with_a_second_query_equals_the_reference(case, dtype) -> None:
    check_decode(case, dtype, decode_with(None), seed=1, bounded=True)


@pytest.mark.parametrize("sink", [1, 7, 16, 23, 48, 200])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_a_second_query_reads_the_sinks_wherever_the_splits_cut(splits, sink) -> None:
    case = Case(BlockWindow(6, 90, sink), 6, heads=4, kv_heads=2, head_dim=24)
    for seed in range(2):
        check_decode(case, torch.float32, decode_with(splits), seed=seed, bounded=True)


def test_more_query_rows_than_a_tile_and_the_chosen_tile() -> None:
    case = Case(BlockWindow(37, 80), 37, heads=6, kv_heads=2, head_dim=8)
    check_decode(case, torch.float32, decode_with(3), seed=2)
    check_decode(case, torch.float32, decode_with(None, None), seed=2)
    case = case._replace(pattern=BlockWindow(37, 80, 50))
    check_decode(case, torch.float32, decode_with(3), seed=2, bounded=True)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("scale", [-0.4, 0.0, 3.0])
def test_any_finite_scale(scale, bounded) -> None:
    q, k_ring, v_ring, valid, lanes = decode_case(LONG, torch.float32)
    options = {"q_sink": second_query(q, 7), "sink": 7} if bounded else {}
    out, lse = decode_with(3, scale=scale)(q, k_ring, v_ring, valid, lanes, **options)
    expected, expected_lse = reference.decode_reference(
        q, k_ring, v_ring, valid, lanes=lanes, sm_scale=scale, return_lse=True, **options
    )
    torch.testing.assert_close(out, expected, atol=5e-6, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse)


def test_poisoned_workspace_and_empty_splits_do_not_matter(monkeypatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **b: empty(*a, **b).fill_(float("nan")))
    q, k_ring, v_ring, _, lanes = decode_case(LONG, torch.float32)
    k_ring[:, :, 1:], v_ring[:, :, 1:] = float("nan"), float("nan")
    k_ring[:, :, 0], v_ring[:, :, 0] = 1.0, 2.0
    out, lse = decode_with(6)(q, k_ring, v_ring, torch.ones(2, dtype=torch.int64), lanes)
    torch.testing.assert_close(out, torch.full_like(out, 2.0))
    assert torch.isfinite(lse).all()


def test_a_lane_is_bitwise_the_same_whatever_the_others_do() -> None:
    q, k_ring, v_ring, valid, lanes = decode_case(LONG, torch.float32)
    call = decode_with(None)
    both, both_lse = call(q, k_ring, v_ring, valid, lanes)
    for b in range(2):
        alone, alone_lse = call(q[b : b + 1], k_ring, v_ring, valid[b : b + 1], lanes[b : b + 1])
        assert torch.equal(alone, both[b : b + 1])
        assert torch.equal(alone_lse, both_lse[b : b + 1])


def test_splits_depend_on_capacities_only(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(module, "decode_splits", lambda *a: seen.append(a) or 2)
    q, k_ring, v_ring, valid, lanes = decode_case(LONG, torch.float32)
    for rows in (1, 2):
        decode_with(None)(q[:rows], k_ring, v_ring, valid[:rows], lanes[:rows])
        decode_with(None)(q[:rows], k_ring, v_ring, torch.ones_like(valid[:rows]), lanes[:rows])
    assert len(seen) == 4
    assert len(set(seen)) == 1


def test_strided_tensors_and_rows_without_lanes() -> None:
    q = torch.randn(2, 5, 4, 16).transpose(1, 2)
    rings = [torch.randn(2, 30, 2, 40).transpose(1, 2)[..., 8:24] for _ in range(2)]
    valid = torch.tensor([[30, 9], [7, 9]])[:, 0]
    out, _ = decode(q, *rings, valid, None, scale=0.25, splits=2, tile=TILE)
    assert out.stride() == q.stride()
    torch.testing.assert_close(out, reference.decode_reference(q, *rings, valid), atol=2e-6, rtol=1e-5)


def test_tiles_fit_shared_memory() -> None:
    for limit in (99 * 1024, 163 * 1024, 227 * 1024):
        for block_d in (16, 32, 64, 128, 256):
            for itemsize in (2, 4):
                for rows in (1, 20, 64, 5000):
                    m, n, _, stages = decode_tile(rows, block_d, itemsize, limit)
                    assert (m + 2 * stages * n) * block_d * itemsize <= limit
                    assert m >= 16
                    assert n >= 16


def test_splits_fill_the_gpu_only_when_it_is_not_full() -> None:
    for resident in (1, 2):
        assert decode_splits(132 * 8, 512, 132, resident, partial_bytes=1 << 23) == 1
    assert decode_splits(programs=12, key_tiles=64, multiprocessors=132, resident=2, partial_bytes=1 << 18) > 4
    splits = decode_splits(programs=156, key_tiles=512, multiprocessors=132, resident=1, partial_bytes=1 << 20)
    waves = 156 * splits / 132
    assert waves / math.ceil(waves) > 0.9
    assert decode_splits(programs=1, key_tiles=1, multiprocessors=132, resident=2, partial_bytes=1) == 1


@pytest.mark.parametrize("megabytes", [1, 10, 100])
def test_more_bytes_to_merge_never_mean_more_splits(megabytes) -> None:
    for programs in (6, 48, 300, 900):
        few, many = (decode_splits(programs, 512, 132, 2, x << 20) for x in (megabytes, 10 * megabytes))
        assert many <= few


# Lanes, heads, head dim, tokens, ring slots; key tile and splits within 3% of the fastest that was measured.
MEASURED = [
    ((1, 12, 128, 1560, 32760), 64, {6, 7}),
    ((1, 12, 128, 4680, 32760), 64, {2, 4}),
    ((1, 40, 128, 4680, 32760), 64, {2, 3}),
    ((1, 12, 64, 256, 4096), 128, {5}),
    ((1, 16, 64, 64, 2048), 128, {4}),
    ((1, 16, 64, 144, 4608), 128, {5}),
    ((8, 16, 64, 256, 4096), 128, {1}),
    ((1, 6, 64, 48, 768), 128, {3}),
]


@pytest.mark.parametrize(("shape", "keys", "fast"), MEASURED)
def test_shapes_that_were_measured_on_an_h200_get_what_was_fast(shape, keys, fast) -> None:
    lanes, heads, d, n, slots = shape
    sms, shared_memory = module._gpu(torch.device("cpu"))
    tile = decode_tile(n, d, 2, shared_memory)
    assert tile == (64, keys, 4, 3)
    programs = -(-n // tile.block_m) * heads * lanes
    assert decode_splits(programs, -(-slots // keys), sms, 2, lanes * heads * n * d * 4) in fast
