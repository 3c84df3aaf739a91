"""The ring decode of Hopper on a GPU: every configuration against the float64 reference, and its promises."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tolerance import assert_close, assert_lse_close
from torch import Tensor

import swba_kernels
from swba_kernels import reference

pytest.importorskip("triton")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")]

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poison(monkeypatch) -> None:
    """Fill what the module allocates with NaN: results and workspaces."""

    def poisoned(function):
        def allocate(*args, **options):
            x = function(*args, **options)
            with torch.no_grad():
                return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocate

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


class Problem(NamedTuple):
    """Sizes of a decode call: B rows that read some of L lanes."""

    heads: int
    kv_heads: int
    n: int
    slots: int
    head_dim: int = 64
    rows: int = 1
    lanes: int = 1

    def __str__(self) -> str:
        return "H{}-{}-N{}-S{}-D{}-B{}of{}".format(*self)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor
    lanes: Tensor | None


def draw(problem: Problem, dtype: torch.dtype, valid: list[int], seed: int = 0) -> Inputs:
    """Return views of [B, N, H, D] and [L, S, Hkv, D] tensors; slots past `valid` and unread lanes hold NaN."""
    generator = torch.Generator("cuda").manual_seed(seed)
    heads, kv_heads, n, slots, d, rows, lanes = problem
    q = torch.randn(rows, n, heads, d, generator=generator, device="cuda").to(dtype).transpose(1, 2)
    order = torch.randperm(lanes, generator=generator, device="cuda")[:rows]
    rings = []
    for _ in range(2):
        ring = torch.full((lanes, slots, kv_heads, d), float("nan"), device="cuda", dtype=dtype)
        for lane, filled in zip(order.tolist(), valid, strict=True):
            ring[lane, :filled] = torch.randn(filled, kv_heads, d, generator=generator, device="cuda").to(dtype)
        rings.append(ring.transpose(1, 2))
    return Inputs(q, *rings, torch.tensor(valid, device="cuda"), order)


def decode(inputs: Inputs, plan=None, scale: float | None = None) -> tuple[Tensor, Tensor]:
    from swba_kernels.hopper.decode import decode

    return decode(*inputs, scale=inputs.q.shape[-1] ** -0.5 if scale is None else scale, plan=plan)


def plans(problem: Problem, config=None) -> list:
    """Return every plan that would be compared for a problem, or those of one configuration."""
    from swba_kernels.hopper.decode_plan import CONFIGS, lane_plans
    from swba_kernels.hopper.launch import multiprocessors

    sms = multiprocessors(torch.device("cuda", 0))
    configs = [config] if config else CONFIGS[problem.head_dim]
    return [x for c in configs for x in lane_plans(c, problem.heads, problem.n, problem.slots, problem.lanes, sms)]


def check(inputs: Inputs, plan=None, scale: float | None = None) -> None:
    out, lse = decode(inputs, plan, scale)
    options = {"lanes": inputs.lanes, "sm_scale": scale}
    double = (x.double() for x in inputs[:3])
    oracle, oracle_lse = reference.decode_reference(*double, inputs.valid, return_lse=True, **options)
    layout = torch.empty_like(inputs.q).stride()
    assert all(a == b for n, a, b in zip(out.shape, out.stride(), layout, strict=True) if n > 1)
    assert_close(out, oracle, reference.decode_reference(*inputs[:4], **options))
    assert_lse_close(lse, oracle_lse)


SMALL = [Problem(2, 1, 100, 300, d, 2, 3) for d in (64, 128)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", SMALL, ids=str)
def test_small_problems_by_every_plan(problem, dtype) -> None:
    inputs = draw(problem, dtype, [300, 131])
    for plan in plans(problem):
        check(inputs, plan)


ODD = [
    Problem(3, 3, 1, 5),
    Problem(6, 2, 7, 777, 128, 2, 3),
    Problem(16, 16, 64, 2048),
    Problem(4, 1, 144, 4608, 64, 3, 3),
    Problem(12, 12, 256, 4096),
    Problem(5, 5, 333, 3330, 128),
    Problem(2, 2, 1560, 9000, 128, 1, 2),
    Problem(40, 8, 65, 1300, 128),
    Problem(7, 7, 880, 2500, 64, 2, 2),
    Problem(16, 16, 256, 1024, 64, 8, 8),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", ODD, ids=str)
def test_the_chosen_plan_equals_the_reference(problem, dtype) -> None:
    for seed in range(2):
        valid = [problem.slots, 1 + problem.slots // 3, 2 * problem.slots // 3, 1, 128, 129, 255, 700, 5]
        check(draw(problem, dtype, [min(x, problem.slots) for x in valid[seed : seed + problem.rows]], seed))


@pytest.mark.parametrize("problem", [Problem(3, 3, 200, 1111, d) for d in (64, 128)], ids=str)
def test_every_plan_at_every_tile_edge(problem) -> None:
    edges = {x + y for x in range(0, 1200, 64) for y in (-1, 0, 1)}
    for valid in sorted(x for x in edges if 1 <= x <= problem.slots):
        inputs = draw(problem, torch.bfloat16, [valid], valid)
        for plan in plans(problem):
            check(inputs, plan)


def large(x: Inputs) -> Inputs:
    return x._replace(q=x.q * 30)


def dominant(x: Inputs) -> Inputs:
    x.k[:, :, 5] = 20 * x.q[:, :, :1].mean(2).sign()
    return x


def equal(x: Inputs) -> Inputs:
    return x._replace(k=torch.zeros_like(x.k))


def ramp(x: Inputs, sign: int) -> Inputs:
    """Let each score beat all before it by far, or be beaten: the accumulator is rescaled at every tile, or never."""
    slope = torch.linspace(0, sign * 40, x.k.shape[2], device="cuda")[:, None]
    return x._replace(q=torch.ones_like(x.q), k=(torch.zeros_like(x.k) + slope).to(x.k.dtype))


def some_rows_rise(x: Inputs) -> Inputs:
    """Let the scores of one row in three beat all before them: rows of a warp go apart."""
    x = ramp(x, 1)
    return x._replace(q=x.q * (torch.arange(x.q.shape[2], device="cuda") % 3 == 0)[:, None])


def later(x: Inputs) -> Inputs:
    """Let what a thread's tiles add up to be up to 12 powers of two above the first one: just not raised."""
    position = torch.arange(x.k.shape[2], device="cuda")[:, None]
    k = torch.where(position % 512 >= 192, 4.5 * x.k.shape[3] ** -0.5, 0.0)
    return x._replace(q=torch.ones_like(x.q), k=k.to(x.k.dtype).expand_as(x.k).contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "change", [large, dominant, equal, lambda x: ramp(x, 1), lambda x: ramp(x, -1), some_rows_rise, later],
    ids=["large", "dominant", "equal", "rising", "falling", "some_rows_rise", "later"],
)  # fmt: skip
def test_adversarial_inputs(change, head_dim, dtype) -> None:
    problem = Problem(2, 2, 300, 1500, head_dim)
    inputs = change(draw(problem, dtype, [1500]))
    for plan in plans(problem):
        check(inputs, plan)


