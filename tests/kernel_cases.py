"""Problems for the attention functions, and the checks of their results against the float64 reference.

B rows of the call, L ring lanes, H query heads, Hkv key/value heads, N new tokens, S ring slots, D head dim.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from tolerance import assert_close, assert_lse_close, cancellation
from torch import Tensor

import swba_kernels
from swba_kernels import BlockWindow, reference


class Case(NamedTuple):
    """A pattern and the sizes of a call."""

    pattern: BlockWindow
    n: int
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 16
    batch: int = 2

    def __str__(self) -> str:
        p = self.pattern
        sizes = f"bs{p.block_size}-w{p.window}-s{p.sink}-f{p.first_block}-N{self.n}"
        return f"{sizes}-H{self.heads}-{self.kv_heads}-D{self.head_dim}-B{self.batch}"


SMALL = [
    Case(BlockWindow(1, 3), 5),
    Case(BlockWindow(4, 12), 23),
    Case(BlockWindow(7, 9, 3), 40, heads=6, kv_heads=2, head_dim=8),
    Case(BlockWindow(5, 13, 4, 2), 31, heads=4, kv_heads=1, head_dim=24),
    Case(BlockWindow(16, 50, 70), 100, heads=1, kv_heads=1, head_dim=64, batch=1),
    Case(BlockWindow(9, 9, 1, 9), 27, head_dim=40),
    Case(BlockWindow(64, 64, 0, 1), 33, batch=1),
]


SINKS = [case for case in SMALL if case.pattern.sink]


def qkv(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k, v [B, H, N, D] as views of [B, N, H, D] tensors, as models make them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        x = torch.randn(case.batch, case.n, heads, case.head_dim, generator=generator)
        return x.to(device, dtype).transpose(1, 2)

    return draw(case.heads), draw(case.kv_heads), draw(case.kv_heads)


def second_query(q: Tensor, sink: int, seed: int = 0) -> Tensor | None:
    """Draw a q_sink [B, H, N, D] for a pattern that has sinks, in a layout of its own."""
    if sink == 0:
        return None
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(seed + 99)).to(q.device, q.dtype)


class RingCase(NamedTuple):
    """New tokens on top of ring histories: q, k, v, the rings (NaN where nothing may be read) and the row numbers."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_ring: Tensor
    v_ring: Tensor
    position: Tensor
    lanes: Tensor

    def to(self, dtype: torch.dtype) -> RingCase:
        return RingCase(*(x.to(dtype) if x.is_floating_point() else x for x in self))


def ring_case(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0, spare: int = 0) -> RingCase:
    """Draw new tokens on histories of random lengths, in random lanes of rings with `spare` slots beyond the window."""
    rng = random.Random(seed)
    q, k, v = qkv(case, dtype, device, seed)
    lanes = case.batch + 2
    slots = case.pattern.sink + case.pattern.window + spare
    shape = (lanes, case.kv_heads, slots, case.head_dim)
    rings = [torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(2)]
    order = rng.sample(range(lanes), case.batch)
    starts = [rng.choice([0, rng.randrange(1, 4), rng.randrange(3 * slots)]) for _ in order]
    generator = torch.Generator().manual_seed(seed + 1)
    for lane, start in zip(order, starts, strict=True):
        _, filled = reference.ring_layout(start, slots, case.pattern.sink)
        for ring in rings:
            rows = torch.randn(case.kv_heads, len(filled), case.head_dim, generator=generator)
            ring[lane, :, filled] = rows.to(device, dtype)
    position, index = (torch.tensor(x, dtype=torch.int64, device=device) for x in (starts, order))
    return RingCase(q, k, v, *rings, position, index)


def check_forward(case: Case, dtype: torch.dtype, impl: str, device: str = "cpu", bounded: bool = False) -> None:
    """Compare out and lse of the whole-sequence call with the reference; with a q_sink if `bounded`."""
    q, k, v = qkv(case, dtype, device)
    q_sink = second_query(q, case.pattern.sink) if bounded else None
    out, lse = swba_kernels.block_window_attention(q, k, v, case.pattern, q_sink=q_sink, return_lse=True, impl=impl)

    def oracle(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        tensors = (x.to(kind) for x in (q, k, v))
        second = None if q_sink is None else q_sink.to(kind)
        return reference.block_window_reference(*tensors, case.pattern, q_sink=second, return_lse=True)

    expected, expected_lse = oracle(torch.float64)
    assert_close(out, expected, oracle(dtype)[0])
    assert_lse_close(lse, expected_lse)


def check_backward(case: Case, dtype: torch.dtype, impl: str, device: str = "cpu", bounded: bool = False) -> None:
    """Compare dq, dk and dv, and if `bounded` dq_sink, with the gradients of the reference."""
    inputs = qkv(case, dtype, device)
    q_sink = second_query(inputs[0], case.pattern.sink) if bounded else None
    if q_sink is not None:
        inputs = (*inputs, q_sink)
    dout = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9)).to(device, dtype)

    def gradients(function, tensors, seed):
        tensors = [x.detach().requires_grad_() for x in tensors]
        q, k, v, *second = tensors
        options = {"q_sink": second[0]} if second else {}
        return torch.autograd.grad(function(q, k, v, case.pattern, **options), tensors, seed)

    def fast(*args, **options):
        return swba_kernels.block_window_attention(*args, impl=impl, **options)

    actual = gradients(fast, inputs, dout)
    oracle = gradients(reference.block_window_reference, [x.double() for x in inputs], dout.double())
    eager = gradients(reference.block_window_reference, inputs, dout)
    of_q, of_k, *of_q_sink = cancellation(*inputs[:3], dout, case.pattern, case.head_dim**-0.5, q_sink)
    floors, names = (of_q, of_k, None, *of_q_sink), ("dq", "dk", "dv", "dq_sink")[: len(inputs)]
    for name, a, o, e, floor in zip(names, actual, oracle, eager, floors, strict=True):
        assert_close(a, o, e, name, floor)


