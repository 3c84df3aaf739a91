"""Every Triton kernel compiles for every supported architecture within its shared memory and spill limits."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from aot import Case, check_hopper_instructions, check_limits
from portable_cases import forward_case, gradient_case, row_terms_case

from swba_kernels.portable.tiles import choose_tile

CAPABILITY = {80: (8, 0), 86: (8, 6), 89: (8, 9), 90: (9, 0), 100: (10, 0)}
ARCHITECTURES = (80, 90, 100)


def tiled(kernel: str, head_dim: int, dtype: str, arch: int, **options) -> Case:
    tile = choose_tile(kernel, head_dim, 4 if dtype == "fp32" else 2, CAPABILITY[arch])
    if kernel == "forward":
        return forward_case(head_dim, dtype, tile, **options)
    return gradient_case(kernel, head_dim, dtype, tile, **options)


def table() -> list[tuple[int, Case, int]]:
    """Return (architecture, case, bytes a thread may spill)."""
    rows = []
    for arch in ARCHITECTURES:
        rows += [(arch, tiled("forward", 64, "bf16", arch), 0), (arch, tiled("forward", 128, "bf16", arch), 48)]
        rows += [(arch, tiled("dkv", 64, "bf16", arch), 16), (arch, tiled("dkv", 128, "bf16", arch), 256)]
        rows += [(arch, tiled("dq", 64, "bf16", arch), 8), (arch, tiled("dq", 128, "bf16", arch), 0)]
        rows += [(arch, tiled(kernel, 256, "bf16", arch), 256) for kernel in ("forward", "dkv", "dq")]
        rows += [(arch, tiled("forward", 128, "bf16", arch, ring=True), 256), (arch, row_terms_case(128, "bf16"), 0)]
    rows += [(86, tiled(kernel, d, "bf16", 86), 256) for kernel in ("forward", "dkv", "dq") for d in (64, 128, 256)]
    rows += [(86, tiled(kernel, d, "fp32", 86), 512) for kernel in ("forward", "dkv", "dq") for d in (64, 128, 256)]
    rows += [(86, tiled("forward", d, dtype, 86, ring=True), 512) for d in (128, 256) for dtype in ("bf16", "fp32")]
    rows += [(89, tiled(kernel, d, "bf16", 89), 256) for kernel in ("forward", "dkv", "dq") for d in (64, 128)]
    rows += [(90, tiled(kernel, d, "fp32", 90), 512) for kernel in ("forward", "dkv", "dq") for d in (64, 128, 256)]
    rows += [(90, tiled(kernel, 80, "fp16", 90, group=4), 400) for kernel in ("forward", "dkv", "dq")]
    for arch in ARCHITECTURES:
        rows += [(arch, tiled("forward", d, "bf16", arch, q_sink=True), 64) for d in (64, 128)]
        rows += [(arch, tiled("forward", d, "bf16", arch, ring=True, q_sink=True), 320) for d in (64, 128)]
        rows += [(arch, tiled("dkv", d, "bf16", arch, q_sink=True), 256) for d in (64, 128)]
        rows += [(arch, tiled("dq", d, "bf16", arch, q_sink=True), 8) for d in (64, 128)]
    rows += [(86, tiled(kernel, 256, "bf16", 86, q_sink=True), 256) for kernel in ("forward", "dkv", "dq")]
    rows += [(90, tiled(kernel, 128, "fp32", 90, q_sink=True), 512) for kernel in ("forward", "dkv", "dq")]
    return rows


@pytest.mark.aot
@pytest.mark.parametrize(("arch", "case", "spills"), [pytest.param(*x, id=f"sm_{x[0]} {x[1].name}") for x in table()])
def test_kernel_compiles_within_its_limits(arch: int, case: Case, spills: int) -> None:
    check_limits(case, arch, spills)


@pytest.mark.aot
@pytest.mark.parametrize("q_sink", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", ["forward", "dkv", "dq"])
def test_hopper_kernels_use_its_matmul_instruction_and_asynchronous_copies(
    kernel: str, head_dim: int, q_sink: bool
) -> None:
    check_hopper_instructions(tiled(kernel, head_dim, "bf16", 90, q_sink=q_sink))