@pytest.mark.parametrize("scale", [-0.1, 0.0, 1e-6, 3.0])
def test_any_scale(scale) -> None:
    check(draw(Problem(2, 2, 100, 600, 64), torch.bfloat16, [599]), scale=scale)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_repeats_are_bitwise_equal(head_dim) -> None:
    for problem in (Problem(12, 12, 256, 4096, head_dim), Problem(4, 4, 700, 5000, head_dim, 2, 2)):
        inputs = draw(problem, torch.bfloat16, [4000, 3001][: problem.rows])
        for plan in plans(problem):
            first = decode(inputs, plan)
            for _ in range(20):
                assert all(torch.equal(a, b) for a, b in zip(first, decode(inputs, plan), strict=True))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("n", [48, 256, 1000])
def test_a_lane_is_bitwise_the_same_whatever_the_others_do(n, head_dim) -> None:
    problem = Problem(6, 6, n, 3000, head_dim, 4, 4)
    inputs = draw(problem, torch.bfloat16, [3000, 1, 1234, 2999])
    together = decode(inputs)
    for b in range(4):
        one = slice(b, b + 1)
        alone = decode(inputs._replace(q=inputs.q[one], valid=inputs.valid[one], lanes=inputs.lanes[one]))
        assert all(torch.equal(x, y[one]) for x, y in zip(alone, together, strict=True))
    order = torch.argsort(inputs.lanes)
    q, valid = inputs.q[order].transpose(1, 2).contiguous().transpose(1, 2), inputs.valid[order]
    unnamed = decode(Inputs(q, inputs.k, inputs.v, valid, None))
    assert all(torch.equal(x, y[order]) for x, y in zip(unnamed, together, strict=True))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_query_is_bitwise_the_same_whatever_its_neighbours_are(head_dim) -> None:
    problem = Problem(2, 2, 200, 3000, head_dim)
    inputs = draw(problem, torch.bfloat16, [2999])
    changed = inputs.q.clone()
    changed[:, :, 1::4] *= 100
    changed[:, :, 3::4] = float("nan")
    for plan in plans(problem):
        one, other = decode(inputs, plan), decode(inputs._replace(q=changed), plan)
        assert all(torch.equal(a[:, :, ::2], b[:, :, ::2]) for a, b in zip(one, other, strict=True))


