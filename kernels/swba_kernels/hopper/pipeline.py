"""What loops over tiles share: the step through a ring of buffers, and numbers that stay out of registers."""

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


@gluon.constexpr_function
def overlaps(consumers):
    """Tell whether O += P V of a tile runs beside the next one's softmax.

    With three consumers there are too few registers, with four it gains little: others keep the tensor cores busy.
    """
    return consumers == 2


@gluon.jit
def counting(ROWS: gl.constexpr):
    """Return a buffer that holds 0, 1, ... ROWS - 1.

    Edge tiles read the numbers of their rows or columns from here: as an `arange` they would sit in registers through
    the whole loop.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    values = gl.arange(0, ROWS, layout=LAYOUT)
    return gl.allocate_shared_memory(gl.int32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]), values)
