"""Notes in shared memory: a few integers that one partition leaves for the others, a row a stage.

Who computes them once spares the others integer divisions, and the registers that those take through a loop. A note may
be read once the barrier is full which its writer fills afterwards, and until the readers have given the stage back: for
good, where it is written once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .compat import cta_barrier


@gluon.jit
def notes_of(STAGES: gl.constexpr, FIELDS: gl.constexpr = 16):
    """Return room for a note of FIELDS integers, a power of two, in each stage."""
    return gl.allocate_shared_memory(gl.int32, [STAGES, FIELDS], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def tell(values, notes, stage):
    """Write a tuple of at most as many integers as a note has; called by a whole partition."""
    FIELDS: gl.constexpr = notes.shape[1]
    at = gl.arange(0, FIELDS, layout=gl.BlockedLayout([FIELDS], [32], [gl.num_warps()], [0]))
    note = gl.full_like(at, 0)
    for i in gl.static_range(len(values)):
        note = gl.where(at == i, values[i], note)
    notes.index(stage).store(note)
    cta_barrier()


@gluon.jit
def told(notes, stage, FIELD: gl.constexpr):
    """Return one integer of a note; called by a partition of four warps."""
    FIELDS: gl.constexpr = notes.shape[1]
    note = notes.index(stage).load(gl.BlockedLayout([FIELDS], [32], [4], [0]))
    return gl.sum(gl.where(gl.arange(0, FIELDS, layout=note.type.layout) == FIELD, note, 0), 0)
