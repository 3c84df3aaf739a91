"""Every Hopper kernel that the benchmark's shapes launch compiles, without a GPU, within the limits of sm_90.

`make aot` runs this under each pinned Triton. B batch or lanes, H heads, N tokens, D head dim.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import specialized
import torch
from aot import SHARED_LIMIT, Report, assembler_warnings, compile_launches, instructions
from hopper_launches import cut_decode, empty, on_ring, prefill, rows, straddle, stream, train

from swba_infer.bench.shapes import SETS, Shape
from swba_kernels.hopper.assembler import tritons_own_assembler
from swba_kernels.hopper.decode_plan import CONFIGS, Config
from swba_kernels.hopper.starts import START
from swba_kernels.hopper.supports import build_obstacle

pytestmark = pytest.mark.gluon

# Those that Triton numbers itself and those by which consumers take turns must not meet.
HARDWARE_BARRIER = re.compile(r"\b(?:bar|barrier)\.(?:cta\.)?(?:sync|arrive)(?:\.aligned)?\s+(\d+)(?:,\s*(\d+))?;")

SHARED = 228 * 1024  # bytes that the CTAs of a multiprocessor share

NO_MATMUL = {"combine", "combine_cut", "row_terms_kernel", "start_turns_kernel", "cast_kernel"}

# Bytes a thread may spill, by Triton version and kernel: what was found when they were recorded. None elsewhere.
# "q_sink" is for calls with queries of their own for the sinks, "prefill" for a ring, "straddling" for tiles that
# straddle blocks.
SPILLS = {  # the backward's accumulators fill the registers
    "3.6": {"fused_kernel": 8},
    "3.7": {"fused_kernel": 8},
    "3.6 q_sink": {
        "_forward": 16,
        "dkv_kernel": 56,
        "fused_kernel": 40,
        "fused_narrow_kernel": 32,
        "decode_persistent": 16,
    },
    "3.7 q_sink": {
        "_forward": 16,
        "dkv_kernel": 56,
        "fused_kernel": 40,
        "fused_narrow_kernel": 32,
        "decode_persistent": 16,
    },
    "3.9 q_sink": {"_forward": 16, "dq_kernel": 8, "fused_kernel": 32, "decode_persistent": 8},
    "3.6 prefill": {"_forward": 8},
    "3.7 prefill": {"_forward": 16},
    "3.9 prefill": {"_forward": 16},
    "3.6 straddling": {"_forward": 8},
    "3.7 straddling": {"_forward": 8},
    "3.9 straddling": {"_forward": 8},
}


PREFILLS = [
    (64, 64, 0, True),
    (64, 256, 100, True),
    (64, 333, 0, False),
    (128, 64, 100, False),
    (128, 256, 0, True),
    (128, 1560, 100, True),
]


def check(launches: list[tuple[str, Report]], kind: str = "") -> None:
    import triton

    allowed = SPILLS.get(".".join(triton.__version__.split(".")[:2]) + kind, {})
    assert launches
    for name, report in launches:
        assert report.shared <= SHARED_LIMIT[90], name
        assert report.spills <= allowed.get(name, 0), f"{name}: {report.spills} bytes a thread"
        barriers = set(HARDWARE_BARRIER.findall(report.ptx))
        for barrier, threads in barriers:
            assert (int(barrier) >= START.value) == (threads == "256"), f"{name}: barrier {barrier}, {threads} threads"
        assert name != "fused_kernel" or {(str(START.value + i), "256") for i in (0, 1)} <= barriers
        if name not in NO_MATMUL:
            assert "wgmma.mma_async" in report.ptx, name
            assert "cp.async.bulk.tensor" in report.ptx, name
            with tritons_own_assembler():
                assert not assembler_warnings(report.ptx), name


def _one_of_each_kind(shapes: Sequence[Shape]) -> list[Shape]:
    """Return the first shape of each head dim, dtype and kind of block, short or long: others compile the same."""
    kinds = {
        (shape.head_dim, shape.dtype, shape.pattern.block_size > 128, shape.batch > 1): shape
        for shape in reversed(shapes)
    }
    return list(kinds.values())


def test_this_triton_can_build_the_kernels() -> None:
    assert build_obstacle() is None


@pytest.mark.parametrize("shape", SETS["training"] + SETS["odd-training"], ids=lambda shape: shape.name)
def test_training_kernels(shape: Shape) -> None:
    launches = compile_launches(lambda: train(shape))
    assert {name for name, _ in launches} & {"_forward", "forward_small"}
    check(launches, " q_sink" if shape.sink_blocks else "")  # who adds in turn meets sinks apart, as with q_sink


@pytest.mark.parametrize("shape", _one_of_each_kind(SETS["training"]), ids=lambda shape: shape.name)
def test_training_kernels_with_queries_of_their_own_for_the_sinks(shape: Shape) -> None:
    check(compile_launches(lambda: train(shape, sink=100)), " q_sink")


@pytest.mark.parametrize("sink", [0, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_forward_kernels_whose_tiles_straddle_blocks(head_dim: int, dtype: torch.dtype, sink: int) -> None:
    launches = compile_launches(lambda: straddle(head_dim, dtype, sink))
    assert {name for name, _ in launches} == {"_forward"}
    check(launches, " straddling")


def test_strides_beyond_32_bits_are_used_whole() -> None:
    """Rows that end a block are stored by address: a batch stride of 4.3e9 must not lose its upper half."""
    from swba_kernels.hopper.forward import forward

    q, k = (empty(2, heads, 840_000, 128, dtype=torch.bfloat16) for heads in (40, 8))
    assert q.stride(0) > 2**32
    options = {"block_size": 1560, "window": 9360, "sink": 0, "grid_start": 0}
    ((_, report),) = compile_launches(lambda: forward(q, k, k, scale=0.1, **options))
    registers = re.findall(r"ld\.param\.b64\s+(%rd\d+),", report.ptx)
    assert any(re.search(rf"mul\.lo\.s64\s+%rd\d+, {register}, ", report.ptx) for register in registers)


@pytest.mark.parametrize("shape", SETS["decode"] + SETS["odd-decode"], ids=lambda shape: shape.name)
def test_decode_kernels(shape: Shape) -> None:
    launches = compile_launches(lambda: stream(shape)) + compile_launches(lambda: stream(shape, rows(shape.batch)))
    assert {name for name, _ in launches} & {"decode_persistent", "decode_small"}
    check(launches)


@pytest.mark.parametrize("shape", _one_of_each_kind(SETS["decode"]), ids=lambda shape: shape.name)
def test_decode_kernels_with_queries_of_their_own_for_the_sinks(shape: Shape) -> None:
    launches = compile_launches(lambda: stream(shape, sink=100))
    launches += compile_launches(lambda: stream(shape, rows(shape.batch), sink=100))
    assert {name for name, _ in launches} & {"decode_persistent", "decode_small"}
    check(launches, " q_sink")


@pytest.mark.parametrize("sink", [0, 100])
@pytest.mark.parametrize(("head_dim", "config"), [(d, config) for d, configs in CONFIGS.items() for config in configs])
def test_every_configuration_of_the_decode(head_dim: int, config: Config, sink: int) -> None:
    """They spill no more than is recorded, and a multiprocessor has room for as many CTAs as plans take for granted."""
    launches = compile_launches(lambda: cut_decode(head_dim, config, sink))
    assert [name for name, _ in launches] == [
        "decode_persistent" if config.warpgroups > 1 else "decode_small",
        "combine",
    ]
    check(launches, " q_sink" if sink else "")
    report = launches[0][1]
    if config.warpgroups == 1:
        by_shared = SHARED // (-(-(report.shared + 1024) // 128) * 128)  # 1024 are the system's
        by_registers = 65536 // (-(-report.registers // 8) * 8 * 128)
        assert min(by_shared, by_registers) == config.resident


@pytest.mark.parametrize("shape", SETS["prefill"], ids=lambda shape: shape.name)
def test_prefills_of_the_benchmark(shape: Shape) -> None:
    launches = compile_launches(lambda: on_ring(shape))
    assert launches[0][0] == "_forward"
    check(launches, " prefill")


@pytest.mark.parametrize(("head_dim", "block_size", "sink", "lanes"), PREFILLS)
def test_prefill_kernels(head_dim: int, block_size: int, sink: int, lanes: bool) -> None:
    for parts in (1, 3):
        launches = compile_launches(
            lambda parts=parts: prefill(head_dim, block_size, sink, rows(2) if lanes else None, parts=parts)
        )
        assert [name for name, _ in launches] == ["_forward", "combine_cut"][: 2 if parts > 1 else 1]
        if parts > 1:
            merge = launches[1][1].ptx
            assert 0 < merge.index("griddepcontrol.wait") < merge.index("ld.global")
        check(launches, " prefill")
    if sink:
        launches = compile_launches(lambda: prefill(head_dim, block_size, sink, rows(2) if lanes else None, True))
        check(launches, " q_sink")


@pytest.mark.parametrize("name", ["train-b1-h12-d128-bs1560-ws6-n32760", "decode-b1-h12-d128-bs1560-ws21"])
def test_a_tiles_second_matmul_runs_beside_its_exponentials(name: str) -> None:
    """Between the waits for the two matmuls of a consumer's loop there are the exponentials of its 128 keys."""
    shape = next(x for x in SETS["training"] + SETS["decode"] if x.name == name)
    launches = compile_launches(lambda: train(shape) if shape.kind == "training" else stream(shape))
    report = next(report for kernel, report in launches if kernel in ("_forward", "decode_persistent"))
    beside, counts = None, []
    for instruction in instructions(report.cubin):
        if "WARPGROUP.DEPBAR" in instruction:
            if instruction.endswith("0x1"):
                beside = 0
            elif beside is not None:
                counts.append(beside)
                beside = None
        elif beside is not None and "MUFU.EX2" in instruction:
            beside += 1
    assert len(counts) >= 2
    assert min(counts) >= 64


@pytest.mark.parametrize("name", specialized.KERNELS)
def test_kernels_for_racecheck_differ_by_an_mbarrier(name: str) -> None:
    ((_, report),) = compile_launches(lambda: specialized.call(name, "meta"))
    assert "ld.shared" in report.ptx
    assert ("mbarrier" in report.ptx) == (name == "by_a_barrier")
