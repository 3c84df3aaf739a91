"""Time several variants of one computation side by side, in A B B A order."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch

from ..errors import ConfigError
from .sensors import Reading, sensors

REPLAY_BELOW_MS = 0.2
CALLS_PER_GRAPH = 20
READ_EVERY_S = 0.002


class Timing(NamedTuple):
    """Milliseconds per call: median over samples, 10th and 90th percentile, number of samples. Beside them, medians of
    the multiprocessors' clock in MHz and of the GPU's power in watts (see `Reading`); None where nobody can tell."""

    median: float
    p10: float
    p90: float
    samples: int
    sm_mhz: float | None = None
    watts: float | None = None


def check_budget(seconds: float) -> float:
    """Return seconds that a variant may be timed for; raise ConfigError if it is no such number."""
    if not math.isfinite(seconds) or seconds <= 0:
        raise ConfigError(f"budget: expected a positive number of seconds, got {seconds:g}")
    return seconds


def percentile(values: list[float], fraction: float) -> float:
    """Return the nearest-rank percentile of unsorted values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def as_graph(make: Callable[[], Callable[[], object]]) -> tuple[Callable[[], object], int]:
    """Capture what `make` returns in a CUDA graph; return what replays it and how many calls one replay makes.

    `make` runs on the stream of the capture: autograd runs a backward on the stream of its forward.
    A call shorter than 0.2 ms is captured 20 times over, so that the launch of the graph itself does not count.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    replay = _capture(call, 1, stream)
    replay()
    if min(_sample(replay, 3, torch.device("cuda"))[0]) >= REPLAY_BELOW_MS:
        return replay, 1
    return _capture(call, CALLS_PER_GRAPH, stream), CALLS_PER_GRAPH


def _capture(call: Callable[[], object], repeat: int, stream: torch.cuda.Stream) -> Callable[[], object]:
    """Return what replays `repeat` calls and keeps the call alive: the graph points to the tensors that it owns."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeat):
            call()

    def replay(owner: object = call) -> None:
        graph.replay()

    return replay


def interleave(
    calls: Mapping[str, tuple[Callable[[], object], int]], device: torch.device, budget: float = 0.3, rounds: int = 4
) -> dict[str, Timing]:
    """Time each call for about `budget` seconds, in turns of alternating order (A B B A).

    Each turn repeats one call without a pause, and its first half does not count: the clock of a GPU settles on what
    its power allows, which the variant before has left at another value. That takes an H200 0.1 to 0.3 s: in turns of
    30 ms all variants ran at nearly one clock, which shows who needs fewer cycles, in turns of 600 ms each at its own.

    Args:
        calls: name to (function, calls of the measured thing that one invocation makes).
        device: where they run; on CUDA the clock is the GPU's, sampled per invocation.
        rounds: turns of each call; even, so that both orders balance.
    """
    counts = {}
    for name, (call, _) in calls.items():
        first = min(_sample(call, 2, device)[0])
        counts[name] = max(2, min(4000, int(budget * 1e3 / rounds / max(first, 1e-3))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    readings: dict[str, list[Reading]] = {name: [] for name in calls}
    read, _ = sensors(device)
    names = list(calls)
    for i in range(rounds):
        for name in names if i % 2 == 0 else names[::-1]:
            call, repeat = calls[name]
            turn, seen = _sample(call, counts[name], device, read)
            samples[name] += [ms / repeat for ms in turn[len(turn) // 2 :]]
            readings[name] += seen
    return {name: _timing(samples[name], readings[name]) for name in names}


def _timing(ms: list[float], readings: list[Reading]) -> Timing:
    seen = [statistics.median(values) for values in zip(*readings, strict=True)]
    return Timing(statistics.median(ms), percentile(ms, 0.1), percentile(ms, 0.9), len(ms), *seen)


def _sample(
    call: Callable[[], object], count: int, device: torch.device, read: Callable[[], Reading | None] = lambda: None
) -> tuple[list[float], list[Reading]]:
    """Return the milliseconds of each of `count` calls, and what `read` returned during their second half."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            call()
            marks.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in pairwise(marks)], []
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    readings = []
    while not events[-1].query():
        if events[count // 2].query():
            readings.append(read())
        time.sleep(READ_EVERY_S)
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) for a, b in pairwise(events)], [reading for reading in readings if reading]


def rulers(device: torch.device) -> dict[str, float]:
    """Measure what the device can do: bf16 matmul in TFLOP/s, copy in TB/s (read plus write)."""
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.empty(size * size * (8 if device.type == "cuda" else 1), device=device, dtype=torch.bfloat16)
    c = torch.empty_like(b)
    timing = interleave({"matmul": (lambda: a @ a, 1), "copy": (lambda: c.copy_(b), 1)}, device, budget=0.3)
    return {
        "matmul_bf16_tflops": 2 * size**3 / timing["matmul"].median / 1e9,
        "copy_tbps": 2 * b.nbytes / timing["copy"].median / 1e9,
    }
