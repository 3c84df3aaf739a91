"""Sinks read by queries of their own (q_sink) on Hopper: every op against the float64 reference, sinks at tile edges.

B rows of the call, L ring lanes.
"""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close, assert_lse_close
from torch import Tensor

import swba_kernels
from swba_kernels import reference

pytest.importorskip("triton")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")]

EDGES = [1, 63, 64, 65, 127, 128, 129, 1560]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Let torch fill what it allocates uninitialised with NaN: results and workspaces."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*sizes: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return [B, H, N, D] as a view of [B, N, H, D], as models make it."""
    b, h, n, d = sizes
    x = torch.randn(b, n, h, d, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")
    return x.to(dtype).transpose(1, 2)


def rings(lanes: Tensor, valid: list[int], kv_heads: int, slots: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    """Return k and v rings that hold NaN past `valid` and in lanes that no row reads."""
    shape = (int(lanes.max()) + 2, kv_heads, slots, d)
    found = []
    for seed in (3, 4):
        ring = torch.full(shape, float("nan"), device="cuda", dtype=dtype)
        for lane, filled in zip(lanes.tolist(), valid, strict=True):
            ring[lane, :, :filled] = draw(1, kv_heads, filled, d, seed=seed + 10 * lane, dtype=dtype)[0]
        found.append(ring)
    return found


def decode(q, k, v, valid, lanes, q_sink, sink, plan=None) -> tuple[Tensor, Tensor]:
    from swba_kernels.hopper.decode import decode

    return decode(q, k, v, valid, lanes, scale=q.shape[-1] ** -0.5, q_sink=q_sink, sink=sink, plan=plan)


def decode_plans(head_dim: int, heads: int, n: int, slots: int, lanes: int) -> list:
    """Return, for each configuration, every plan that would be compared."""
    from swba_kernels.hopper.decode_plan import CONFIGS, lane_plans
    from swba_kernels.hopper.launch import multiprocessors

    sms = multiprocessors(torch.device("cuda", 0))
    return [x for config in CONFIGS[head_dim] for x in lane_plans(config, heads, n, slots, lanes, sms)]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sink", EDGES)
def test_decode_at_every_edge_by_every_plan(sink, head_dim) -> None:
    slots, dtype = 1700, torch.float16 if (sink, head_dim) == (65, 128) else torch.bfloat16
    valid = sorted({1, max(sink - 1, 1), sink, sink + 1, sink + 64, sink + 129, slots})
    lanes = torch.randperm(len(valid), generator=torch.Generator("cuda").manual_seed(sink), device="cuda")
    q, q_sink = (draw(len(valid), 4, 100, head_dim, seed=seed, dtype=dtype) for seed in (1, 2))
    k, v = rings(lanes, valid, 2, slots, head_dim, dtype)
    filled = torch.tensor(valid, device="cuda")
    options = {"lanes": lanes, "sink": sink}
    double = [x.double() for x in (q, k, v)]
    oracle, oracle_lse = reference.decode_reference(*double, filled, q_sink=q_sink.double(), return_lse=True, **options)
    eager = reference.decode_reference(q, k, v, filled, q_sink=q_sink, **options)
    for plan in decode_plans(head_dim, 2, 200, slots, k.shape[0]):
        out, lse = decode(q.contiguous(), k, v, filled, lanes, q_sink.contiguous(), sink, plan)
        assert_close(out, oracle, eager, f"{plan.config}")
        assert_lse_close(lse, oracle_lse)


def test_decode_of_real_sizes_by_the_chosen_plan() -> None:
    for heads, kv_heads, n, slots, d, sink in (
        (12, 12, 256, 4096, 64, 256),
        (6, 2, 333, 5000, 128, 1560),
        (16, 16, 64, 2048, 64, 64),
        (40, 8, 65, 1300, 128, 130),
        (3, 1, 1560, 9000, 128, 1560),
    ):
        for valid in (slots, slots // 3, sink):
            q, q_sink = (draw(1, heads, n, d, seed=seed) for seed in (1, 2))
            lanes = torch.tensor([0], device="cuda")
            k, v = rings(lanes, [valid], kv_heads, slots, d, torch.bfloat16)
            filled = torch.tensor([valid], device="cuda")
            out, lse = decode(q, k, v, filled, None, q_sink, sink)
            options = {"sink": sink, "return_lse": True}
            oracle, oracle_lse = reference.decode_reference(
                *(x.double() for x in (q, k, v)), filled, q_sink=q_sink.double(), **options
            )
            eager, _ = reference.decode_reference(q, k, v, filled, q_sink=q_sink, **options)
            assert_close(out, oracle, eager)
            assert_lse_close(lse, oracle_lse)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("n", [48, 1000])
def test_a_lane_of_a_decode_has_the_same_bits_whatever_the_others_do(n, head_dim) -> None:
    valid, sink = [3000, 1, 1234, 70, 65], 65
    lanes = torch.tensor([4, 0, 3, 1, 2], device="cuda")
    q, q_sink = (draw(5, 6, n, head_dim, seed=seed) for seed in (1, 2))
    k, v = rings(lanes, valid, 6, 3000, head_dim, torch.bfloat16)
    filled = torch.tensor(valid, device="cuda")
    together = decode(q, k, v, filled, lanes, q_sink, sink)
    for _ in range(5):
        assert all(map(torch.equal, decode(q, k, v, filled, lanes, q_sink, sink), together))
    for b in range(5):
        one = slice(b, b + 1)
        alone = decode(q[one], k, v, filled[one], lanes[one], q_sink[one], sink)
        assert all(torch.equal(x, y[one]) for x, y in zip(alone, together, strict=True))


@pytest.mark.parametrize(("heads", "n", "head_dim"), [(4, 48, 64), (12, 900, 128)])
def test_one_graph_of_a_decode_serves_every_filled_length(heads, n, head_dim) -> None:
    slots, sink = 3600, 900
    q, q_sink = (draw(1, heads, n, head_dim, seed=seed) for seed in (1, 2))
    filled, lanes = torch.tensor([slots], device="cuda"), torch.tensor([0], device="cuda")
    k, v = rings(lanes, [slots], heads, slots, head_dim, torch.bfloat16)
    decode(q, k, v, filled, None, q_sink, sink)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode(q, k, v, filled, None, q_sink, sink)
    lengths = [1 + i * 371 % slots for i in range(300)]
    expected = {}
    for length in lengths[::30]:
        filled.fill_(length)
        expected[length] = [x.clone() for x in decode(q, k, v, filled, None, q_sink, sink)]
    for length in lengths:
        filled.fill_(length)
        graph.replay()
        if length in expected:
            assert all(map(torch.equal, captured, expected[length]))


def test_layouts_of_the_second_query_and_a_negative_scale() -> None:
    lanes, valid = torch.tensor([1, 0], device="cuda"), [700, 333]
    q, q_sink = (draw(2, 8, 130, 64, seed=seed) for seed in (1, 2))
    k, v = rings(lanes, valid, 2, 900, 64, torch.bfloat16)
    filled = torch.tensor(valid, device="cuda")
    wide = torch.zeros(2, 130, 8, 192, device="cuda", dtype=torch.bfloat16).transpose(1, 2)[..., 64:128]
    for scale in (0.125, -0.2, 0.0):
        options = {"lanes": lanes, "sink": 100, "sm_scale": scale}
        for first, second in ((q, q_sink.contiguous()), (q.contiguous(), q_sink), (q, wide.copy_(q_sink))):
            double = (x.double() for x in (first, k, v))
            oracle = reference.decode_reference(*double, filled, q_sink=second.double(), **options)
            eager = reference.decode_reference(first, k, v, filled, q_sink=second, **options)
            out = swba_kernels.window_decode_attention(first, k, v, filled, q_sink=second, impl="hopper", **options)
            assert_close(out, oracle, eager)
