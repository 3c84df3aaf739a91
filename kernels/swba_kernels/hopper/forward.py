"""Forward attention over the block window on Hopper, for training and for prefill on top of a ring's history.

A CTA is one producer (forward_producer.py) and two to four consumers (forward_consumer.py). CTAs are persistent: the
producer takes one work item of forward_plan.py after the other, and tells its consumers by a note. On a ring some
items may come in parts (forward_cut.py), which a second launch adds up. Small blocks at head dim 64 have a kernel of
their own (forward_small.py).

B batch, H query heads, Hkv key/value heads, N tokens, D head dim, L ring lanes, S ring slots.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..portable.forward import LOG2E, Ring
from .assembler import own_assembler
from .combine import PARTS_AT_ONCE, combine_cut, rows_of_program
from .forward_consumer import consume
from .forward_cut import Cut, Cuts, Load, choose_cut
from .forward_outputs import Outputs
from .forward_plan import plan_forward
from .forward_producer import Inputs, produce
from .forward_shared import Bars, Buffers, Call
from .forward_small import KEYS, forward_small, serves
from .launch import descriptor, multiprocessors
from .notes import notes_of
from .supports import sees_all


@own_assembler
@gluon.jit(
    do_not_specialize=[
        "s_ob", "s_oh", "s_on", "scale2", "heads", "group", "n", "block_size", "window", "sink", "grid_start",
        "ring_window", "heavy_items", "group_items", "last", "per_block", "lacking", "heavy", "light", "items",
        "whole_items", "whole", "cut", "parts",
    ],
    do_not_specialize_on_alignment=["p_position", "p_lanes"],
)  # fmt: skip
def _forward(
    q_desc, q_sink_desc, k_desc, v_desc, out_desc, ring_k_desc, ring_v_desc, p_out, p_lse, p_position, p_lanes,
    s_ob, s_oh, s_on, scale2, heads, group, n, block_size, window, sink, grid_start, ring_window,
    heavy_items, group_items, last, per_block, lacking, heavy, light, items, p_ticket,
    whole_items, whole, cut, parts, p_part, p_part_lse,
    GROUPS: gl.constexpr, COLUMNS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, TURNS: gl.constexpr, SINKS: gl.constexpr, RING: gl.constexpr, LANES: gl.constexpr,
    Q_SINK: gl.constexpr, STRADDLE: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """Set up shared memory and barriers, then split into one producer and GROUPS consumers."""
    ROWS: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [Q_STAGES * GROUPS, 64, D], ROWS)
    k_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, COLUMNS, D], ROWS)
    v_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, COLUMNS, D], ROWS)
    out_smem = gl.allocate_shared_memory(q_desc.dtype, [GROUPS, 64, D], ROWS)
    notes = notes_of(Q_STAGES)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=GROUPS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    fence_async_shared()
    inputs = Inputs(q_desc, q_sink_desc, k_desc, v_desc, ring_k_desc, ring_v_desc)
    outputs = Outputs(out_desc, p_out, s_ob, s_oh, s_on, p_lse)
    buffers = Buffers(q_smem, k_smem, v_smem, out_smem, notes)
    bars = Bars(q_full, q_empty, k_full, k_empty, v_full, v_empty)
    call = Call(
        heads, group, n, block_size, window, sink, grid_start, ring_window, p_position, p_lanes,
        heavy_items, group_items, last, per_block, lacking, heavy, light, items, p_ticket,
    )  # fmt: skip
    cuts = Cuts(whole_items, whole, cut, parts, p_part, p_part_lse)
    gl.static_assert(not CUT or (RING and not Q_SINK and not STRADDLE))
    SEGMENTS: gl.constexpr = (5 if Q_SINK else 4) if RING else (2 if SINKS else 1)
    # Constants cannot sit in a tuple bound to a name, so the argument lists are spelled out.
    if GROUPS == 2:
        gl.warp_specialize([
            (consume, (outputs, buffers, bars, call, cuts, scale2, SEGMENTS, RING, Q_SINK, STRADDLE, CUT, TURNS, 0)),
            (consume, (outputs, buffers, bars, call, cuts, scale2, SEGMENTS, RING, Q_SINK, STRADDLE, CUT, TURNS, 1)),
            (produce, (inputs, buffers, bars, call, cuts, SINKS, RING, LANES, Q_SINK, STRADDLE, CUT)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    elif GROUPS == 3:
        gl.warp_specialize([
            (consume, (outputs, buffers, bars, call, cuts, scale2, SEGMENTS, RING, Q_SINK, STRADDLE, CUT, TURNS, 0)),
            (consume, (outputs, buffers, bars, call, cuts, scale2, SEGMENTS, RING, Q_SINK, STRADDLE, CUT, TURNS, 1)),
            (consume, (outputs, buffers, bars, call, cuts, scale2, SEGMENTS, RING, Q_SINK, STRADDLE, CUT, TURNS, 2)),
            (produce, (inputs, buffers, bars, call, cuts, SINKS, RING, LANES, Q_SINK, STRADDLE, CUT)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (outputs, buffers, bars, call, cuts, scale2, SEGMENTS, RING, Q_SINK, STRADDLE, CUT, TURNS, 0)),
            (consume, (outputs, buffers, bars, call, cuts, scale2, SEGMENTS, RING, Q_SINK, STRADDLE, CUT, TURNS, 1)),
            (consume, (outputs, buffers, bars, call, cuts, scale2, SEGMENTS, RING, Q_SINK, STRADDLE, CUT, TURNS, 2)),
            (consume, (outputs, buffers, bars, call, cuts, scale2, SEGMENTS, RING, Q_SINK, STRADDLE, CUT, TURNS, 3)),
            (produce, (inputs, buffers, bars, call, cuts, SINKS, RING, LANES, Q_SINK, STRADDLE, CUT)),
        ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24])  # fmt: skip


class Config(NamedTuple):
    """Consumers (64 query rows each), keys of a tile, stages of K and V, stages of Q, registers of a consumer's thread,
    whether consumers start their matmuls in turn, TFLOP/s on 132 multiprocessors in a tile without idle consumers, and
    the rate of tiles that straddle blocks against it: they have masks, and keys that a consumer's rows do not see."""

    groups: int
    columns: int
    stages: int
    q_stages: int
    registers: int
    turns: bool
    rate: float
    straddling_rate: float = 0.9


