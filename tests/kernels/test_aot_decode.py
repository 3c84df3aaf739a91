"""Decode, its merge and the ring write compile for every architecture within shared memory and spill limits."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from aot import SHARED_LIMIT, Case, check_hopper_instructions, check_limits

from swba_kernels.portable import decode, ring
from swba_kernels.portable.tiles import padded_head_dim

SPECIAL = {
    "scale": "fp32",
    "p_valid": "*i64",
    "p_lanes": "*i64",
    "p_position": "*i64",
    "p_part": "*fp32",
    "p_part_lse": "*fp32",
    "p_lse": "*fp32",
}
ROW_NUMBERS = {"stride_valid", "stride_lanes", "stride_position"}


def case_of(name: str, kernel, dtype: str, constants: dict[str, object], warps: int = 4, stages: int = 3) -> Case:
    names = [x for x in kernel.arg_names if x not in constants]
    types = {x: SPECIAL.get(x, f"*{dtype}" if x.startswith("p_") else "i32") for x in names}
    strides = frozenset(x for x in names if x.startswith("stride_")) - ROW_NUMBERS
    return Case(name, kernel, types, constants, warps, stages, divisible=strides)


def decode_case(arch: int, head_dim: int, dtype: str, rows: int, split: bool = True, q_sink: bool = False) -> Case:
    block_d = padded_head_dim(head_dim)
    tile = decode.decode_tile(rows, block_d, 4 if dtype == "fp32" else 2, SHARED_LIMIT[arch])
    constants = {
        "D": head_dim, "BLOCK_D": block_d, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "SPLIT": split,
        "TAIL_STAGES": 2, "HAS_LANES": split, "HAS_Q_SINK": q_sink, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    if not q_sink:
        constants |= dict.fromkeys(("p_q_sink", "sink", "sink_splits", "stride_sb", "stride_sh", "stride_sn"))
    name = f"decode D{head_dim} {dtype} {tuple(tile)} split={split} q_sink={q_sink}"
    return case_of(name, decode._decode_kernel, dtype, constants, tile.warps, tile.stages)


def table() -> list[tuple[int, Case, int]]:
    """Return (architecture, case, bytes a thread may spill)."""
    small = {"D": 64, "BLOCK_D": 64}
    rows = [(90, decode_case(90, d, "bf16", n), 128) for d in (64, 128) for n in (16, 9999)]
    rows += [(90, decode_case(90, 64, "bf16", 9999, split=False), 128)]
    rows += [(arch, decode_case(arch, d, "bf16", 9999, q_sink=True), 128) for arch in (80, 90, 100) for d in (64, 128)]
    rows += [(90, decode_case(90, 256, "fp16", 9999), 192), (90, decode_case(90, 128, "fp32", 9999), 128)]
    rows += [(90, decode_case(90, 40, "bf16", 10, split=False), 0)]
    rows += [(arch, decode_case(arch, d, "bf16", 9999), 256) for arch in (80, 86, 100) for d in (64, 128, 256)]
    rows += [(86, decode_case(86, d, "fp32", 9999), 256) for d in (64, 128, 256)]
    rows += [(89, decode_case(89, d, "bf16", 9999), 256) for d in (64, 128)]
    for arch in (80, 90, 100):
        rows += [(arch, case_of("combine", decode._combine_kernel, "bf16", small | {"BLOCK_R": 16}), 0)]
        constants = small | {"BLOCK_N": 32, "HAS_LANES": True}
        rows += [(arch, case_of("ring write", ring._ring_write_kernel, "bf16", constants), 0)]
    return rows


@pytest.mark.aot
@pytest.mark.parametrize(("arch", "case", "spills"), [pytest.param(*x, id=f"sm_{x[0]} {x[1].name}") for x in table()])
def test_kernel_compiles_within_its_limits(arch: int, case: Case, spills: int) -> None:
    check_limits(case, arch, spills)


@pytest.mark.aot
@pytest.mark.parametrize("q_sink", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decode_on_hopper_uses_its_matmul_instruction_and_asynchronous_copies(head_dim: int, q_sink: bool) -> None:
    check_hopper_instructions(decode_case(90, head_dim, "bf16", 9999, q_sink=q_sink))