def test_layouts_of_every_kind() -> None:
    problem = Problem(8, 2, 130, 900, 64, 2, 2)
    inputs = draw(problem, torch.bfloat16, [900, 333])
    expected = decode(inputs)
    wide = torch.zeros(2, 130, 8, 192, device="cuda", dtype=torch.bfloat16).transpose(1, 2)[..., 64:128]
    sliced = torch.zeros(5, 2, 2000, 64, device="cuda", dtype=torch.bfloat16)
    variants = [inputs._replace(q=inputs.q.contiguous()), inputs._replace(q=wide.copy_(inputs.q))]
    variants.append(inputs._replace(k=sliced[1:3, :, 50:950].copy_(inputs.k), v=inputs.v.contiguous()))
    valid = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
    valid[:, 1] = inputs.valid
    variants.append(inputs._replace(valid=valid[:, 1]))
    for variant in variants:
        out, lse = decode(variant)
        torch.testing.assert_close(out, expected[0], atol=1e-2, rtol=1e-2)
        assert_lse_close(lse, expected[1].double())
        check(variant)


@pytest.mark.parametrize(
    ("problem", "replays"),
    [
        (Problem(4, 4, 48, 500, 64, 2, 2), 10_000),
        (Problem(12, 12, 256, 4096), 1000),
        (Problem(12, 12, 900, 3600, 128), 1000),
    ],
    ids=str,
)
def test_one_graph_serves_every_filled_length(problem, replays) -> None:
    inputs = draw(problem, torch.bfloat16, [problem.slots] * problem.rows)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        decode(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = decode(inputs)
    lengths = [[1 + (i * 37 + b * 211) % problem.slots for b in range(problem.rows)] for i in range(replays)]
    filled = torch.tensor(lengths, device="cuda")
    expected = {}
    for i in range(0, replays, max(1, replays // 50)):
        inputs.valid.copy_(filled[i])
        expected[i] = [x.clone() for x in decode(inputs)]
    for i in range(replays):
        inputs.valid.copy_(filled[i])
        graph.replay()
        if i in expected:
            assert all(torch.equal(a, b) for a, b in zip(outs, expected[i], strict=True))
    assert torch.isfinite(outs[0]).all()


def test_a_first_call_inside_a_capture_says_what_is_missing() -> None:
    inputs = draw(Problem(2, 2, 77, 501), torch.bfloat16, [501])
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        decode(inputs)


def test_graphs_of_torch_compile_take_a_decode_of_new_sizes() -> None:
    inputs = draw(Problem(3, 3, 79, 507), torch.bfloat16, [507])
    compiled = torch.compile(swba_kernels.window_decode_attention, mode="reduce-overhead", fullgraph=True)
    outs = [compiled(inputs.q, inputs.k, inputs.v, inputs.valid).clone() for _ in range(4)]
    assert all(torch.equal(out, decode(inputs)[0]) for out in outs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_need_not_be_on_the_current_device() -> None:
    inputs = draw(Problem(3, 3, 79, 507), torch.bfloat16, [507])
    expected, _ = decode(inputs)
    tensors = (x.to("cuda:1") for x in (inputs.q, inputs.k, inputs.v, inputs.valid))
    assert torch.equal(swba_kernels.window_decode_attention(*tensors).to(expected.device), expected)


def test_calls_never_synchronise() -> None:
    inputs = draw(Problem(4, 4, 300, 900), torch.bfloat16, [900])
    decode(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_new_sizes_compile_no_new_kernel() -> None:
    from swba_kernels.hopper.combine import combine
    from swba_kernels.hopper.decode_persistent import decode_persistent
    from swba_kernels.hopper.decode_small import decode_small

    def compiled() -> int:
        kernels = (combine, decode_persistent, decode_small)
        return sum(len(entry[0]) for kernel in kernels for entry in kernel.device_caches.values())

    config = plans(Problem(1, 1, 1, 1, 128))[0].config
    for problem in (Problem(4, 2, 300, 4500, 128), Problem(1, 1, 128, 128, 128), Problem(2, 1, 16, 4097, 128, 2, 2)):
        before = compiled()
        for plan in plans(problem, config):
            decode(draw(problem, torch.bfloat16, [problem.slots // 2] * problem.rows), plan)
        if problem.heads < 4:
            assert compiled() == before
