"""The step through a ring of buffers in shared memory, by which producers and consumers meet."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """Step through a ring of buffers; the phase flips when the ring wraps."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase
