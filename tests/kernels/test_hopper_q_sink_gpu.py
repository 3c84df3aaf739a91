"""Sinks read by queries of their own (q_sink) on Hopper: every op against the float64 reference, sinks at tile edges.

B rows of the call, L ring lanes.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Case, check_backward, check_forward, check_prefill
from tolerance import assert_close, assert_lse_close, cancellation
from torch import Tensor

import swba_kernels
from swba_kernels import BlockWindow, reference

pytest.importorskip("triton")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")]

EDGES = [1, 63, 64, 65, 127, 128, 129, 1560]
MODES = ["split", "in turn", "fastest"]  # all but the last are deterministic


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


def sizes(pattern: BlockWindow) -> dict[str, int]:
    names = ("block_size", "window", "sink", "grid_start")
    return dict(zip(names, pattern.sizes, strict=True))


def forward(q, k, v, q_sink, pattern, **options) -> tuple[Tensor, Tensor]:
    from swba_kernels.hopper.forward import forward

    return forward(q, k, v, q_sink=q_sink, scale=q.shape[-1] ** -0.5, **sizes(pattern), **options)


def patterns(sink: int) -> list[tuple[BlockWindow, int]]:
    """Return patterns and lengths: sinks that end inside and at the end of a block, and that hold the whole call."""
    return [
        (BlockWindow(150, 400, sink, 37), sink + 600),
        (BlockWindow(256, 300, sink), sink + 300),
        (BlockWindow(sink, 2 * sink, sink), 3 * sink + 5),
        (BlockWindow(100, 100, sink), max(sink - 1, 1)),
    ]


def draw_call(n: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Return q, k, v and q_sink."""
    heads = (4, 2, 2, 4)
    return tuple(draw(1, h, n, head_dim, seed=seed, dtype=dtype) for seed, h in enumerate(heads))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sink", EDGES)
def test_forward_at_every_edge_by_every_configuration(sink, head_dim) -> None:
    from swba_kernels.hopper.forward import CONFIGS

    for pattern, n in patterns(sink):
        q, k, v, q_sink = draw_call(n, head_dim)
        oracle, oracle_lse = reference.block_window_reference(
            *(x.double() for x in (q, k, v)), pattern, q_sink=q_sink.double(), return_lse=True
        )
        eager = reference.block_window_reference(q, k, v, pattern, q_sink=q_sink)
        for config in CONFIGS[head_dim]:
            out, lse = forward(q, k, v, q_sink, pattern, config=(config, False))
            assert_close(out, oracle, eager, f"{pattern} {config}")
            assert_lse_close(lse, oracle_lse)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(BlockWindow(144, 432, 100), 700, heads=6, kv_heads=2, head_dim=64), torch.bfloat16),
        (Case(BlockWindow(333, 700, 333, 20), 900, heads=3, kv_heads=3, head_dim=128), torch.float16),
    ],
    ids=str,
)
def test_forward_and_gradients_through_the_public_function(case, dtype) -> None:
    check_forward(case, dtype, "hopper", "cuda", bounded=True)
    check_backward(case, dtype, "hopper", "cuda", bounded=True)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sink", [1, 64, 129, 200])
def test_prefill_on_rings_at_every_stage(sink, head_dim) -> None:
    from swba_kernels.portable.forward import Ring

    pattern, spare = BlockWindow(150, 450, sink), 33
    total = sink + 450 + spare
    stages = [0, 1, sink - 1, sink, sink + 1, 149, total - 1, total, total + 230, 3 * total + 17]
    lanes = torch.randperm(len(stages), generator=torch.Generator("cuda").manual_seed(sink), device="cuda")
    shape = (2, len(stages) + 1, 2, total, head_dim)
    k_ring, v_ring = torch.full(shape, float("nan"), device="cuda", dtype=torch.bfloat16)
    for lane, stage in zip(lanes.tolist(), stages, strict=True):
        _, filled = reference.ring_layout(stage, total, sink)
        for seed, ring in enumerate((k_ring, v_ring)):
            if filled:
                ring[lane, :, filled] = draw(1, 2, len(filled), head_dim, seed=lane + 50 * seed)[0]
    position = torch.tensor(stages, device="cuda")
    for n in (40, 150, 500):
        q, q_sink = (draw(len(stages), 4, n, head_dim, seed=seed) for seed in (1, 2))
        k, v = (draw(len(stages), 2, n, head_dim, seed=seed) for seed in (3, 4))
        out, lse = forward(q, k, v, q_sink, pattern, ring=Ring(k_ring, v_ring, position, lanes))
        oracle, oracle_lse = reference.prefill_reference(
            q.double(), k.double(), v.double(), pattern, k_ring.double(), v_ring.double(), position,
            lanes=lanes, q_sink=q_sink.double(), return_lse=True,
        )  # fmt: skip
        eager = reference.prefill_reference(q, k, v, pattern, k_ring, v_ring, position, lanes=lanes, q_sink=q_sink)
        assert_close(out, oracle, eager)
        assert_lse_close(lse, oracle_lse)


