"""Small odd problems for the portable kernels, and the tile the interpreter can afford."""

from __future__ import annotations

from swba_kernels.portable.tiles import Tile

TILE = Tile(16, 16, 4, 2)

# tokens, block_size, window, sink, first_block, heads, kv heads, head dim
CASES = [
    (37, 1, 1, 0, 0, 1, 1, 16),
    (50, 1, 9, 3, 1, 2, 1, 8),
    (70, 7, 20, 3, 2, 2, 1, 24),
    (64, 16, 48, 0, 0, 2, 2, 16),
    (150, 64, 100, 10, 5, 1, 1, 64),
    (200, 96, 96, 0, 0, 1, 1, 16),
    (130, 64, 128, 64, 0, 2, 2, 80),
    (210, 200, 300, 20, 3, 1, 1, 16),
    (120, 20, 50, 47, 7, 4, 2, 16),
    (1, 5, 5, 5, 5, 1, 1, 16),
]

# sinks inside the first block, on its edge, across several tiles, and as long as the sequence or longer
WITH_AND_WITHOUT_Q_SINK = [(*case, False) for case in CASES] + [
    (*case, True)
    for case in [
        *(case for case in CASES if case[3]),
        (150, 40, 70, 60, 33, 4, 2, 16),
        (64, 16, 48, 16, 0, 2, 2, 16),
        (90, 32, 32, 90, 0, 1, 1, 16),
        (40, 16, 16, 70, 3, 2, 1, 16),
        (130, 24, 130, 37, 0, 1, 1, 8),
    ]
]
