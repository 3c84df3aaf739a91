"""The named shapes that are measured: of the original kernel and of published video models, and odd ones, which no
kernel was tuned to.

B batch, H heads, D head dim; sizes in tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from swba_kernels.pattern import BlockWindow

from ..errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One attention problem: `blocks` blocks of training or of prefill on a full ring, or one of decode against a ring.

    `name` is what `--shapes` takes; `window_blocks` counts the block itself; `kv_heads` 0 means `heads`; training ends
    with a short block of `tail` tokens, if any; decode sees the first `filled` slots of its ring, 0 means all. Prefill
    is the last blocks of a sequence, of whose history only what they see is kept: sinks, then a window less a block.
    """

    name: str
    kind: str
    batch: int
    heads: int
    head_dim: int
    block_size: int
    window_blocks: int
    blocks: int = 1
    kv_heads: int = 0
    sink_blocks: int = 0
    tail: int = 0
    filled: int = 0
    dtype: str = "bfloat16"

    @property
    def tokens(self) -> int:
        """Query tokens: the whole sequence, or one block."""
        return self.block_size * self.blocks + self.tail

    @property
    def history(self) -> int:
        """Key tokens before the first query."""
        return self.pattern.sink + self.pattern.window - self.block_size if self.kind == "prefill" else 0

    @property
    def keys(self) -> int:
        """Key tokens: the whole sequence, or the slots of the ring that is decoded against."""
        return self.block_size * self.window_blocks if self.kind == "decode" else self.history + self.tokens

    @property
    def visible(self) -> int:
        """Keys that a decoded block sees."""
        return self.filled or self.keys

    @property
    def pattern(self) -> BlockWindow:
        """Who sees whom in training and prefill."""
        return BlockWindow.from_blocks(self.block_size, self.window_blocks, self.sink_blocks)

    def blocks_and_keys(self) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """Yield each block [start, end) of queries of training or prefill, with the key ranges that it sees."""
        past = self.history
        for start, end in self.pattern.blocks(self.keys):
            if start >= past:
                spans = self.pattern.key_ranges(start, end)
                yield start - past, end - past, [(low, high) for low, high in spans if low < high]

    @property
    def flops(self) -> int:
        """Forward FLOPs on exact visible pairs: 4 D per pair and head."""
        if self.kind == "decode":
            pairs = self.block_size * self.visible
        else:
            pairs = self.pattern.pairs(self.keys) - self.pattern.pairs(self.history)
        return 4 * self.batch * self.heads * self.head_dim * pairs


def _blocks(
    kind: str, batch: int, heads: int, dim: int, bs: int, ws: int, blocks: int, dtype: str = "bfloat16",
    *, kv_heads: int = 0, sinks: int = 0, tail: int = 0,
) -> Shape:  # fmt: skip
    grouped, first = f"kv{kv_heads}-" if kv_heads else "", f"s{sinks}-" if sinks else ""
    sizes = f"b{batch}-h{heads}-{grouped}d{dim}-bs{bs}-ws{ws}-{first}n{bs * blocks + tail}"
    return Shape(
        name=f"{'train' if kind == 'training' else kind}-{sizes}",
        kind=kind,
        batch=batch,
        heads=heads,
        head_dim=dim,
        block_size=bs,
        window_blocks=ws,
        blocks=blocks,
        kv_heads=kv_heads,
        sink_blocks=sinks,
        tail=tail,
        dtype=dtype,
    )


_training = partial(_blocks, "training")
_prefill = partial(_blocks, "prefill")


def _decode(batch: int, heads: int, dim: int, bs: int, ws: int, *, kv_heads: int = 0, filled: int = 0) -> Shape:
    grouped, partly = f"kv{kv_heads}-" if kv_heads else "", f"-filled{filled}" if filled else ""
    return Shape(
        name=f"decode-b{batch}-h{heads}-{grouped}d{dim}-bs{bs}-ws{ws}{partly}",
        kind="decode",
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        block_size=bs,
        window_blocks=ws,
        filled=filled,
    )


