"""What attention is in an emulated kernel: weights are made of what their scores are made of.

Part of `gluon_emulator.py`, for the forward and the decode.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gluon_emulator import Machine
from gluon_values import Array, Tile


def stand_ins(machine: Machine) -> dict[str, Any]:
    """Return what stands for softmax and matmuls with values."""

    def clear_rows(v, rows):
        """Each consumer writes the same: for the others that is as if it had read."""
        yield
        machine.touch(v.cells.flat, machine.time())

    return {
        "clear_rows": clear_rows,
        "first_weights": lambda s, *_: (s.reshape(), None, None),
        "next_weights": lambda s, *_: (s.reshape(), None, None, None),
        "rescale": lambda acc, _: acc.reshape(),
        "as_operand": lambda p, *_: p,
        "add_values": lambda p, v, acc: machine.matmul(p, v, acc),
        "row_state": lambda *_: (Array(np.zeros(64)), Array(np.ones(64))),
    }


def keys_of(
    made: Tile, at: tuple[int, int, int], homes: dict[str, tuple[int, int]], columns: int
) -> dict[tuple[str, str, int], int]:
    """Return how often (queries' tensor, keys' tensor, key) came into a row of out, tile after tile of `columns` keys.

    `at` is the row's (row of the batch, head, row); `homes` tell the tensors of keys it may read, and where in them:
    (row of the batch or lane, kv head). Those of values are named alike.
    """
    b, h, row = at
    found: dict[tuple[str, str, int], int] = {}
    for _, (weights, values) in made:
        ((queries, keys),) = [x for x in weights if isinstance(x, tuple)]
        ((q_name, base),) = {(name, first) for name, *of, first, _ in queries if of == [b, h]}
        assert base <= row < base + 64, "queries of other rows"
        name, *home, first, _ = min(keys)
        assert tuple(home) == homes[name], "keys from elsewhere"
        parts = {(*home, r, c) for r in range(first, first + columns, 64) for *_, c in queries}
        assert keys == {(name, *x) for x in parts}, "parts of tiles"
        assert values == {(name[:-1] + "v", *x) for x in parts}, "values of other keys"
        visible = np.ones(columns, bool)
        for mask in (x for x in weights if isinstance(x, bytes)):
            whole = np.frombuffer(mask, bool).reshape(-1, columns)  # of one row for all, or of each
            visible = visible & whole[(row - base) % len(whole)]
        for key in (np.flatnonzero(visible) + first).tolist():
            found[q_name, name, key] = found.get((q_name, name, key), 0) + 1
    return found