# The fastest of five to eight each on an H200 (triton 3.6.0): blocks of 128 to 4680 tokens.
CONFIGS = {
    128: (Config(2, 128, 2, 2, 240, False, rate=720.0),),
    64: (
        Config(3, 128, 2, 2, 160, True, rate=564.0),
        Config(4, 64, 3, 2, 112, True, rate=550.0, straddling_rate=0.86),
        Config(2, 128, 3, 2, 240, True, rate=489.0, straddling_rate=0.93),
    ),
}
_PARTIAL = 0.8  # time of a tile in which a consumer is idle, whichever part of it is; of a full tile's
SMALLEST_STRADDLED = 64  # tokens of a block, so that a consumer's rows lie in two blocks at most


@lru_cache(maxsize=1024)
def choose_config(head_dim: int, block_size: int, window: int, ring: bool, straddle: bool) -> tuple[Config, bool]:
    """Return the configuration that takes least time for a block, and whether its tiles straddle blocks.

    `window` is how many keys a row sees; `straddle` tells whether tiles may.
    """

    def time(choice: tuple[Config, bool]) -> float:
        config, straddling = choice
        rows = config.groups * 64
        if straddling:  # such a tile meets the keys of all its rows: on average so many more than one row sees
            return block_size / (config.rate * config.straddling_rate) * (1 + (rows - gcd(block_size, rows)) / window)
        full, rest = divmod(block_size, rows)
        return (full + (1.0 if rest > rows - 64 else _PARTIAL if rest else 0.0)) * rows / config.rate

    # On top of a ring, four consumers would be short of registers. Three lose more than others by masks.
    choices = [(x, False) for x in CONFIGS[head_dim] if not (ring and x.groups == 4)]
    if straddle and block_size >= SMALLEST_STRADDLED:
        choices += [(x, True) for x in CONFIGS[head_dim] if x.groups != 3]
    return min(choices, key=time)


