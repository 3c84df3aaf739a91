"""Use the ring cache alone, in a model of your own: causal video attention that streams without a length limit.

The toy below attends over whole clips when it trains, and frame by frame through the cache when it streams. Both give
the same numbers, far beyond the window.

    python demos/cache_in_your_model.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from swba_infer import RingKVCache, StreamConfig
from swba_kernels import block_window_attention

STREAM = StreamConfig(tokens_per_frame=16, frames_per_block=1, window_frames=6, sink_frames=1)
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 32, 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * HEAD_DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM)

    def forward(self, x: Tensor, attend) -> Tensor:
        """Map x [L, N, E] to [L, N, E]; `attend` takes and returns [L, H, N, D]."""
        qkv = self.qkv(nn.functional.layer_norm(x, x.shape[-1:])).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        return x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layers = nn.ModuleList(Layer() for _ in range(LAYERS)).to(device)
    frames = 20
    clip = torch.randn(1, frames * STREAM.tokens_per_frame, HEADS * HEAD_DIM, device=device)

    with torch.no_grad():
        whole = clip
        for layer in layers:
            whole = layer(whole, lambda q, k, v: block_window_attention(q, k, v, STREAM.pattern))

        cache = RingKVCache(
            layers=LAYERS,
            lanes=1,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            stream=STREAM,
            dtype=torch.float32,
            device=device,
        )
        print(f"the cache takes {cache.bytes:,} bytes, however long the stream gets")
        worst = 0.0
        for i, frame in enumerate(clip.split(STREAM.tokens_per_frame, dim=1)):
            for number, layer in enumerate(layers):
                frame = layer(frame, lambda q, k, v, number=number: cache.attend(number, q, k, v))
            cache.commit()
            expected = whole[:, i * STREAM.tokens_per_frame : (i + 1) * STREAM.tokens_per_frame]
            worst = max(worst, float((frame - expected).abs().max()))
    print(f"{frames} frames, position {cache.position}: the stream equals the whole clip within {worst:.1e}")
    if worst > 1e-4:
        raise SystemExit("the two ways of attending disagree")


if __name__ == "__main__":
    main()
