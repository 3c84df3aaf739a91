"""The warp of a fused backward kernel that loads: a tile of keys and values once, then the queries that see it."""

# ruff: noqa: RUF059 (tuples travel whole between the partitions; each names all that it gets)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .backward_ranges import next_row, walk_grid, work_of
from .backward_shared import load_queries
from .compat import box, tma_load
from .pipeline import next_stage


@gluon.jit
def load(inputs, buffers, barriers, i_work, pattern, shape, DOWN: gl.constexpr, Q_SINK: gl.constexpr):
    """Load the keys and values of a piece of work, then every tile of queries with its terms, head by head.

    inputs: the descriptors of q, q_sink, dout, k, v and both row terms. buffers: of k, v, q, dout and both row terms.
    barriers: that of the keys, and those that tell when a stage of queries is full and when it is empty.
    """
    q_desc, q_sink_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc = inputs
    k_smem, v_smem, q_smem, grad_smem, lse_smem, delta_smem = buffers
    keys_full, full, empty = barriers
    heads, group, kv_in_all, together = shape
    STAGES: gl.constexpr = q_smem.shape[0]
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    BLOCK_N: gl.constexpr = k_smem.shape[0]
    D: gl.constexpr = k_smem.shape[1]
    in_sinks, part, i_b, i_h, first, i_sums = work_of(i_work, pattern, shape, BLOCK_N, Q_SINK)
    tiles, from_row, to_row, _, _ = walk_grid(first, part, BLOCK_M, BLOCK_N, DOWN)
    mbarrier.expect(keys_full, 2 * BLOCK_N * D * 2)
    tma_load(k_desc, [i_b, i_h, first, 0], keys_full, box(k_smem, BLOCK_N, D))
    for w in gl.static_range(2):
        tma_load(v_desc, [i_b, i_h, first + w * 64, 0], keys_full, box(v_smem.index(w), 64, D))
    stage = 0
    phase = 1
    i_head = i_h * group
    row = from_row
    for _ in range(group * tiles):
        ready = full.index(stage)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(ready, 2 * BLOCK_M * (D * 2 + 4))
        load_queries(q_desc, q_sink_desc, in_sinks, [i_b, i_head, row, 0], ready, q_smem.index(stage), Q_SINK)
        tma_load(lse_desc, [i_b * heads + i_head, row], ready, lse_smem.index(stage))
        tma_load(grad_desc, [i_b, i_head, row, 0], ready, box(grad_smem.index(stage), BLOCK_M, D))
        tma_load(delta_desc, [i_b * heads + i_head, row], ready, delta_smem.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
        i_head += (row == to_row).to(gl.int32)
        row = next_row(row, from_row, to_row, BLOCK_M, DOWN)