def test_prefill_through_the_public_function() -> None:
    for seed, pattern in enumerate((BlockWindow(129, 700, 10), BlockWindow(60, 100, 64), BlockWindow(300, 300, 128))):
        for head_dim in (64, 128):
            case = Case(pattern, 310, 4, 2, head_dim)
            check_prefill(case, torch.bfloat16, "hopper", "cuda", seed, spare=seed, bounded=True)


def gradients(inputs: tuple[Tensor, ...], dout: Tensor, pattern: BlockWindow, mode: str) -> tuple[Tensor, ...]:
    """Return dq, dk, dv and dq_sink."""
    from swba_kernels.hopper.backward import FAST, IN_TURN, SPLIT, backward

    q, k, v, q_sink = inputs
    out, lse = forward(*inputs, pattern)
    tables = {"split": SPLIT, "in turn": IN_TURN, "fastest": FAST}
    config = tables[mode][q.shape[-1]]
    options = {"scale": q.shape[-1] ** -0.5, "q_sink": q_sink, "config": config}
    return backward(dout, q, k, v, out, lse, **options, **sizes(pattern))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sink", EDGES)
def test_gradients_at_every_edge(sink, head_dim) -> None:
    for pattern, n in patterns(sink):
        inputs = draw_call(n, head_dim)
        dout = draw(1, 4, n, head_dim, seed=9)

        def by_autograd(dtype: torch.dtype, inputs=inputs, dout=dout, pattern=pattern) -> tuple[Tensor, ...]:
            leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
            out = reference.block_window_reference(*leaves[:3], pattern, q_sink=leaves[3])
            return torch.autograd.grad(out, leaves, dout.to(dtype))

        q, k, v, q_sink = inputs
        of_q, of_k, of_q_sink = cancellation(q, k, v, dout, pattern, head_dim**-0.5, q_sink)
        floors = (of_q, of_k, None, of_q_sink)
        oracle, eager = by_autograd(torch.float64), by_autograd(torch.bfloat16)
        for mode in MODES:
            actual = gradients(inputs, dout, pattern, mode)
            for name, *numbers in zip(("dq", "dk", "dv", "dq_sink"), actual, oracle, eager, floors, strict=True):
                assert_close(*numbers[:3], f"{name} {pattern} N{n} {mode}", numbers[3])


@pytest.mark.parametrize("mode", MODES[:-1])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_results_repeat_bit_for_bit(head_dim, mode) -> None:
    pattern = BlockWindow(333, 999, 70, 20)
    inputs, dout = draw_call(3000, head_dim), draw(1, 4, 3000, head_dim, seed=9)
    first = (*forward(*inputs, pattern), *gradients(inputs, dout, pattern, mode))
    for _ in range(20):
        again = (*forward(*inputs, pattern), *gradients(inputs, dout, pattern, mode))
        assert all(map(torch.equal, again, first))


@pytest.mark.parametrize("mode", MODES)
def test_nan_of_hidden_tokens_reaches_nobody(mode) -> None:
    """Sinks, blocks and window are multiples of the tiles here: what shares a tile shares its NaN (0 x NaN)."""
    pattern, n, token = BlockWindow(256, 512, 128), 1500, 700
    mask = pattern.mask(n, "cuda")
    lost_queries = mask[:, token].clone()
    lost_keys = mask[lost_queries].any(0)
    dout = draw(1, 4, n, 128, seed=9)
    results = []
    for value in (0.0, float("nan")):
        inputs = draw_call(n, 128)
        for x in inputs:
            x[:, :, token] = value
        out, lse = forward(*inputs, pattern)
        dq, dk, dv, dq_sink = gradients(inputs, dout, pattern, mode)
        of_queries = (x[:, :, ~lost_queries] for x in (out, lse, dq, dq_sink))
        results.append((*of_queries, *(x[:, :, ~lost_keys] for x in (dk, dv))))
    assert lost_keys.any()
    assert not lost_keys.all()
    for a, b in zip(*results, strict=True):
        assert torch.isfinite(b).all()
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_equal_queries_give_what_one_query_gives() -> None:
    pattern = BlockWindow(200, 500, 130)
    q, k, v, _ = draw_call(1500, 128)
    dout = draw(1, 4, 1500, 128, seed=9)
    from swba_kernels.hopper.backward import backward
    from swba_kernels.hopper.forward import forward as plain

    out, lse = plain(q, k, v, scale=0.1, **sizes(pattern))
    dq, dk, dv, none = backward(dout, q, k, v, out, lse, scale=0.1, **sizes(pattern))
    assert none is None
    second, second_lse = plain(q, k, v, scale=0.1, q_sink=q, **sizes(pattern))
    actual = backward(dout, q, k, v, second, second_lse, scale=0.1, q_sink=q, **sizes(pattern))
    pairs = ((second, out), (second_lse, lse), (actual[0] + actual[3], dq), (actual[1], dk), (actual[2], dv))
    for a, e in pairs:
        torch.testing.assert_close(a, e, atol=2e-2, rtol=2e-2)
