"""The block of PTX that turns a tile's scores into weights, run on the CPU: a warp of 32 threads, 16 rows of scores."""

from __future__ import annotations

import re
from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton.experimental.gluon")

from triton.experimental.gluon import language as gl

from swba_kernels.hopper.softmax import LOWEST
from swba_kernels.hopper.weights import LIMIT, _pair, _weigh_asm, _weigh_constraints

LANES = np.arange(32)
DTYPES = {gl.bfloat16: torch.bfloat16, gl.float16: torch.float16}


def _packed(high: np.ndarray, low: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    halves = torch.from_numpy(np.stack([low, high], 1)).to(dtype).view(torch.int16).numpy()
    return np.ascontiguousarray(halves).view(np.int32)[:, 0]


def _number(text: str) -> np.float32:
    return np.uint32(int(text[2:], 16)).view(np.float32) if text.startswith("0f") else np.float32(text)


def _max(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmax(a, b)  # PTX, too, returns the operand that is a number


OPERATIONS: dict[str, Callable] = {
    "mov.f32": lambda a: a,
    "mov.b32": lambda a: a,
    "neg.f32": lambda a: -a,
    "add.f32": lambda a, b: a + b,
    "sub.f32": lambda a, b: a - b,
    "mul.f32": lambda a, b: a * b,
    "max.f32": _max,
    "fma.rn.f32": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "ex2.approx.ftz.f32": lambda a: np.exp2(a),
    "cvt.rn.bf16x2.f32": lambda a, b: _packed(a, b, torch.bfloat16),
    "cvt.rn.f16x2.f32": lambda a, b: _packed(a, b, torch.float16),
    "setp.gt.f32": lambda a, b: a > b,
    "or.pred": lambda a, b: a | b,
    "selp.f32": lambda a, b, p: np.where(p, a, b),
}


def run(asm: str, operands: list[np.ndarray]) -> list[np.ndarray]:
    """Run the block for a warp; `operands` [32] each, those of results are replaced. Return all of them."""
    values: dict[str, np.ndarray] = {f"${i}": x for i, x in enumerate(operands)}

    def value(name: str) -> np.ndarray:
        return values[name] if re.match(r"[$a-z]", name) else np.full(32, _number(name))

    steps = [x.strip() for x in asm.strip().removeprefix("{").removesuffix("}").split(";")]
    skip = False
    for step in steps:
        if step.startswith("KEPT:"):
            break
        if not step or step.startswith(".reg") or skip:
            continue
        name, *rest = re.split(r",?\s+", step)
        if name.startswith("vote.sync"):
            values[rest[0]] = np.full(32, getattr(value(rest[1]), name.split(".")[2])())
        elif name == "@!any":
            assert rest == ["bra.uni", "KEPT"]
            skip = not values["any"][0]
        elif name == "shfl.sync.bfly.b32":
            values[rest[0]] = value(rest[1])[LANES ^ int(rest[2])]
        else:
            with np.errstate(all="ignore"):
                values[rest[0]] = OPERATIONS[name](*(value(x) for x in rest[1:]))
    return [values[f"${i}"] for i in range(len(operands))]


def place_of(i: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (row, column) of score i of each thread: those of an accumulator of wgmma in a warp."""
    return LANES // 4 + 8 * (i // 2 % 2), i // 4 * 8 + LANES % 4 * 2 + i % 2


def weigh(scores: np.ndarray, old: np.ndarray, scale: float, dtype: gl.dtype) -> tuple[np.ndarray, ...]:
    """Return (weights [16, N], their sums, maxima and fades [16, 4]) of scores [16, N] and old maxima [16]."""
    n = scores.shape[1] // 2
    places = [place_of(i) for i in range(n)]
    nothing = np.full(32, np.nan, np.float32)
    operands = [nothing] * n + [scores[p] for p in places] + [old[p[0]] for p in places]
    results = run(_weigh_asm(n, _pair(dtype), LIMIT.value), [*operands, *[np.full(32, np.float32(scale))] * n])
    weights = np.full(scores.shape, np.nan, np.float32)
    for j in range(n // 2):  # the words are laid out [N / 16, row, 2]: as _taken_apart and as_operand take them
        c, r = j // 4 * 2 + j % 2, j // 2 % 2
        halves = torch.from_numpy(results[j].copy()).view(DTYPES[dtype]).float().numpy().reshape(32, 2)
        for e in (0, 1):
            weights[LANES // 4 + 8 * r, c * 8 + LANES % 4 * 2 + e] = halves[:, e]
    states = []
    for first in (0, 1, 4):
        state = np.full((16, 4), np.nan, np.float32)
        for r in (0, 1):
            state[LANES // 4 + 8 * r, LANES % 4] = results[n // 2 + first + 2 * r]
        states.append(state)
    return (weights, *states)


def check(scores: np.ndarray, old: np.ndarray, scale: float, dtype: gl.dtype) -> None:
    weights, sums, tops, fades = weigh(scores, old, scale, dtype)
    exact = scores.astype(np.float64) * np.float64(np.float32(scale))
    n = scores.shape[1]
    with np.errstate(over="ignore"):
        by_thread = np.exp2(exact - old[:, None].astype(np.float64)).reshape(16, n // 8, 4, 2).sum((1, 3))
    top = tops[:, 0]
    assert (tops == top[:, None]).all()
    # A row whose sums come close to the limit may go either way; the others only one.
    raised = top != old
    peak = exact.max(1)
    assert (raised | (by_thread <= LIMIT.value * 1.001).all(1)).all()
    assert (~raised | (by_thread >= LIMIT.value * 0.999).any(1)).all()
    np.testing.assert_allclose(top[raised], peak[raised], rtol=1e-6)
    expected = np.exp2(exact - top[:, None])
    assert np.isfinite(weights).all()
    assert (weights <= LIMIT.value * 1.01).all()
    slack = 2.0**-8 if dtype == gl.bfloat16 else 2.0**-10
    error = 1e-6 * np.abs(exact).max(1, initial=1, where=np.isfinite(exact))[:, None]  # the difference is rounded
    np.testing.assert_array_less(np.abs(weights - expected), expected * (slack + error) + 1e-7)
    np.testing.assert_allclose(
        sums, expected.reshape(16, n // 8, 4, 2).sum((1, 3)), rtol=1e-5 + float(error.max()), atol=1e-30
    )
    fade = np.broadcast_to(np.exp2(old.astype(float) - top)[:, None], (16, 4))
    np.testing.assert_allclose(fades, fade, rtol=1e-5, atol=1e-37)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float]:
    n = draw(st.sampled_from([64, 128]))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    spread = draw(hnp.arrays(np.float32, 16, elements=st.sampled_from([0.0, 1.0, 4.0, 20.0])))
    level = draw(st.sampled_from([0.0, -100.0, 30.0]))
    scores = (level + rng.standard_normal((16, n)) * spread[:, None]).astype(np.float32)
    scale = draw(st.sampled_from([0.0884, 1.0, 1e-30]))
    ahead = draw(hnp.arrays(np.float32, 16, elements=st.sampled_from([-3.0, 0.0, 5.0, 7.5, 12.0, 14.0, 100.0, 400.0])))
    peak = (scores * np.float32(scale)).max(1)
    old = np.where(draw(hnp.arrays(np.bool_, 16)), peak - ahead, np.float32(LOWEST.value)).astype(np.float32)
    hidden = rng.random((16, n)) < draw(hnp.arrays(np.float32, 16, elements=st.sampled_from([0.0, 0.5, 1.0])))[:, None]
    return np.where(hidden, np.float32("-inf"), scores), old, scale


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(list(DTYPES)))
def test_weights_sums_and_maxima(problem: tuple[np.ndarray, np.ndarray, float], dtype: gl.dtype) -> None:
    check(*problem, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_rows_over_the_limit_are_raised_though_the_whole_warp_weighs_again(dtype: gl.dtype) -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((16, 128)).astype(np.float32)
    old = scores.max(1) - np.where(np.arange(16) == 5, 30, 3).astype(np.float32)
    _, _, tops, fades = weigh(scores, old, 1.0, dtype)
    assert (tops[:, 0] != old).nonzero()[0].tolist() == [5]
    assert (fades[:5] == 1).all()
    assert fades[5, 0] == pytest.approx(2.0**-30, rel=1e-5)


@pytest.mark.parametrize("row", range(16))
def test_one_key_anywhere_raises_its_row_for_all_its_threads(row: int) -> None:
    for column in range(0, 64, 5):
        scores = np.zeros((16, 64), np.float32)
        scores[row, column] = 13.0  # 2 to that is more than the limit, which a thread's 16 keys at 1 are far below
        _, _, tops, _ = weigh(scores, np.zeros(16, np.float32), 1.0, gl.bfloat16)
        assert (tops[row] == 13).all()
        assert (np.delete(tops, row, 0) == 0).all()


def test_a_score_that_is_no_number_spoils_its_row_alone() -> None:
    scores = np.zeros((16, 64), np.float32)
    scores[3, 9] = np.nan
    scores[3, 8] = 1000.0  # which would raise the row
    scores[12, 40] = np.inf
    weights, sums, tops, fades = weigh(scores, np.zeros(16, np.float32), 1.0, gl.float16)
    assert np.isnan(weights[3, 9])
    assert np.isnan(sums[3]).any()
    assert np.isnan(weights[12, 40])
    others = np.delete(np.arange(16), [3, 12])
    assert (weights[others] == 1).all()
    assert (tops[others] == 0).all()
    assert (fades[others] == 1).all()


@pytest.mark.parametrize("n", [32, 64])
def test_results_have_registers_of_their_own(n: int) -> None:
    """Some are written before the last input is read."""
    constraints = _weigh_constraints(n).split(",")
    assert constraints == ["=&r"] * n + ["f"] * 3 * n
