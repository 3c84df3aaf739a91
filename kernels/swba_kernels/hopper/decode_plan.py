"""Who computes what in a decode call: tiles of query rows, the parts that their keys are cut into, and the CTA of each.

A tile is W * 64 query rows of one head. Its keys are cut in fractions of the ring's capacity, counted in key tiles, so
that one plan serves every filled length and every step of a CUDA graph. How a lane's tiles are cut depends on
capacities alone and is the same for every lane, whatever rows a call has: a lane's bits depend on nothing else. Only
the assignment of the parts to CTAs sees the number of rows.

B rows of the call, L ring lanes, W warpgroups of 64 query rows in a tile, C key tiles of a full ring (of rings beyond
2^18 slots, as many equal fractions as that has tiles).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from triton.experimental import gluon

# Beyond these, fractions of a ring are longer than its key tiles: so a fraction times the key tiles of a ring of 2^25
# slots fits 32 bits, which divide fast.
MOST_SLOTS_BY_TILES = 4096 * 64


@gluon.jit
def key_tiles_of_part(low, high, valid, slot_tiles, BN):
    """Return the key tiles [first, last) of the part [low, high) of `slot_tiles` when `valid` slots are filled."""
    filled = (valid + BN - 1) // BN
    return low * filled // slot_tiles, high * filled // slot_tiles


@gluon.jit
def runs_of_part(low, high, valid, sink, slot_tiles, BN):
    """Return the two runs of key tiles of a part when sinks are read by queries of their own: theirs, then the rest.

    A run is (tiles, first slot, how far that lies behind the lowest slot that counts), the latter negative if the first
    tile is ragged. The filled sinks have tiles of their own, counted back from their end, as the slots behind them
    have theirs. The part is a fraction of both: the sinks' tiles come last.
    """
    sinks = min(sink, valid)
    window_tiles = (valid - sinks + BN - 1) // BN
    filled = window_tiles + (sinks + BN - 1) // BN
    first = low * filled // slot_tiles
    last = high * filled // slot_tiles
    sink_last = max(last - window_tiles, 0)
    window_last = min(last, window_tiles)
    sink_slot = sinks - sink_last * BN
    window_slot = valid - window_last * BN
    of_sinks = (sink_last - max(first - window_tiles, 0), sink_slot, sink_slot)
    return of_sinks, (window_last - min(first, window_tiles), window_slot, window_slot - sinks)


class Costs(NamedTuple):
    """Cycles of a call besides those of its tiles.

    Attributes:
        start: of a launch until its first matmul.
        part: besides its key tiles: queries, first scores, last matmul, result.
        merge: of the merge's launch and its first loads.
        merge_bytes: of partial results, written and read in a cycle.
    """

    start: float
    part: float
    merge: float
    merge_bytes: float


class Config(NamedTuple):
    """Tiles and pipeline of a decode kernel.

    Attributes:
        warpgroups: of 64 query rows in a tile; 1 is the kernel of decode_small.py, 2 to 4 that of decode_persistent.py.
        key_tile: keys of a tile.
        stages: key tiles, and as many value tiles, under way.
        cycles: of a CTA on a full multiprocessor for a tile of queries against a tile of keys.
        costs: besides those.
        turns: whether the consumers take turns at the tensor cores.
        registers: of a consumer's thread.
        resident: CTAs that a multiprocessor has room for. A launch that follows another one is not spread evenly: some
            multiprocessors get as many as they can hold, while others stay empty. So where fewer CTAs would do, more
            stages keep others out. (Launches of some dozens are spread; there more stages only take longer to start, by
            3% of a call, which the costs leave out.)
    """

    warpgroups: int
    key_tile: int
    stages: int
    cycles: float
    costs: Costs
    turns: bool = False
    registers: int = 240
    resident: int = 1


# Chosen on an H200. Cycles (of 1980 MHz) were fitted to whole calls, at head dim 64 to 265 of 22 shapes: mostly within
# 10% near the best of each. (Those of two consumers at head dim 128 come from kernels that took 10% longer.)
_PERSISTENT = {64: Costs(3200.0, 1700.0, 2750.0, 2080.0), 128: Costs(4700.0, 3500.0, 5000.0, 2500.0)}
_SMALL = {64: Costs(2200.0, 2000.0, 2750.0, 2080.0), 128: Costs(1430.0, 2000.0, 3500.0, 2400.0)}
CONFIGS = {
    64: (
        Config(4, 64, 3, 1890, _PERSISTENT[64], turns=True, registers=112),
        Config(3, 128, 3, 3010, _PERSISTENT[64], turns=True, registers=160),
        Config(2, 128, 3, 2300, _PERSISTENT[64], turns=True),
        Config(1, 128, 2, 3300, _SMALL[64], resident=3),
        Config(1, 128, 3, 2230, _SMALL[64], resident=2),
        Config(1, 128, 4, 1640, _SMALL[64], resident=1),
    ),
    128: (
        Config(2, 128, 2, 2160, _PERSISTENT[128]),
        Config(1, 64, 2, 1850, _SMALL[128], resident=2),
        Config(1, 64, 4, 1250, _SMALL[128], resident=1),
    ),
}

_CACHE = 48 << 20  # bytes of keys and values that CTAs at different keys share through the second-level cache
_MEMORY = 2800.0  # bytes in a cycle that such CTAs read beyond that cache; fitted, and felt at head dim 128 only
_CUT = 1.05  # slowdown of cut tiles, whose neighbours read other keys
_IDLE = 0.6  # exponent: half the rows of a tile take 2 ** -0.6 of its time, for nobody fills the waits
_SHORTEST = 2  # key tiles of a part that is worth a CTA's start
MAX_PARTS = 64  # of a tile: more leave the merge to too few CTAs
_SPLITS = (2, 3, 4, 5, 6, 8, 10, 12, 16)  # of the small kernel


class Tile(NamedTuple):
    """W * 64 query rows of a head; `weight` is its cost for each key tile, 1 if all warpgroups have rows."""

    head: int
    first: int
    weight: float


class Part(NamedTuple):
    """The fraction [low, high) of C key tiles for one tile of a lane, by its index."""

    tile: int
    low: int
    high: int


class LanePlan(NamedTuple):
    """The work of one ring lane.

    Attributes:
        tiles: its query tiles.
        bundles: parts that one CTA runs one after the other; those of cut tiles come first.
    """

    config: Config
    slot_tiles: int
    tiles: tuple[Tile, ...]
    bundles: tuple[tuple[Part, ...], ...]


class Table(NamedTuple):
    """What the kernels read.

    Attributes:
        ctas: the items are a matrix [rounds, ctas], as a list.
        items: (row, head, first query, low, high, unit, items of the CTA, 0); unit -1 writes the result, others a
            partial one. Where a CTA has fewer items than others, the rest of its column is zero.
        merges: (row, head, first query, first unit, units between parts, parts) for each 64 rows of a cut tile.
        units: 64-row units of partial results.
    """

    ctas: int
    items: list[tuple[int, ...]]
    merges: list[tuple[int, ...]]
    units: int


def query_tiles(heads: int, n: int, warpgroups: int) -> tuple[Tile, ...]:
    """Return the query tiles of a lane, head by head: neighbours share keys, so that a cache holds them."""
    rows = warpgroups * 64
    starts = [(i_h, first) for i_h in range(heads) for first in range(0, n, rows)]
    return tuple(Tile(*at, min(1.0, -(-(n - at[1]) // 64) / warpgroups) ** _IDLE) for at in starts)


def cut(tiles: Sequence[Tile], slot_tiles: int, whole: int, ranges: int) -> tuple[tuple[Part, ...], ...]:
    """Leave the first `whole` tiles whole and cut the others, laid end to end, into `ranges` bundles of equal cost.

    A cut next to a tile's end moves there.
    """
    bundles: list[list[Part]] = [[] for _ in range(ranges)]
    total = sum(tile.weight for tile in tiles[whole:])
    start = 0.0
    for i_tile, tile in enumerate(tiles[whole:], whole):
        end = start + tile.weight
        first, last = int(start / total * ranges), min(int(end / total * ranges), ranges - 1)
        edges = [0]
        for i in range(first + 1, last + 1):
            at = round((i / ranges * total - start) / tile.weight * slot_tiles)
            at = 0 if at < _SHORTEST else slot_tiles if at > slot_tiles - _SHORTEST else at
            edges.append(max(edges[-1], at))
        edges.append(slot_tiles)
        for i, (low, high) in enumerate(pairwise(edges), first):
            if low < high:
                bundles[i].append(Part(i_tile, low, high))
        start = end
    whole_tiles = [(Part(i, 0, slot_tiles),) for i in range(whole)]
    return (*(tuple(b) for b in bundles if b), *whole_tiles)


def assign(costs: Sequence[float], ctas: int) -> list[list[int]]:
    """Give each bundle, dearest first, to the CTA with the least to do; return the bundles of each in call order."""
    loads = [(0.0, i) for i in range(ctas)]
    lists: list[list[int]] = [[] for _ in range(ctas)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, cta = heapq.heappop(loads)
        lists[cta].append(i)
        heapq.heappush(loads, (load + costs[i], cta))
    return [sorted(x) for x in lists]


def bundle_costs(plan: LanePlan, cut: float = _CUT) -> list[float]:
    """Return the cycles of each bundle on a full multiprocessor; `cut` is the slowdown of cut tiles."""
    cycles = plan.config.cycles
    costs = []
    for bundle in plan.bundles:
        tiles = sum(plan.tiles[part.tile].weight * (part.high - part.low) for part in bundle)
        is_cut = bundle[0].high - bundle[0].low < plan.slot_tiles
        costs.append(tiles * cycles * (cut if is_cut else 1.0) + len(bundle) * plan.config.costs.part)
    return costs


def cost_of(plan: LanePlan, lanes: int, multiprocessors: int, head_dim: int) -> float:
    """Return the modelled cycles of a call for all lanes of a full ring."""
    config, counts = plan.config, parts_of(plan)
    if config.warpgroups > 1:
        heads = {tile.head for tile, count in zip(plan.tiles, counts, strict=True) if count > 1}
        held = lanes * len(heads) * plan.slot_tiles * config.key_tile * head_dim * 4
        wanted = multiprocessors * config.key_tile * head_dim * 4 / config.cycles
        bundles = bundle_costs(plan, _CUT if held <= _CACHE else max(_CUT, wanted / _MEMORY)) * lanes
        busiest = max(sum(bundles[i] for i in x) for x in assign(bundles, multiprocessors))
    else:
        waves = -(-lanes * len(plan.bundles) // (multiprocessors * config.resident))
        longest = max(part.high - part.low for bundle in plan.bundles for part in bundle)
        busiest = waves * (longest * config.cycles + config.costs.part)
    units = lanes * config.warpgroups * sum(count for count in counts if count > 1)
    merge = config.costs.merge + units * 64 * head_dim * 8 / config.costs.merge_bytes if units else 0.0
    return config.costs.start + busiest + merge


def lane_plans(config: Config, heads: int, n: int, slots: int, lanes: int, multiprocessors: int) -> list[LanePlan]:
    """Return the plans worth comparing: all tiles whole, the last wave cut or the last two, every tile cut alike."""
    tiles = query_tiles(heads, n, config.warpgroups)
    slot_tiles = -(-min(slots, MOST_SLOTS_BY_TILES) // config.key_tile)
    cuts = {(len(tiles), 0)}
    if config.warpgroups == 1:
        cuts |= {(0, len(tiles) * splits) for splits in _SPLITS if splits * _SHORTEST <= slot_tiles}
    else:
        waves = lanes * len(tiles) // multiprocessors
        for whole in {min(len(tiles), w * multiprocessors // lanes) for w in (waves, waves - 1) if w >= 0}:
            most = (len(tiles) - whole) * slot_tiles // _SHORTEST
            for ranges in {multiprocessors // lanes, -(-multiprocessors // lanes), 2 * multiprocessors // lanes}:
                if min(ranges, most) > 0:
                    cuts.add((whole, min(ranges, most)))
        if lanes * len(tiles) * 2 <= multiprocessors:
            splits = min(multiprocessors // (lanes * len(tiles)), max(1, slot_tiles // _SHORTEST))
            cuts.add((0, len(tiles) * splits))
    plans = [LanePlan(config, slot_tiles, tiles, cut(tiles, slot_tiles, *c)) for c in sorted(cuts)]
    return [plan for plan in plans if max(parts_of(plan)) <= MAX_PARTS]


def is_small(heads: int, n: int, lanes: int, multiprocessors: int) -> bool:
    """Tell whether a call has so few tiles of 64 query rows that the kernel for those is worth a look."""
    return lanes * heads * -(-n // 64) <= 4 * multiprocessors


def parts_of(plan: LanePlan) -> list[int]:
    """Return into how many parts each tile is cut."""
    counts = [0] * len(plan.tiles)
    for bundle in plan.bundles:
        for part in bundle:
            counts[part.tile] += 1
    return counts


@lru_cache(maxsize=1024)
def plan_lane(
    head_dim: int, heads: int, n: int, slots: int, lanes: int, multiprocessors: int, config: Config | None = None
) -> LanePlan:
    """Choose configuration and cuts from capacities only.

    Args:
        head_dim: 64 or 128.
        heads: query heads.
        n: queries of a head.
        slots: of a lane.
        lanes: of the ring.
        multiprocessors: of the GPU.
        config: replaces the choice among CONFIGS.
    """
    small = is_small(heads, n, lanes, multiprocessors)
    configs = (config,) if config else [c for c in CONFIGS[head_dim] if c.warpgroups > 1 or small]
    plans = [x for c in configs for x in lane_plans(c, heads, n, slots, lanes, multiprocessors)]
    return min(plans, key=lambda plan: cost_of(plan, lanes, multiprocessors, head_dim))


def table_of(plan: LanePlan, rows: int, n: int, multiprocessors: int) -> Table:
    """Assign the work of `rows` lanes to CTAs, cut tiles first, so that the CTAs go through whole ones side by side."""
    w = plan.config.warpgroups
    counts = parts_of(plan)
    units, first_unit = 0, [-1] * len(counts)
    for i, count in enumerate(counts):
        if count > 1:
            first_unit[i] = units
            units += count * w
    ctas = min(multiprocessors * plan.config.resident, rows * len(plan.bundles))
    lists = assign(bundle_costs(plan) * rows, ctas)
    seen = [[0] * len(counts) for _ in range(rows)]
    items_of_bundle = []
    for b in range(rows):
        for bundle in plan.bundles:
            items = []
            for part in bundle:
                tile, unit = plan.tiles[part.tile], first_unit[part.tile]
                if unit >= 0:
                    unit += b * units + seen[b][part.tile] * w
                    seen[b][part.tile] += 1
                items.append((b, tile.head, tile.first, part.low, part.high, unit))
            items_of_bundle.append(items)
    columns = [
        [item for i in sorted(x, key=lambda i: items_of_bundle[i][0][5] < 0) for item in items_of_bundle[i]]
        for x in lists
    ]
    rounds = max(len(column) for column in columns)
    items = [(*column[r], len(column), 0) if r < len(column) else (0,) * 8 for r in range(rounds) for column in columns]
    merges = [
        (b, tile.head, tile.first + 64 * i, b * units + first_unit[i_tile] + i, w, counts[i_tile])
        for b in range(rows)
        for i_tile, tile in enumerate(plan.tiles)
        if counts[i_tile] > 1
        for i in range(w)
        if tile.first + 64 * i < n
    ]
    return Table(ctas, items, merges, rows * units)
