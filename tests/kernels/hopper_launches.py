"""Calls of the Hopper kernels on tensors without memory, for `compile_launches`.

B batch or lanes, H heads, N tokens, D head dim.
"""

from __future__ import annotations

import torch
from forward_calls import items_of

from swba_infer.bench.shapes import Shape
from swba_kernels import BlockWindow
from swba_kernels.hopper.decode_plan import Config
from swba_kernels.hopper.forward_cut import Cut


def empty(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
    """Return [B, H, N, D] as a view of [B, N, H, D] without memory, as models make it."""
    b, h, n, d = sizes
    return torch.empty(b, n, h, d, dtype=dtype, device="meta").transpose(1, 2)


def rows(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.int64, device="meta")


def train(shape: Shape, sink: int = 0) -> None:
    from swba_kernels.hopper.backward import FAST, IN_TURN, SPLIT, backward
    from swba_kernels.hopper.forward import forward

    dtype, n, kv_heads = getattr(torch, shape.dtype), shape.tokens, shape.kv_heads or shape.heads
    q = empty(shape.batch, shape.heads, n, shape.head_dim, dtype=dtype)
    k, v = (empty(shape.batch, kv_heads, n, shape.head_dim, dtype=dtype) for _ in range(2))
    p = shape.pattern
    options = {"block_size": p.block_size, "window": p.window, "sink": sink or p.sink, "grid_start": p.grid_start}
    options["q_sink"] = torch.empty_like(q) if sink else None
    out, lse = forward(q, k, v, scale=0.1, **options)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    for config in (table[shape.head_dim] for table in (SPLIT, IN_TURN, FAST)):
        *grads, of_sinks = backward(torch.empty_like(q), q, k, v, out, lse, scale=0.1, config=config, **options)
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
        assert of_sinks.shape == q.shape if sink else of_sinks is None


def straddle(head_dim: int, dtype: torch.dtype, sink: int) -> None:
    """Launch a forward by every configuration that some block chooses with tiles that straddle blocks."""
    from swba_kernels.hopper.forward import choose_config, forward

    sizes = [(block, blocks * block) for block in range(1, 1000) for blocks in (1, 2, 4, 8, 16, 32)]
    choices = {choose_config(head_dim, *size, False, True) for size in sizes}
    q, k = (empty(2, heads, 2000, head_dim, dtype=dtype) for heads in (8, 4))
    for choice in choices:
        if choice[1]:
            forward(q, k, k, scale=0.1, block_size=144, window=999, sink=sink, grid_start=-5, config=choice)


def stream(shape: Shape, lanes: torch.Tensor | None = None, sink: int = 0) -> None:
    from swba_kernels.hopper.decode import decode

    dtype, kv_heads = getattr(torch, shape.dtype), shape.kv_heads or shape.heads
    q = empty(shape.batch, shape.heads, shape.tokens, shape.head_dim, dtype=dtype)
    ring = torch.empty(shape.batch, kv_heads, shape.keys, shape.head_dim, dtype=dtype, device="meta")
    q_sink = torch.empty_like(q) if sink else None
    out, lse = decode(q, ring, ring, rows(shape.batch), lanes, scale=0.1, q_sink=q_sink, sink=sink)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])


def prefill(
    head_dim: int, block_size: int, sink: int, lanes: torch.Tensor | None, apart: bool = False, parts: int = 1
) -> None:
    """Launch a prefill of three blocks, whose items but for four of a row are cut into `parts`."""
    from swba_kernels.hopper.forward import forward
    from swba_kernels.portable.forward import Ring

    q = empty(2, 8, 3 * block_size, head_dim, dtype=torch.bfloat16)
    k = empty(2, 4, 3 * block_size, head_dim, dtype=torch.bfloat16)
    ring = torch.empty(3, 4, sink + 4 * block_size, head_dim, dtype=torch.bfloat16, device="meta")
    options = {"block_size": block_size, "window": 4 * block_size, "sink": sink, "grid_start": 0}
    q_sink = torch.empty_like(q) if apart else None
    items = items_of(3 * block_size, BlockWindow(block_size, 4 * block_size, sink), head_dim, 8)
    cut = None if apart else Cut(4, items - 4, parts) if parts > 1 else Cut(items, 0, 1)
    forward(q, k, k, scale=0.1, ring=Ring(ring, ring, rows(2), lanes), q_sink=q_sink, cut=cut, **options)


def on_ring(shape: Shape) -> None:
    """Launch a prefill of the benchmark, cut as is chosen for it."""
    from swba_kernels.hopper.forward import forward
    from swba_kernels.portable.forward import Ring

    dtype, kv_heads, p = getattr(torch, shape.dtype), shape.kv_heads or shape.heads, shape.pattern
    q, k = (empty(shape.batch, x, shape.tokens, shape.head_dim, dtype=dtype) for x in (shape.heads, kv_heads))
    ring = torch.empty(shape.batch, kv_heads, p.sink + p.window, shape.head_dim, dtype=dtype, device="meta")
    options = {"block_size": p.block_size, "window": p.window, "sink": p.sink, "grid_start": p.grid_start}
    forward(q, k, k, scale=0.1, ring=Ring(ring, ring, rows(shape.batch), None), **options)


def cut_decode(head_dim: int, config: Config, sink: int) -> None:
    """Launch a decode by a plan of this configuration that cuts tiles along the keys."""
    from swba_kernels.hopper.decode import decode
    from swba_kernels.hopper.decode_plan import lane_plans

    plan = next(x for x in lane_plans(config, 4, 100, 2000, 2, 132) if len(x.bundles) > len(x.tiles))
    q = empty(2, 4, 100, head_dim, dtype=torch.bfloat16)
    ring = torch.empty(2, 4, 2000, head_dim, dtype=torch.bfloat16, device="meta")
    q_sink = torch.empty_like(q) if sink else None
    decode(q, ring, ring, rows(2), rows(2), scale=0.1, q_sink=q_sink, sink=sink, plan=plan)
