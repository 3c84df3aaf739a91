"""The calls that compute-sanitizer watches run every Hopper kernel in every form; no GPU is needed to tell."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from aot import record_launches
from sanitized import CALLS

from swba_kernels.hopper.backward import FAST, IN_TURN
from swba_kernels.hopper.decode_plan import CONFIGS as DECODE
from swba_kernels.hopper.forward import CONFIGS as FORWARD
from swba_kernels.hopper.supports import build_obstacle

pytestmark = pytest.mark.skipif(build_obstacle() is not None, reason="this Triton cannot build the Hopper kernels")


def launches(call: str, head_dim: int) -> list[tuple[str, dict[str, Any]]]:
    return record_launches(lambda: CALLS[call](head_dim, "meta"))


def forms(call: str, head_dim: int, kernel: str, *names: str) -> set[tuple[Any, ...]]:
    """Return the combinations of some arguments with which a kernel is launched."""
    return {tuple(x[name] for name in names) for found, x in launches(call, head_dim) if found == kernel}


@pytest.mark.parametrize("head_dim", [64, 128])
def test_forward_in_every_form(head_dim) -> None:
    groups = {config.groups for config in FORWARD[head_dim]}
    plain = {(x, sinks, q_sink, False) for x in groups for sinks, q_sink in ((0, 0), (1, 0), (1, 1))}
    straddling = {(x, sinks, 0, True) for x in groups - {3} for sinks in (0, 1)}
    assert forms("forward", head_dim, "_forward", "GROUPS", "SINKS", "Q_SINK", "STRADDLE") == plain | straddling
    kinds = ((0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0))
    on_rings = {(x, sinks, q_sink, sinks, cut) for x in groups - {4} for sinks, q_sink, cut in kinds}
    assert forms("prefill", head_dim, "_forward", "GROUPS", "SINKS", "Q_SINK", "LANES", "CUT") == on_rings
    assert forms("prefill", head_dim, "combine_cut", "GROUPS") == {(x,) for x in groups - {4}}
    assert {name for name, _ in launches("forward", head_dim)} >= ({"forward_small"} if head_dim == 64 else set())


@pytest.mark.parametrize("head_dim", [64, 128])
def test_backward_in_every_form(head_dim) -> None:
    fused = "fused_narrow_kernel" if head_dim == 64 else "fused_kernel"
    rows = IN_TURN[head_dim].turn_rows
    assert FAST[head_dim].turn_rows == 0
    assert forms("backward", head_dim, fused, "TURN_ROWS", "Q_SINK") == {(x, y) for x in (0, rows) for y in (0, 1)}
    assert forms("backward", head_dim, "dq_kernel", "Q_SINK") == forms("backward", head_dim, "dkv_kernel", "Q_SINK")
    assert forms("backward", head_dim, "dq_kernel", "Q_SINK") == {(False,), (True,)}
    others = {name for name, _ in launches("backward", head_dim)} - {fused, "dq_kernel", "dkv_kernel"}
    assert others == {"row_terms_kernel", "start_turns_kernel", "cast_kernel"}
    assert forms("backward", head_dim, "cast_kernel", "TWO") == {(False,), (True,)}


@pytest.mark.parametrize("head_dim", [64, 128])
def test_decode_in_every_form(head_dim) -> None:
    found = forms("decode", head_dim, "decode_persistent", "W", "BN", "STAGES", "Q_SINK", "HAS_LANES")
    found |= {(1, *x) for x in forms("decode", head_dim, "decode_small", "BN", "STAGES", "Q_SINK", "HAS_LANES")}
    configs = [(x.warpgroups, x.key_tile, x.stages) for x in DECODE[head_dim]]
    assert found == {(*x, q_sink, lanes) for x in configs for q_sink in (0, 1) for lanes in (0, 1)}
    assert "combine" in {name for name, _ in launches("decode", head_dim)}
