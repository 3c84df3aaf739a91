"""How the decode kernel cuts its work: the tile of a program and the number of runs that the keys are cut into."""

from __future__ import annotations

from typing import NamedTuple


class DecodeTile(NamedTuple):
    """Tile of the decode kernel: query rows, keys, warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def decode_tile(rows: int, block_d: int, itemsize: int, shared_memory: int) -> DecodeTile:
    """Choose the tile for `rows` query rows per key/value head that fits into `shared_memory` bytes of a block.

    Measured on an H200 (bf16, head dims 64 and 128, 48 to 4680 rows): 64 rows and four warps, twice on a
    multiprocessor, with as many keys as that leaves room for. The other tiles were not compared.
    """
    if itemsize == 4:
        tile = DecodeTile(32, 32, 4, 2) if block_d <= 64 else DecodeTile(32, 32, 8, 2)
        tile = tile if block_d <= 128 else DecodeTile(16, 16, 8, 2)
    elif block_d <= 128:
        tile = DecodeTile(64, 128, 4, 3)
        if 2 * shared_bytes(tile, block_d, itemsize) > shared_memory:
            tile = DecodeTile(64, 64, 4, 3)
    else:
        tile = DecodeTile(64, 32, 8, 2)
    if rows <= 32:
        tile = tile._replace(block_m=min(tile.block_m, 16 if rows <= 16 else 32), block_n=min(tile.block_n, 64))
    while shared_bytes(tile, block_d, itemsize) > shared_memory and (tile.stages > 2 or tile.block_n > 16):
        tile = tile._replace(stages=tile.stages - 1) if tile.stages > 2 else tile._replace(block_n=tile.block_n // 2)
    return tile


# Of the model below, in the time of one key tile (1.1 to 1.4 us) of the programs that share a multiprocessor; fitted
# to eight shapes on an H200 (bf16, one lane and eight, rings of 768 to 32760 slots), where the choices are within 3%
# of the best number of splits that was measured; 2 MB a tile is a write and a read of the partial results at 3.5 TB/s.
_LONE = 0.7  # a wave whose programs have a multiprocessor to themselves
_WAVE = 2.0  # begin and end of a program
_MERGE = 1.0  # the merge's launch
_MERGE_SPLIT = 0.4  # latency of one more split in the merge
_MERGE_BYTES = 2e6  # bytes of partial results


def decode_splits(programs: int, key_tiles: int, multiprocessors: int, resident: int, partial_bytes: int) -> int:
    """Choose into how many runs the keys are cut, from capacities only.

    Args:
        programs: query tiles times key/value heads times ring lanes.
        key_tiles: key tiles of a full ring.
        multiprocessors: of the GPU.
        resident: programs that a multiprocessor runs at once.
        partial_bytes: float32 results of one split, for all ring lanes.

    The model counts time in key tiles: the waves of the busiest multiprocessor, each as long as a run of keys, and
    the merge.
    """

    def cost(splits: int) -> float:
        busiest = -(-programs * splits // multiprocessors)
        waves = busiest // resident + (_LONE if busiest % resident else 0.0)
        merge = _MERGE + splits * (_MERGE_SPLIT + partial_bytes / _MERGE_BYTES) if splits > 1 else 0.0
        return waves * (-(-key_tiles // splits) + _WAVE) + merge

    return min(range(1, max(1, min(key_tiles // 2, 64)) + 1), key=cost)


def shared_bytes(tile: DecodeTile, block_d: int, itemsize: int) -> int:
    """Return the bytes of shared memory that a program of `tile` takes."""
    return (tile.block_m + 2 * tile.stages * tile.block_n) * block_d * itemsize