TRAINING = (
    _training(1, 12, 64, 256, 16, 64, "float16"),
    _training(4, 16, 64, 256, 16, 32),
    _training(1, 12, 128, 1560, 6, 21),
    _training(1, 12, 128, 4680, 7, 7),
    _training(2, 16, 128, 512, 8, 32),
)

DECODE = (
    _decode(1, 12, 128, 1560, 21),
    _decode(1, 12, 128, 4680, 7),
    _decode(1, 40, 128, 4680, 7),
    _decode(1, 12, 64, 256, 16),
    _decode(1, 16, 64, 64, 32),
    _decode(8, 16, 64, 256, 16),
    _decode(1, 16, 64, 144, 32),
)

PREFILL = (
    _prefill(1, 12, 128, 1560, 6, 1),
    _prefill(1, 12, 128, 1560, 6, 3, sinks=1),
    _prefill(1, 12, 128, 4680, 7, 1),
    _prefill(2, 16, 128, 512, 8, 2),
    _prefill(1, 8, 128, 333, 9, 1),
    _prefill(1, 12, 128, 880, 8, 1),
    _prefill(1, 12, 64, 256, 16, 4),
    _prefill(1, 16, 64, 64, 32, 1),
    _prefill(1, 16, 64, 64, 32, 8),
    _prefill(1, 10, 64, 333, 9, 4, kv_heads=5),
)

ODD_TRAINING = (
    _training(1, 24, 128, 880, 8, 20),
    _training(1, 12, 128, 2025, 5, 9),
    _training(2, 10, 64, 333, 9, 24, tail=100),
    _training(1, 16, 128, 1560, 6, 10, kv_heads=4),
    _training(1, 12, 128, 1560, 6, 15, sinks=1),
    _training(1, 16, 64, 144, 16, 64, "float16"),
    _training(1, 6, 64, 48, 16, 128),
)

ODD_DECODE = (
    _decode(1, 24, 128, 880, 12),
    _decode(1, 12, 128, 2025, 8),
    _decode(1, 10, 64, 333, 12),
    _decode(1, 32, 128, 1560, 8, kv_heads=8),
    _decode(1, 5, 128, 333, 7),
    _decode(3, 16, 64, 144, 32, filled=2000),
    _decode(1, 12, 128, 1560, 21, filled=1560),
    _decode(1, 12, 128, 1560, 21, filled=14040),
    _decode(1, 6, 64, 48, 16),
)

TINY = (
    _training(1, 2, 32, 24, 3, 5, "float32"),
    Shape(
        name="decode-tiny",
        kind="decode",
        batch=2,
        heads=4,
        kv_heads=2,
        head_dim=32,
        block_size=24,
        window_blocks=4,
        dtype="float32",
    ),
    Shape(
        name="decode-tiny-filled",
        kind="decode",
        batch=2,
        heads=2,
        head_dim=32,
        block_size=24,
        window_blocks=4,
        filled=50,
        dtype="float32",
    ),
    _training(1, 4, 32, 24, 3, 5, "float32", kv_heads=2, sinks=1, tail=7),
    _prefill(2, 4, 32, 24, 3, 2, "float32", kv_heads=2, sinks=1),
)

SETS = {
    "all": TRAINING + DECODE + PREFILL,
    "training": TRAINING,
    "prefill": PREFILL,
    "decode": DECODE,
    "odd": ODD_TRAINING + ODD_DECODE,
    "odd-training": ODD_TRAINING,
    "odd-decode": ODD_DECODE,
    "tiny": TINY,
}


def select(names: str) -> list[Shape]:
    """Return the shapes of a comma-separated list of set names and shape names (or unique parts of them)."""
    chosen: list[Shape] = []
    known = [*TRAINING, *DECODE, *PREFILL, *ODD_TRAINING, *ODD_DECODE, *TINY]
    for name in names.split(","):
        found = list(SETS.get(name, ())) or [shape for shape in known if name and name in shape.name]
        if not found:
            raise ConfigError(f"shapes: expected {sorted(SETS)} or a part of {[s.name for s in known]}, got {name!r}")
        chosen += [shape for shape in found if shape not in chosen]
    return chosen
