"""The custom ops: schemas, fakes and gradients. Implementations are imported when an op first runs.

B rows of the call, L ring lanes, H query heads, Hkv key/value heads, N new tokens, S ring slots, D head dim.

Sizes are SymInt, so that torch.compile can leave them dynamic. `impl` names the implementation, already resolved:
"hopper", "triton" or "sdpa". "hopper-or-triton" leaves to each call, as it runs, which of the two suits its tensors and
sizes; both save the same log-sum-exp, so a backward may run on the other one. `need_lse=False` lets an implementation
that would have to compute the log-sum-exp apart leave it out: `lse` is then [B, H, 0]. `q_sink`, if given, takes the
place of q in the scores of keys (slots) below `sink`; without it the backward's fourth result has no elements.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from .choice import HOPPER_OR_TRITON

_LOG = logging.getLogger("swba_kernels")
_HOPPER = ("hopper", HOPPER_OR_TRITON)
_TRITON = ("triton", HOPPER_OR_TRITON)
_PATTERN = "float scale, SymInt block_size, SymInt window, SymInt sink, SymInt grid_start"
_LIBRARY = torch.library.Library("swba", "DEF")
_LIBRARY.define(
    f"forward(Tensor q, Tensor k, Tensor v, Tensor? q_sink, {_PATTERN}, str impl, bool need_lse, bool deterministic) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? q_sink, Tensor out, Tensor lse, "
    f"{_PATTERN}, str impl, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "prefill(Tensor q, Tensor k, Tensor v, Tensor? q_sink, Tensor k_ring, Tensor v_ring, Tensor position, "
    f"Tensor? lanes, {_PATTERN}, str impl, bool need_lse) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "decode(Tensor q, Tensor k_ring, Tensor v_ring, Tensor? q_sink, Tensor valid, Tensor? lanes, SymInt sink, "
    "float scale, str impl, bool need_lse) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "ring_write(Tensor(a!) k_ring, Tensor(b!) v_ring, Tensor k, Tensor v, Tensor position, Tensor? lanes, "
    "SymInt sink, str impl) -> ()"
)


def _dense(x: Tensor) -> Tensor:
    """Return x with adjacent elements in its rows, the only layout rule of the implementations."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else _dense(x)


def _pattern(block_size: int, window: int, sink: int, grid_start: int) -> dict[str, Any]:
    return {"block_size": block_size, "window": window, "sink": sink, "grid_start": grid_start}


def _on_hopper(impl: str, op: str, block_size: int, q: Tensor, *others: Tensor | None) -> bool:
    """Tell whether this call runs the Hopper kernels; "hopper" asked for by name runs them or raises."""
    if impl not in _HOPPER:
        return False
    from .hopper import supports

    obstacle = supports.obstacle(q, *(x for x in others if x is not None))
    if impl == "hopper":
        if obstacle:
            raise ValueError(f"impl: expected an implementation that can run here, got 'hopper' for {op}: {obstacle}")
        return True
    obstacle = obstacle or supports.small_block(op, q.shape[3], min(block_size, q.shape[2]))
    if obstacle:
        _log_once(op, obstacle)
    return not obstacle


def _kind_of_backward(impl: str, q: Tensor, k: Tensor, deterministic: bool) -> str:
    if impl not in _HOPPER:
        return "backward"
    from .hopper import supports

    return supports.kind_of_backward(q, k, deterministic)


@lru_cache(1024)
def _log_once(op: str, obstacle: str) -> None:
    _LOG.debug("%s: triton (Hopper kernels do not serve this call: %s)", op, obstacle)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None,
    scale: float, block_size: int, window: int, sink: int, grid_start: int,
    impl: str, need_lse: bool, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v, q_sink = _dense(q), _dense(k), _dense(v), _dense_or_none(q_sink)
    pattern = _pattern(block_size, window, sink, grid_start)
    from .hopper import supports

    kind = supports.kind_of_forward(q.shape[2], window, sink, q_sink)
    if _on_hopper(impl, kind, block_size, q, k, v, q_sink):
        from .hopper.forward import forward

        return forward(q, k, v, q_sink=q_sink, scale=scale, **pattern)
    if impl in _TRITON:
        from .portable.forward import forward

        return forward(q, k, v, q_sink=q_sink, scale=scale, **pattern)
    from . import sdpa

    return sdpa.forward(q, k, v, q_sink=q_sink, scale=scale, need_lse=need_lse, **pattern)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None, out: Tensor, lse: Tensor,
    scale: float, block_size: int, window: int, sink: int, grid_start: int, impl: str, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dout, q, k, v, q_sink = _dense(dout), _dense(q), _dense(k), _dense(v), _dense_or_none(q_sink)
    pattern = _pattern(block_size, window, sink, grid_start)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    if _on_hopper(impl, _kind_of_backward(impl, q, k, deterministic), block_size, q, k, v, q_sink):
        from .hopper.backward import backward

        gradients = backward(
            dout, q, k, v, out, lse, q_sink=q_sink, scale=scale, deterministic=deterministic, **pattern
        )
    elif impl in _TRITON:
        from .portable.backward import backward

        gradients = backward(dout, q, k, v, out, lse, q_sink=q_sink, scale=scale, **pattern)
    else:
        from . import sdpa

        gradients = sdpa.backward(dout, q, k, v, out, lse, q_sink=q_sink, scale=scale, **pattern)
    dq, dk, dv, dq_sink = gradients
    return dq, dk, dv, q.new_empty(0) if dq_sink is None else dq_sink