def cut_of_call(items: int, lanes: int, keys: int, config: Config, head_dim: int, multiprocessors: int) -> Cut | None:
    """Return how the `items` of a row are cut in a call on a ring, whose blocks see at most `keys` keys."""
    rows, columns = config.groups * 64, config.columns
    tile_time = rows * columns * head_dim * 4 * 132 / (config.rate * 1e6)
    return choose_cut(Load(items, -(-keys // columns), tile_time, rows, head_dim, multiprocessors), lanes)


def check_cut(cut: Cut, items: int, possible: bool) -> None:
    """Raise ValueError if a row of so many items cannot be cut like this."""
    if not possible:
        raise ValueError("cut: items are cut on a ring only, and without a q_sink")
    if min(cut) < 0 or cut.whole + cut.cut != items or cut.parts < (2 if cut.cut else 1):
        raise ValueError(f"cut: expected {items} items of a row, of which some come in two parts or more, got {cut}")


def cuts_of_call(cut: Cut | None, batch: int, groups: int, head_dim: int, device: torch.device) -> Cuts:
    """Return what the kernels are told of a cut, with new workspaces."""
    if cut is None:
        return Cuts(*[None] * len(Cuts._fields))
    rows = batch * cut.cut * cut.parts * groups * 64
    part, part_lse = (torch.empty(rows, x, dtype=torch.float32, device=device) for x in (head_dim, 1))
    return Cuts(batch * cut.whole, *cut, part, part_lse)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    block_size: int,
    window: int,
    sink: int,
    grid_start: int,
    q_sink: Tensor | None = None,
    ring: Ring | None = None,
    config: tuple[Config, bool] | None = None,
    cut: Cut | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend from each token to its block window, and to the history in `ring` if there is one.

    The bits of a row of the batch depend on its own numbers, the sizes of the call without its rows, those of the ring
    and the GPU, not on the other rows: unless they are more than the ring has lanes, when nothing is cut.

    Args:
        q: [B, H, N, D], the call's own tokens; D 64 or 128, float16 or bfloat16.
        k, v: [B, Hkv, N, D].
        scale: factor on the scores.
        block_size, window, sink: the pattern, in tokens; sinks count from the start of the stream.
        grid_start: start of the block grid relative to the call's first token, at most 0.
        q_sink: the queries that read sinks, wherever they lie, in place of q; with the shape of q.
        ring: history of each row.
        config: replaces the choice of `choose_config`, and the kernel for small blocks.
        cut: replaces the choice of `choose_cut`, on a ring and without q_sink; one that cuts nothing leaves all whole.
            (Partial results take batch * cut.cut * cut.parts * consumers * 64 * (D + 1) * 4 bytes.)

    Returns:
        out [B, H, N, D] with the dtype and layout of q; natural log-sum-exp, float32 [B, H, N].

    Raises:
        ValueError: `config` or `cut` does not fit the call.
    """
    if scale < 0:
        q, q_sink, scale = -q, None if q_sink is None else -q_sink, -scale
    batch, heads, n, head_dim = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, n, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if ring is None and sees_all(n, window, sink, q_sink):
        window, sink = n, 0
    elif ring is None:
        window, sink = min(window, n), min(sink, n)
    if config is None and ring is None and q_sink is None and serves(head_dim, block_size, n, sink):
        forward_small[(-(-n // 64) * batch * heads,)](
            descriptor(q, 64), descriptor(k, KEYS), descriptor(v, KEYS), descriptor(out, 64), lse,
            max(scale * LOG2E, 1e-30), heads, heads // k.shape[1], n, block_size, window, grid_start,
            BN=KEYS, D=head_dim, STAGES=2, num_warps=4, maxnreg=168,
        )  # fmt: skip
        return out, lse
    may_straddle = ring is None and q_sink is None and n > block_size
    if config and config[1] and (ring is not None or q_sink is not None or block_size < SMALLEST_STRADDLED):
        raise ValueError("config: tiles cannot straddle such blocks, nor where there is a ring or a q_sink")
    config, straddle = config or choose_config(
        head_dim, min(block_size, n), min(window + sink, n), ring is not None, may_straddle
    )
    weighed = (window, sink) if ring is None else (0, 0)  # on a ring all count as heavy: a row's items are in a row
    plan = plan_forward(n, block_size, *weighed, grid_start, config.groups * 64, straddle)
    rows = config.columns
    rings = (None, None) if ring is None else (descriptor(ring.k, rows), descriptor(ring.v, rows))
    position, lanes, ring_window = (None, None, 1) if ring is None else (*ring[2:], ring.k.shape[2] - sink)
    if ring is not None and q_sink is None and cut is None and batch <= ring.k.shape[0]:
        sms = multiprocessors(q.device)
        cut = cut_of_call(heads * plan.tiles, ring.k.shape[0], window + sink, config, head_dim, sms)
    elif cut is not None:
        check_cut(cut, heads * plan.tiles, ring is not None and q_sink is None)
        cut = cut if cut.cut else None
    cuts = cuts_of_call(cut, batch, config.groups, head_dim, q.device)
    items = batch * (heads * plan.tiles if cut is None else cut.whole + cut.cut * cut.parts)
    ctas = min(multiprocessors(q.device), items)
    of_plan = (batch * heads * plan.heavy, batch * heads * plan.per_block, *plan)
    ticket = (torch.zeros if items > ctas else torch.empty)(1, dtype=torch.int32, device=q.device)
    _forward[(ctas,)](
        descriptor(q, 64), None if q_sink is None else descriptor(q_sink, 64),
        descriptor(k, rows), descriptor(v, rows), descriptor(out, 64), *rings,
        out, lse, position, lanes, *out.stride()[:3], max(scale * LOG2E, 1e-30),
        heads, heads // k.shape[1], n, block_size, window, sink, grid_start, ring_window,
        *of_plan, items, ticket, *cuts,
        GROUPS=config.groups, COLUMNS=config.columns, D=head_dim, STAGES=config.stages, Q_STAGES=config.q_stages,
        REGISTERS=config.registers, TURNS=config.turns,
        SINKS=sink > 0, RING=ring is not None, LANES=lanes is not None, Q_SINK=q_sink is not None,
        STRADDLE=straddle, CUT=cut is not None, num_warps=4,
    )  # fmt: skip
    if cut is not None:
        height = rows_of_program(head_dim)
        combine_cut[(batch * cut.cut * config.groups, 64 // height)](
            cuts.p_part, cuts.p_part_lse, out, lse, *cut, heads, n, block_size, grid_start, *of_plan,
            *out.stride()[:3], GROUPS=config.groups, D=head_dim, ROWS=height, AT_ONCE=PARTS_AT_ONCE,
            num_warps=4, launch_pdl=True,
        )  # fmt: skip
    return out, lse
