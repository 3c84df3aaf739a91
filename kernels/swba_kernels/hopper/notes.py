"""Notes in shared memory: a few integers that one partition leaves for the others, a row of 16 a stage, or just one.

Who computes them once spares the others integer divisions, and the registers that those take through a loop. A note may
be read once the barrier is full which its writer fills afterwards, and until the readers have given the stage back: for
good, where it is written once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .compat import cta_barrier


@gluon.jit
def notes_of(STAGES: gl.constexpr):
    """Return room for a note in each stage."""
    return gl.allocate_shared_memory(gl.int32, [STAGES, 16], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def tell(values, notes, stage):
    """Write a tuple of at most 16 integers; called by a whole partition."""
    at = gl.arange(0, 16, layout=gl.BlockedLayout([16], [32], [gl.num_warps()], [0]))
    note = gl.full_like(at, 0)
    for i in gl.static_range(len(values)):
        note = gl.where(at == i, values[i], note)
    notes.index(stage).store(note)
    cta_barrier()


@gluon.jit
def told(notes, stage, FIELD: gl.constexpr):
    """Return one integer of a note; called by a partition of four warps."""
    note = notes.index(stage).load(gl.BlockedLayout([16], [32], [4], [0]))
    return gl.sum(gl.where(gl.arange(0, 16, layout=note.type.layout) == FIELD, note, 0), 0)


@gluon.jit
def marks_of(STAGES: gl.constexpr):
    """Return room for one integer in each stage."""
    return gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def mark(value, marks, stage):
    """Write the integer of a stage; called by a whole partition."""
    marks.index(stage).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))
    cta_barrier()


@gluon.jit
def marked(marks, stage):
    """Return the integer of a stage; called by a partition of four warps."""
    return gl.sum(marks.index(stage).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
