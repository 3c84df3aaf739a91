"""The order in which consumers start their matmuls, or their exponentials, where they take turns.

Consumer i of W waits at hardware barrier START + i for the one before it, and passes on to the one behind it, the last
to the first. With TURNS off nothing happens. Each opens and closes once, and awaits and passes once a tile, the same
number of tiles. Turns order time, never data. (Turns to add to a sum are another matter: backward_order.py.)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .compat import named_arrive, named_sync

START = gl.constexpr(12)
_THREADS = gl.constexpr(256)  # those of two consumers: one waits, one has passed on


@gluon.jit
def open_starts(W: gl.constexpr, TURNS: gl.constexpr, ME: gl.constexpr):
    """Let the first consumer start; called once by each."""
    if TURNS and ME == W - 1:
        named_arrive(START, _THREADS)


@gluon.jit
def await_start(TURNS: gl.constexpr, ME: gl.constexpr):
    """Wait until consumer ME may start."""
    if TURNS:
        named_sync(START + ME, _THREADS)


@gluon.jit
def pass_start(W: gl.constexpr, TURNS: gl.constexpr, ME: gl.constexpr):
    """Let the consumer behind ME start."""
    if TURNS:
        named_arrive(START + (ME + 1) % W, _THREADS)


@gluon.jit
def close_starts(TURNS: gl.constexpr, ME: gl.constexpr):
    """Take the last start, which nobody uses; called once by each consumer."""
    if TURNS and ME == 0:
        named_sync(START, _THREADS)