def check_prefill(
    case: Case,
    dtype: torch.dtype,
    impl: str,
    device: str = "cpu",
    seed: int = 0,
    spare: int = 0,
    bounded: bool = False,
    fused: bool = False,
) -> None:
    """Compare a prefill on top of histories, whose unwritten slots and neighbouring lanes are NaN."""
    rows = ring_case(case, dtype, device, seed, spare)
    *args, lanes = rows
    q_sink = second_query(rows.q, case.pattern.sink, seed) if bounded else None

    def call(function, arguments, **options):
        q, k, v, k_ring, v_ring, position = arguments
        second = None if q_sink is None else q_sink.to(q.dtype)
        return function(q, k, v, case.pattern, k_ring, v_ring, position, lanes=lanes, q_sink=second, **options)

    out, lse = call(swba_kernels.prefill_attention, args, return_lse=True, impl=impl)
    oracle, oracle_lse = call(reference.prefill_reference, rows.to(torch.float64)[:-1], return_lse=True)
    assert_close(out, oracle, call(reference.prefill_reference, args), floor=_rescaling(oracle) if fused else None)
    assert_lse_close(lse, oracle_lse)


def decode_case(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
    """Return q, rings, valid and lanes; slots past valid and lanes that no row reads are NaN."""
    rows = ring_case(case._replace(n=min(case.n, case.pattern.block_size)), dtype, device, seed)
    slots = rows.k_ring.shape[2]
    rng = random.Random(seed + 7)
    valid = [rng.choice([1, rng.randrange(1, slots + 1), slots]) for _ in range(case.batch)]
    for ring in (rows.k_ring, rows.v_ring):
        ring.fill_(float("nan"))
        for lane, n in zip(rows.lanes.tolist(), valid, strict=True):
            noise = torch.randn(case.kv_heads, n, case.head_dim, generator=torch.Generator().manual_seed(seed + lane))
            ring[lane, :, :n] = noise.to(device, dtype)
    return rows.q, rows.k_ring, rows.v_ring, torch.tensor(valid, device=device), rows.lanes


def _rescaling(out: Tensor) -> Tensor:
    """Return what torch's fused kernels on a GPU may add to eager attention's error in float32.

    They rescale a running sum and divide at the end, where eager attention rounds once: two roundings more.
    """
    return out.abs() * torch.finfo(torch.float32).eps


def check_decode(
    case: Case,
    dtype: torch.dtype,
    decode,
    device: str = "cpu",
    seed: int = 0,
    bounded: bool = False,
    fused: bool = False,
) -> None:
    """Compare `decode(q, k_ring, v_ring, valid, lanes) -> (out, lse)` with the reference.

    If `bounded`, `decode` also gets the keywords q_sink and sink. `fused`: it is a kernel of torch's, see `_rescaling`.
    """
    q, k_ring, v_ring, valid, lanes = decode_case(case, dtype, device, seed)
    q_sink = second_query(q, case.pattern.sink, seed) if bounded else None
    options = {} if q_sink is None else {"q_sink": q_sink, "sink": case.pattern.sink}
    out, lse = decode(q, k_ring, v_ring, valid, lanes, **options)

    def oracle(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        tensors = (x.to(kind) for x in (q, k_ring, v_ring))
        second = {} if q_sink is None else options | {"q_sink": q_sink.to(kind)}
        return reference.decode_reference(*tensors, valid, lanes=lanes, return_lse=True, **second)

    expected, expected_lse = oracle(torch.float64)
    assert_close(out, expected, oracle(dtype)[0], floor=_rescaling(expected) if fused else None)
    assert_lse_close(lse, expected_lse)


def check_ring_write(case: Case, dtype: torch.dtype, write, device: str = "cpu", seed: int = 0) -> None:
    """Compare `write(k_ring, v_ring, k, v, position, lanes, sink)` with writing token after token, bit for bit."""
    rows = ring_case(case, dtype, device, seed)
    sink = case.pattern.sink
    actual = [x.clone() for x in (rows.k_ring, rows.v_ring)]
    expected = [x.clone() for x in (rows.k_ring, rows.v_ring)]
    write(*actual, rows.k, rows.v, rows.position, rows.lanes, sink)
    reference.ring_write_reference(*expected, rows.k, rows.v, rows.position, sink=sink, lanes=rows.lanes)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)
