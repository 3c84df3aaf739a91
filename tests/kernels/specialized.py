"""Two kernels that specialise their warps and do next to nothing else, for racecheck.

    compute-sanitizer --tool racecheck python tests/kernels/specialized.py by_a_barrier

Triton's own code for it is the same in both: states of the warps are written before a hardware barrier of all threads,
and read behind it. In one of them a partition tells the others something by an mbarrier, at which one thread arrives.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

CTAS = 2000  # more than run at once: racecheck names only some
PARTITIONS = 3


@gluon.jit
def _write(p_out, at, PARTITION: gl.constexpr):
    gl.store(p_out + at * 4 + PARTITION, at)


@gluon.jit
def _send(p_out, at, bar, PARTITION: gl.constexpr):
    mbarrier.arrive(bar, count=1)
    gl.store(p_out + at * 4 + PARTITION, at)


@gluon.jit
def _receive(p_out, at, bar, PARTITION: gl.constexpr):
    mbarrier.wait(bar, 0)
    gl.store(p_out + at * 4 + PARTITION, at)


@gluon.jit
def alone(p_out):
    at = gl.program_id(0)
    gl.warp_specialize([
        (_write, (p_out, at, 0)), (_write, (p_out, at, 1)), (_write, (p_out, at, 2)),
    ], [4, 1], [24, 24])  # fmt: skip


@gluon.jit
def by_a_barrier(p_out):
    at = gl.program_id(0)
    bars = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    bar = bars.index(0)
    mbarrier.init(bar, count=1)
    gl.warp_specialize([
        (_receive, (p_out, at, bar, 0)), (_receive, (p_out, at, bar, 1)), (_send, (p_out, at, bar, 2)),
    ], [4, 1], [24, 24])  # fmt: skip


KERNELS = {"alone": alone, "by_a_barrier": by_a_barrier}


def call(name: str, device: str) -> Tensor:
    """Return the number of each CTA, from each of its partitions."""
    out = torch.zeros(CTAS, 4, dtype=torch.int32, device=device)
    KERNELS[name][(CTAS,)](out, num_warps=4)
    return out[:, :PARTITIONS]


if __name__ == "__main__":
    expected = torch.arange(CTAS, dtype=torch.int32)[:, None].expand(-1, PARTITIONS)
    assert torch.equal(call(sys.argv[1], "cuda").cpu(), expected)
    print("ran", sys.argv[1])