def _prefill(
    q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None,
    k_ring: Tensor, v_ring: Tensor, position: Tensor, lanes: Tensor | None,
    scale: float, block_size: int, window: int, sink: int, grid_start: int, impl: str, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v, q_sink = _dense(q), _dense(k), _dense(v), _dense_or_none(q_sink)
    pattern = _pattern(block_size, window, sink, grid_start)
    if _on_hopper(impl, "prefill", block_size, q, k, v, q_sink, k_ring, v_ring):
        from .hopper.forward import forward
        from .portable.forward import Ring

        return forward(q, k, v, q_sink=q_sink, scale=scale, ring=Ring(k_ring, v_ring, position, lanes), **pattern)
    if impl in _TRITON:
        from .portable.forward import Ring, forward

        return forward(q, k, v, q_sink=q_sink, scale=scale, ring=Ring(k_ring, v_ring, position, lanes), **pattern)
    from . import sdpa

    return sdpa.prefill(
        q, k, v, k_ring, v_ring, position, lanes, q_sink=q_sink, scale=scale, need_lse=need_lse, **pattern
    )


def _decode(
    q: Tensor, k_ring: Tensor, v_ring: Tensor, q_sink: Tensor | None, valid: Tensor, lanes: Tensor | None,
    sink: int, scale: float, impl: str, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, q_sink = _dense(q), _dense_or_none(q_sink)
    if _on_hopper(impl, "decode", q.shape[2], q, k_ring, v_ring, q_sink):
        from .hopper.decode import decode

        return decode(q, k_ring, v_ring, valid, lanes, q_sink=q_sink, sink=sink, scale=scale)
    if impl in _TRITON:
        from .portable.decode import decode

        return decode(q, k_ring, v_ring, valid, lanes, q_sink=q_sink, sink=sink, scale=scale)
    from . import sdpa

    return sdpa.decode(q, k_ring, v_ring, valid, lanes, q_sink=q_sink, sink=sink, scale=scale, need_lse=need_lse)


def _ring_write(
    k_ring: Tensor, v_ring: Tensor, k: Tensor, v: Tensor, position: Tensor, lanes: Tensor | None, sink: int, impl: str
) -> None:
    if impl == "triton":
        from .portable.ring import ring_write
    else:
        from .sdpa import ring_write
    ring_write(k_ring, v_ring, k, v, position, lanes, sink=sink)


def _fake_out(q: Tensor, impl: str, need_lse: bool) -> tuple[Tensor, Tensor]:
    q = _dense(q)
    rows = q.shape[2] if need_lse or impl in (*_HOPPER, "triton") else 0
    return torch.empty_like(q), q.new_empty((q.shape[0], q.shape[1], rows), dtype=torch.float32)


def _forward_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, impl, need_lse, _ = rest
    return _fake_out(q, impl, need_lse)


def _backward_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq_sink = q.new_empty(0) if q_sink is None else torch.empty_like(_dense(q_sink))
    return torch.empty_like(_dense(q)), torch.empty_like(_dense(k)), torch.empty_like(_dense(v)), dq_sink


def _attention_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, impl, need_lse = rest
    return _fake_out(q, impl, need_lse)


def _ring_write_fake(*args: Any) -> None:
    return None


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, q_sink, scale, *pattern, impl, _, deterministic = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, q_sink, out, lse)
    ctx.scale, ctx.pattern, ctx.how = scale, pattern, (impl, deterministic)


def _gradients(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dq, dk, dv, dq_sink = torch.ops.swba.backward(dout, *saved, ctx.scale, *ctx.pattern, *ctx.how)
    return dq, dk, dv, None if saved[3] is None else dq_sink, *[None] * 8


def _refuse_second_gradients(*args: Any) -> None:
    raise RuntimeError("block_window_attention: expected to be differentiated once, got a gradient of its gradients")


def _on_its_device(body: Callable[..., Any]) -> Callable[..., Any]:
    """Make the device of the first tensor the current one, on which Triton launches; nobody else does for Python."""

    @wraps(body)
    def run(x: Tensor, *rest: Any) -> Any:
        with torch.cuda.device(x.device):
            return body(x, *rest)

    return run


for _name, _body, _fake in (
    ("forward", _forward, _forward_fake),
    ("backward", _backward, _backward_fake),
    ("prefill", _prefill, _attention_fake),
    ("decode", _decode, _attention_fake),
    ("ring_write", _ring_write, _ring_write_fake),
):
    _LIBRARY.impl(_name, _body, "CPU")
    _LIBRARY.impl(_name, _on_its_device(_body), "CUDA")
    torch.library.register_fake(f"swba::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("swba::forward", _gradients, setup_context=_save_for_backward, lib=_LIBRARY)
torch.library.register_autograd("swba::backward", _refuse_second_gradients, lib=_LIBRARY)
