"""Small calls of the Hopper kernels, one process for each kind, so that compute-sanitizer can watch them.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python tests/kernels/sanitized.py decode 64

Every tensor is then an allocation of its own, behind which nothing may be touched. Each kernel runs in each of its
forms: `test_sanitized.py` says which.

B batch or lanes, H heads, N tokens, S slots of the ring, D head dim.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

N = 333
PATTERNS = [  # sizes that leave ragged tiles, with a first block that is cut short; no block sees all
    {"block_size": 100, "window": 200, "sink": 0, "grid_start": -30},
    {"block_size": 70, "window": 140, "sink": 90, "grid_start": 0},
    {"block_size": 48, "window": 96, "sink": 0, "grid_start": -7},
]


def random(device: str, *sizes: int) -> Tensor:
    return torch.randn(*sizes, device=device, dtype=torch.bfloat16)


def forward(head_dim: int, device: str) -> None:
    from swba_kernels.hopper.forward import CONFIGS, forward

    q, k, v = (random(device, 2, heads, N, head_dim) for heads in (4, 2, 2))
    for pattern in PATTERNS:
        if head_dim == 64 and not pattern["sink"]:
            forward(q, k, v, scale=0.1, **pattern)  # small blocks have a kernel of their own
        for config in CONFIGS[head_dim]:
            forward(q, k, v, scale=0.1, config=(config, False), **pattern)
            if pattern["sink"]:
                forward(q, k, v, scale=0.1, q_sink=q, config=(config, False), **pattern)
            if pattern["block_size"] >= 64 and config.groups != 3:
                forward(q, k, v, scale=0.1, config=(config, True), **pattern)


def prefill(head_dim: int, device: str) -> None:
    from swba_kernels.hopper.forward import CONFIGS, forward
    from swba_kernels.hopper.forward_cut import Cut
    from swba_kernels.portable.forward import Ring

    q, k, v = (random(device, 2, heads, N, head_dim) for heads in (4, 2, 2))
    filled, lanes = (torch.tensor(x, device=device) for x in ([123, 5000], [2, 0]))
    for sink, of_row in ((0, None), (270, lanes)):
        k_ring, v_ring = (random(device, 3, 2, sink + 600, head_dim) for _ in range(2))
        pattern = {"block_size": 200, "window": 600, "sink": sink, "grid_start": 0}
        for config in CONFIGS[head_dim]:
            if config.groups == 4:
                continue
            options = {"ring": Ring(k_ring, v_ring, filled, of_row), "config": (config, False), **pattern}
            items = 4 * (-(-200 // (config.groups * 64)) + -(-133 // (config.groups * 64)))  # of a row
            for cut in (Cut(items, 0, 1), Cut(2, items - 2, 9)):
                forward(q, k, v, scale=0.1, cut=cut, **options)
            if sink:
                forward(q, k, v, scale=0.1, q_sink=q, **options)


def backward(head_dim: int, device: str) -> None:
    from swba_kernels.hopper.backward import FAST, IN_TURN, SPLIT, backward

    q, k, v, out, dout = (random(device, 2, heads, N, head_dim) for heads in (4, 2, 2, 4, 4))
    lse = torch.zeros(2, 4, N, device=device)
    for pattern in PATTERNS:
        for q_sink in (None, q) if pattern["sink"] else (None,):
            for configs in (FAST, IN_TURN, SPLIT):
                config = configs[head_dim]
                backward(dout, q, k, v, out, lse, scale=0.1, q_sink=q_sink, config=config, **pattern)


def decode(head_dim: int, device: str) -> None:
    from swba_kernels.hopper.decode import decode
    from swba_kernels.hopper.decode_plan import CONFIGS, lane_plans

    q, k_ring, v_ring = (random(device, *sizes, head_dim) for sizes in ((2, 2, 150), (3, 2, 999), (3, 2, 999)))
    valid, lanes = (torch.tensor(x, device=device) for x in ([999, 130], [2, 0]))
    for config in CONFIGS[head_dim]:
        plans = lane_plans(config, 2, 150, 999, 3, 132)
        for plan, of_row in ((plans[0], lanes), (plans[-1], None)):
            for q_sink, sink in ((None, 0), (q, 70)):
                decode(q, k_ring, v_ring, valid, of_row, scale=0.1, q_sink=q_sink, sink=sink, plan=plan)


CALLS: dict[str, Callable[[int, str], None]] = {
    "forward": forward, "prefill": prefill, "backward": backward, "decode": decode,
}  # fmt: skip

if __name__ == "__main__":
    CALLS[sys.argv[1]](int(sys.argv[2]), "cuda")
    torch.cuda.synchronize()
    print("ran", *sys.argv[1:])
