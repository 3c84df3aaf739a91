"""Train with the kernels: one attention layer learns to copy from the frame three blocks back.

The window decides whether it can: with three blocks of past it learns, with two it never will.

    python demos/train_step.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from swba_kernels import BlockWindow, block_window_attention

TOKENS, BLOCKS, HEADS, HEAD_DIM, BACK = 8, 12, 2, 32, 3
WIDTH = HEADS * HEAD_DIM


class Copier(nn.Module):
    def __init__(self, pattern: BlockWindow, length: int) -> None:
        super().__init__()
        self.pattern = pattern
        self.place = nn.Parameter(torch.randn(length, WIDTH) * 0.5)
        self.qk = nn.Linear(WIDTH, 2 * WIDTH)
        self.v = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, N, E] to [B, N, E]."""
        q, k = self.qk(self.place.expand(len(x), -1, -1)).chunk(2, dim=-1)
        heads = [t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in (q, k, self.v(x))]
        return block_window_attention(*heads, self.pattern).transpose(1, 2).flatten(2)


def train(window_blocks: int, steps: int, device: str) -> float:
    """Return the loss after training with a window of this many blocks; 1.0 is that of knowing nothing."""
    torch.manual_seed(0)
    pattern = BlockWindow.from_blocks(TOKENS, window_blocks)
    model = Copier(pattern, TOKENS * BLOCKS).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss = torch.ones(())
    for _ in range(steps):
        x = torch.randn(16, TOKENS * BLOCKS, WIDTH, device=device)
        wanted = x.roll(BACK * TOKENS, dims=1)[:, BACK * TOKENS :]
        loss = (model(x)[:, BACK * TOKENS :] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for window_blocks in (BACK, BACK + 1):
        loss = train(window_blocks, steps=150, device=device)
        print(f"window of {window_blocks} blocks, {BACK} back wanted: loss {loss:.3f}")


if __name__ == "__main__":
    main()
