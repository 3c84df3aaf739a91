"""A small ring cache and tensors for it."""

from __future__ import annotations

import torch
from torch import Tensor

from swba_infer import RingKVCache, StreamConfig

LAYERS, KV_HEADS, HEADS, HEAD_DIM = 2, 1, 2, 8
STREAM = StreamConfig(tokens_per_frame=2, frames_per_block=2, window_frames=3, sink_frames=1)


def make_cache(stream: StreamConfig, lanes: int = 1, dtype: torch.dtype = torch.float64, **options) -> RingKVCache:
    return RingKVCache(
        layers=LAYERS, lanes=lanes, kv_heads=KV_HEADS, head_dim=HEAD_DIM, stream=stream, dtype=dtype, device="cpu",
        **options,
    )  # fmt: skip


def draw_qkv(rows: int, tokens: int, generator: torch.Generator, dtype: torch.dtype = torch.float64):
    """Return q, k, v of every layer."""

    def draw(heads: int) -> Tensor:
        return torch.randn(rows, heads, tokens, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)

    return [(draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)) for _ in range(LAYERS)]


def filled(lanes: int = 1, tokens: int = 20) -> tuple[RingKVCache, torch.Generator]:
    cache, generator = make_cache(STREAM, lanes), torch.Generator().manual_seed(1)
    for layer, (q, k, v) in enumerate(draw_qkv(lanes, tokens, generator)):
        cache.prefill(layer, q, k, v)
    cache.commit()
    return cache, generator


def run_step(cache: RingKVCache, qkv, lanes=None) -> list[Tensor]:
    return [cache.attend(layer, *x, lanes=lanes) for layer, x in enumerate(qkv)]
