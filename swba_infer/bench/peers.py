"""The variants that are measured: this project, and whatever else is installed.

"swba" runs `--impl`; "hopper" and "triton" run what they are called, "hopper-fast" with deterministic=False.
Each entry makes, from a shape and its tensors, a function of no arguments that returns the output [B, H, N, D], or says
why it cannot. B batch, H heads, N tokens, D head dim.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import swba_kernels
from swba_kernels.choice import check_served

from .shapes import Shape

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Unavailable(Exception):
    """A variant is not installed, or does not serve this device or shape; the message says which."""


def names(kind: str) -> list[str]:
    """Return the names of the variants for "training", "prefill" or "decode", ours first."""
    return list(_TABLES[kind])


def make(name: str, shape: Shape, tensors: Mapping[str, Tensor], impl: str = "auto") -> Forward:
    """Return variant `name` as a function of q, k, v; raise Unavailable with the reason if it cannot run here."""
    return _TABLES[shape.kind][name](shape, tensors, impl)


class BlockLoop(torch.autograd.Function):
    """Run a dense attention once per block over its key range: what one writes without a kernel for the pattern.

    The backward adds to slices of dk and dv; autograd would materialise one full-size gradient per block.
    """

    @staticmethod
    def forward(ctx: Any, dense: Forward, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        graph = []
        for start, end, spans in shape.blocks_and_keys():
            parts = [q[:, :, start:end], _pick(k, spans), _pick(v, spans)]
            if any(ctx.needs_input_grad):
                parts = [part.detach().requires_grad_() for part in parts]
                with torch.enable_grad():
                    block = dense(*parts)
                graph.append((start, end, spans, parts, block))
                block = block.detach()
            else:
                block = dense(*parts)
            out[:, :, start:end] = block
        ctx.graph, ctx.like = graph, (q, k, v)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dout,) = grads
        dq, dk, dv = (torch.zeros_like(x) for x in ctx.like)
        for start, end, spans, parts, block in ctx.graph:
            block_dq, block_dk, block_dv = torch.autograd.grad(block, parts, dout[:, :, start:end], retain_graph=True)
            dq[:, :, start:end] = block_dq
            at = 0
            for lo, hi in spans:
                dk[:, :, lo:hi] += block_dk[:, :, at : at + hi - lo]
                dv[:, :, lo:hi] += block_dv[:, :, at : at + hi - lo]
                at += hi - lo
        return None, None, dq, dk, dv


def _pick(x: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    parts = [x[:, :, lo:hi] for lo, hi in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _check_named(impl: str, shape: Shape, tensors: Mapping[str, Tensor]) -> None:
    try:
        check_served(impl, tensors["q"], "decode" if shape.kind == "decode" else "forward")
    except ValueError as error:
        raise Unavailable(str(error)) from error


def _named(make_ours: Callable[..., Forward], name: str) -> Callable[..., Forward]:
    """Return what makes one of ours with the implementation `name`, whatever `--impl` says."""

    def make_named(shape: Shape, tensors: Mapping[str, Tensor], impl: str) -> Forward:
        _check_named(name, shape, tensors)
        return make_ours(shape, tensors, name)

    return make_named


def _ours_training(shape: Shape, tensors: Mapping[str, Tensor], impl: str, deterministic: bool = True) -> Forward:
    return partial(_call_ours, shape, impl, deterministic)


def _call_ours(shape: Shape, impl: str, deterministic: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = swba_kernels.block_window_attention(q, k, v, shape.pattern, impl=impl, deterministic=deterministic)
    return cast(Tensor, out)


def _ours_prefill(shape: Shape, tensors: Mapping[str, Tensor], impl: str) -> Forward:
    rings, position = full_rings(shape, tensors)
    own = slice(shape.history, None)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, :, own], v[:, :, own]
        return cast(Tensor, swba_kernels.prefill_attention(q, k, v, shape.pattern, *rings, position, impl=impl))

    return call


def full_rings(shape: Shape, tensors: Mapping[str, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return rings [B, Hkv, sink + window, D] of k and v that wrapped around in mid-block, and the position [B].

    A block of each, the oldest, holds zeros: nobody sees it.
    """
    sink, window = shape.pattern.sink, shape.pattern.window
    k, v = (tensors[name][:, :, : shape.history] for name in "kv")
    k_ring, v_ring = (x.new_zeros(*x.shape[:2], sink + window, shape.head_dim) for x in (k, v))
    start = torch.full((shape.batch,), 3 * window + sink + shape.block_size // 2, device=k.device)
    if sink:
        swba_kernels.ring_write(k_ring, v_ring, k[:, :, :sink], v[:, :, :sink], torch.zeros_like(start), sink=sink)
    swba_kernels.ring_write(k_ring, v_ring, k[:, :, sink:], v[:, :, sink:], start, sink=sink)
    return (k_ring, v_ring), start + window - shape.block_size


def _ours_decode(shape: Shape, tensors: Mapping[str, Tensor], impl: str) -> Forward:
    q = tensors["q"]
    valid = torch.full((q.shape[0],), shape.visible, dtype=torch.int64, device=q.device)
    return lambda q, k, v: cast(Tensor, swba_kernels.window_decode_attention(q, k, v, valid, impl=impl))


def _sdpa(backend: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Forward:
    q = tensors["q"]
    if not q.is_cuda and backend != "math":
        raise Unavailable("CUDA only")
    grouped = bool(shape.kv_heads)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[backend]):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

    return dense


def _flash_attn(module: str, shape: Shape, tensors: Mapping[str, Tensor]) -> Forward:
    if not tensors["q"].is_cuda:
        raise Unavailable("CUDA only")
    try:
        function = importlib.import_module(module).flash_attn_func
    except (ImportError, OSError, AttributeError) as error:
        raise Unavailable(f"{module} cannot be imported: {error}") from error

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return dense


def _loop(make_dense: Callable[[Shape, Mapping[str, Tensor]], Forward]) -> Callable[..., Forward]:
    def make_loop(shape: Shape, tensors: Mapping[str, Tensor], impl: str) -> Forward:
        return partial(BlockLoop.apply, make_dense(shape, tensors), shape)  # type: ignore[return-value]

    return make_loop


def _flex(shape: Shape, tensors: Mapping[str, Tensor], impl: str, backend: str | None = None) -> Forward:
    import torch._functorch.config as functorch
    from torch.nn.attention.flex_attention import flex_attention

    functorch.donated_buffer = False  # the clock calls one backward many times
    if not tensors["q"].is_cuda:
        raise Unavailable("CUDA only (no backward on the CPU)")
    if backend == "FLASH":
        _flash_attn("flash_attn.cute", shape, tensors)
    mask = block_mask(shape, tensors["q"].device)
    options = {"BACKEND": backend} if backend else None
    arguments: dict[str, Any] = {"block_mask": mask, "kernel_options": options, "enable_gqa": bool(shape.kv_heads)}
    return cast(Forward, partial(torch.compile(flex_attention, dynamic=False), **arguments))


def block_mask(shape: Shape, device: torch.device, tile: int = 128) -> Any:
    """Build FlexAttention's mask of training or prefill from its key ranges, without an N x N mask in memory."""
    from torch.nn.attention.flex_attention import BlockMask

    past, n, size, window, sink = shape.history, shape.keys, shape.block_size, shape.pattern.window, shape.pattern.sink

    def end(q: Tensor) -> Tensor:
        return ((q // size + 1) * size).clamp(max=n)

    first = torch.arange(0, n, tile, device=device)
    rows = torch.arange(past, n, tile, device=device)
    last_row = (rows + tile).clamp(max=n) - 1
    end_first, end_last = end(rows)[:, None], end(last_row)[:, None]
    some = (first < end_last) & ((first + tile > end_first - window) | (first < sink))
    inside = (first >= end_last - window) | (first + tile <= sink)
    full = (first + tile <= end_first) & inside & (rows[:, None] + tile <= n)
    partial_tiles, full_tiles = some & ~full, some & full

    def listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(tiles.int(), dim=-1, descending=True, stable=True)
        return tiles.sum(-1).int()[None, None], order.int()[None, None]

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if past:
            q = q + past
        stop = (q // size + 1) * size
        if n % size:
            stop = torch.clamp(stop, max=n)
        in_window = (k < stop) & (k >= stop - window)
        return in_window | (k < min(sink, n)) & (k < stop) if sink else in_window

    return BlockMask.from_kv_blocks(
        *listed(partial_tiles), *listed(full_tiles), BLOCK_SIZE=tile, mask_mod=visible, seq_lengths=(shape.tokens, n)
    )


def _dense(make_dense: Callable[[Shape, Mapping[str, Tensor]], Forward]) -> Callable[..., Forward]:
    def make_decode(shape: Shape, tensors: Mapping[str, Tensor], impl: str) -> Forward:
        dense = make_dense(shape, tensors)
        if shape.visible == shape.keys:
            return dense
        seen = slice(0, shape.visible)  # the host knows the length, which it does not where a graph is replayed
        return lambda q, k, v: dense(q, k[:, :, seen], v[:, :, seen])

    return make_decode


OURS = ("swba", "hopper", "hopper-fast", "triton")

_TRAINING: dict[str, Callable[..., Forward]] = {
    "swba": _ours_training,
    "hopper": _named(_ours_training, "hopper"),
    "hopper-fast": _named(partial(_ours_training, deterministic=False), "hopper"),
    "triton": _named(_ours_training, "triton"),
    "flex": _flex,
    "flex-fa4": partial(_flex, backend="FLASH"),
    "loop-cudnn": _loop(partial(_sdpa, "cudnn")),
    "loop-flash": _loop(partial(_sdpa, "flash")),
    "loop-efficient": _loop(partial(_sdpa, "efficient")),
    "loop-math": _loop(partial(_sdpa, "math")),
    "loop-fa4": _loop(partial(_flash_attn, "flash_attn.cute")),
}

_PREFILL: dict[str, Callable[..., Forward]] = {
    "swba": _ours_prefill,
    "hopper": _named(_ours_prefill, "hopper"),
    "triton": _named(_ours_prefill, "triton"),
    **{name: make for name, make in _TRAINING.items() if name not in OURS},
}

_DECODE: dict[str, Callable[..., Forward]] = {
    "swba": _ours_decode,
    "hopper": _named(_ours_decode, "hopper"),
    "triton": _named(_ours_decode, "triton"),
    "sdpa-cudnn": _dense(partial(_sdpa, "cudnn")),
    "sdpa-flash": _dense(partial(_sdpa, "flash")),
    "sdpa-efficient": _dense(partial(_sdpa, "efficient")),
    "sdpa-math": _dense(partial(_sdpa, "math")),
    "fa2": _dense(partial(_flash_attn, "flash_attn")),
    "fa4": _dense(partial(_flash_attn, "flash_attn.cute")),
}

_TABLES = {"training": _TRAINING, "prefill": _PREFILL, "decode": _DECODE}
