"""What the fused backward kernels share: where a program works, and the producer.

`shape` is (heads, heads of a group, B * Hkv); `i_work` counts tiles of keys, all heads of a tile in a row.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .backward_ranges import query_walk
from .backward_shared import next_stage
from .compat import box, tma_load


@gluon.jit
def place(i_work, kv_heads, heads_in_all, BLOCK_N: gl.constexpr):
    """Return (batch row, kv head, first key) of a piece of work: tile by tile, all heads of a tile in a row."""
    i_kv = i_work % heads_in_all
    return i_kv // kv_heads, i_kv % kv_heads, i_work // heads_in_all * BLOCK_N


@gluon.jit
def walk_grid(first, pattern, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Return the query range of a tile of keys, its start on the grid of query tiles, and the range all keys share."""
    start, stop, all_start, all_stop = query_walk(first, pattern, BLOCK_N)
    return start // BLOCK_M * BLOCK_M, stop, all_start, all_stop


@gluon.jit
def produce(inputs, buffers, barriers, i_work, pattern, shape):
    """Load the keys and values once, then every tile of queries with its terms, head by head."""
    q_desc, grad_desc, k_desc, v_desc, lse_desc, delta_desc = inputs
    q_smem, grad_smem, k_smem, v_smem, lse_smem, delta_smem, _, _, _ = buffers
    keys_full, full, empty, _, _ = barriers
    heads, group, kv_in_all = shape
    STAGES: gl.constexpr = q_smem.shape[0]
    BLOCK_M: gl.constexpr = q_smem.shape[1]
    BLOCK_N: gl.constexpr = k_smem.shape[0]
    D: gl.constexpr = k_smem.shape[1]
    i_b, i_h, first = place(i_work, heads // group, kv_in_all, BLOCK_N)
    start, stop, _, _ = walk_grid(first, pattern, BLOCK_M, BLOCK_N)
    mbarrier.expect(keys_full, 2 * BLOCK_N * D * 2)
    tma_load(k_desc, [i_b, i_h, first, 0], keys_full, box(k_smem, BLOCK_N, D))
    for w in gl.static_range(2):
        tma_load(v_desc, [i_b, i_h, first + w * 64, 0], keys_full, box(v_smem.index(w), 64, D))
    stage = 0
    phase = 1
    for i_head in range(i_h * group, i_h * group + group):
        for row in range(start, stop, BLOCK_M):
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(ready, 2 * BLOCK_M * (D * 2 + 4))
            tma_load(q_desc, [i_b, i_head, row, 0], ready, box(q_smem.index(stage), BLOCK_M, D))
            tma_load(grad_desc, [i_b, i_head, row, 0], ready, box(grad_smem.index(stage), BLOCK_M, D))
            tma_load(lse_desc, [i_b * heads + i_head, row], ready, lse_smem.index(stage))
            tma_load(delta_desc, [i_b * heads + i_head, row], ready, delta_smem.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
