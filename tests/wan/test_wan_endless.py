"""Ten minutes of video from tiny models, in two runs joined by a file: time and memory stay flat."""

from __future__ import annotations

import gc
import os
import statistics
import time
from pathlib import Path

import pytest
from generator_cases import embedding, make_generator

pytest.importorskip("diffusers")

from swba_infer.wan.sampler import RenoisingSampler

SAMPLER = RenoisingSampler(timesteps=(1000,))
BLOCKS = 10 * 60 * 16 // (2 * 4)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory from /proc")
def test_ten_minutes_are_flat_in_time_and_memory(tmp_path):
    milliseconds, resident, sizes, objects = [], [], [], []
    generator = make_generator(sampler=SAMPLER)
    made = generator.blocks(embedding(1))
    for block in range(BLOCKS):
        if block == BLOCKS // 2:
            generator.save(tmp_path / "stream")
            generator = make_generator(sampler=SAMPLER)
            generator.load(tmp_path / "stream")
            made = generator.blocks()
        before = time.process_time()
        next(made)
        milliseconds.append(1e3 * (time.process_time() - before))
        resident.append(resident_mib())
        sizes.append((generator.engine.memory()["cache"], generator.decoder.bytes))
        if block in (BLOCKS // 2 + 50, BLOCKS - 1):
            gc.collect()
            objects.append(len(gc.get_objects()))
    assert generator.position == (2 * BLOCKS,)
    assert len(set(sizes[10:])) == 1
    assert objects[1] - objects[0] < 100, objects
    half = slice(BLOCKS // 2 + 50, BLOCKS // 2 + 300), slice(-250, None)
    # Processor time of the fastest tenth: other tests run beside this one, and slow down what they like for a while.
    early, late = (statistics.quantiles(milliseconds[part], n=10)[0] for part in half)
    assert late < 1.25 * early, (early, late)
    before, after = (statistics.median(resident[part]) for part in half)
    assert after - before < 64, (before, after)  # what the allocator keeps between convolutions varies by half of that
    print(f"{early:.1f} ms a block, then {late:.1f}; {before:.0f} MiB, then {after:.0f}")
