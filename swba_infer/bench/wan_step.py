"""Time Wan's transformer alone, one block of a stream whose window is full: denoising steps, then the commit pass.

Random weights of the full sizes; no decoder and no sampler. Variants run in one process, in A B B A order where the
memory of all of them fits, and only after their outputs were found to agree. With --official the code that
Self-Forcing published runs beside ours: a checkout of it, of which only wan/modules is read; it needs diffusers and
einops. Its attention function becomes torch's, since FlashAttention's package may be missing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cache import RingKVCache
from ..config import StreamConfig
from ..device import pick_device
from ..errors import ConfigError
from ..files import check_writable
from ..models.wan_config import WanConfig
from ..wan.sampler import RenoisingSampler
from ..wan.synthetic import random_wan
from ..wan.vae import FRAMES_PER_LATENT
from .attention import describe
from .clock import percentile, rulers
from .peers import Unavailable
from .report import header, write_json
from .wan_block import OURS, PROBES, BlockTime, Stepper, Work, fill, make_ours, pass_flops, time_blocks
from .wan_official import LAST_FRAME, OFFICIAL, Official
from .wan_stream import SIZES, add_stream_arguments, make_stream

METHOD = (
    "random weights and latents, one lane; a block is its denoising steps and its commit pass on a full window; four "
    "turns a variant, in A B B A order if interleaved, of which the first half does not count; medians over blocks, "
    "GPU clock, caches not flushed; floor = FLOPs / measured bf16 matmul rate, FLOPs of linear layers and of visible "
    "pairs; warm_up_s = to fill the window and draw two blocks, compile_s = what that took beyond as many passes "
    "later; gpu_gib = what a variant reserves beyond the shared weights; error = relative, against the first variant; "
    "official-*: Self-Forcing's modules with the same weights, all in one dtype, attention by torch's "
    "scaled_dot_product_attention, compiled layer by layer in the default mode"
)
BOUNDS = {torch.bfloat16: 0.03, torch.float32: 1e-4}
TURNS, WARM_UP = 4, 2
ROOM_GIB = 4.0  # beside its cache, for what a variant computes with

Make = Callable[[], Stepper]


class Made(NamedTuple):
    """A variant with a full window, and what is known of it before the clock starts."""

    stepper: Stepper
    row: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the benchmark."""
    add_stream_arguments(parser)
    parser.add_argument(
        "--variants",
        default="all",
        help=f"comma-separated: {', '.join((*OURS, *OFFICIAL))}, ours, official, or all (default: %(default)s)",
    )
    parser.add_argument("--official", type=Path, metavar="DIR", help="a checkout of Self-Forcing, for its variants")
    parser.add_argument("--blocks", type=int, default=4, help="blocks in each of a variant's 4 turns (default: 4)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--out", type=Path, help="JSON to write")


def run(args: argparse.Namespace) -> int:
    """Measure, print and write; return 1 if nothing was measured or a variant of ours failed its gate."""
    if args.blocks < 2:
        raise ConfigError(f"blocks: expected at least 2, got {args.blocks}")
    out = check_writable(args.out) if args.out else None
    device = pick_device(args.device)
    report = {**header(device, args.argv), "method": METHOD, **measure(args, device)}
    print(_table(report))
    if out:
        write_json(out, report)
        print(f"wrote {out}")
    failed = any(row["variant"] in OURS and not row["unavailable"] for row in report["skipped"])
    return 1 if failed or not report["results"] else 0


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the times of each variant with floors, memory and compile seconds, and what was skipped."""
    size = SIZES[args.model]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    stream = make_stream(args)
    if args.official is not None and args.sink_distance != "growing":
        raise ConfigError(f"sink_distance: expected growing beside the official code, got {args.sink_distance}")
    names = _wanted(args.variants, args.official is not None)
    work = Work.draw(size, stream, RenoisingSampler.with_steps(args.steps), device, dtype)
    _check_table(names, len(work.history), args.blocks, args.frames)
    skipped: list[dict[str, Any]] = []
    official = _open_official(args.official, names, skipped)
    model = random_wan(size, device=device, dtype=dtype)
    makers: dict[str, Make] = {}
    for name in names:
        make = make_ours if name in OURS else official.make if official else None
        if make is not None:
            makers[name] = partial(make, name, model, stream, work.text)
    groups = _groups(list(makers), size, stream, device, dtype)
    found: list[tuple[dict[str, Any], list[BlockTime]]] = []
    exact: dict[str, Tensor] = {}
    for group in groups:
        made = _gate({name: makers[name] for name in group}, work, device, exact, skipped)
        times = interleave_blocks({name: each.stepper for name, each in made.items()}, work, args.blocks, device)
        found += [(each.row, times[name]) for name, each in made.items()]
        del made
    flops = pass_flops(model, stream)
    ruler = rulers(device)
    floor = sum(flops.values()) / ruler["matmul_bf16_tflops"] / 1e9
    floors = {"denoise": args.steps * floor, "commit": floor}
    return {
        "model": args.model,
        "dtype": str(dtype).removeprefix("torch."),
        "stream": stream.to_dict(),
        "timesteps": [*work.timesteps, work.committed],
        "interleaved": len(groups) == 1,
        "error_bound": BOUNDS[dtype],
        "tflop_a_pass": {name: value / 1e12 for name, value in flops.items()},
        "floor_ms": floors,
        "rulers": ruler,
        "weights_gib": sum(x.nbytes for x in model.parameters()) / 2**30,
        "official_error": official.error if official else None,
        "results": _with_ratios([_result(row, times, floors, work) for row, times in found]),
        "skipped": skipped,
    }


def interleave_blocks(
    steppers: Mapping[str, Stepper], work: Work, blocks: int, device: torch.device
) -> dict[str, list[BlockTime]]:
    """Time blocks of each variant in turns of alternating order; the first half of each turn does not count."""
    times: dict[str, list[BlockTime]] = {name: [] for name in steppers}
    for i in range(TURNS):
        for name in list(steppers)[:: -1 if i % 2 else 1]:
            times[name] += time_blocks(steppers[name], work, blocks, device)[blocks // 2 :]
    return times


def _gate(
    makers: Mapping[str, Make],
    work: Work,
    device: torch.device,
    exact: dict[str, Tensor],
    skipped: list[dict[str, Any]],
) -> dict[str, Made]:
    """Make variants and fill their windows; keep those whose outputs agree with `exact`, the first one's."""
    made = {}
    for name, make in makers.items():
        before = _reserved(device, trim=True)
        try:
            stepper = make()
            started = time.perf_counter()
            outputs = fill(stepper, work)
            time_blocks(stepper, work, WARM_UP, device)
        except Unavailable as error:
            skipped.append({"variant": name, "reason": str(error), "unavailable": True})
            continue
        except Exception as error:
            # A variant may fail in its own way, to compile or to fit included: a finding, and the others go on.
            skipped.append({"variant": name, "reason": describe(error), "unavailable": False})
            continue
        row: dict[str, Any] = {"variant": name, "warm_up_s": time.perf_counter() - started}
        print(f"{name}: window filled and warmed up in {row['warm_up_s']:.1f} s", flush=True)
        if not exact:
            exact.update(outputs)
        errors = {what: _error(out, exact[what]) for what, out in outputs.items()}
        if not all(error < BOUNDS[work.noisy.dtype] for error in errors.values()):
            reason = f"failed the correctness gate: relative errors {errors}"
            skipped.append({"variant": name, "reason": reason, "unavailable": False})
            continue
        row |= {"error": errors, "gpu_gib": (_reserved(device, trim=False) - before) / 2**30}
        made[name] = Made(stepper, row)
    return made


def _result(
    row: Mapping[str, Any], times: Sequence[BlockTime], floors: Mapping[str, float], work: Work
) -> dict[str, Any]:
    """Return a variant's row with its times, in ms, and the seconds of the warm-up that a second one would not take."""
    result = dict(row)
    for part, floor in floors.items():
        ms = [getattr(block, part) for block in times]
        median = statistics.median(ms)
        result |= {
            f"{part}_ms": median, f"{part}_p10": percentile(ms, 0.1), f"{part}_p90": percentile(ms, 0.9),
            f"{part}_fraction_of_floor": floor / median,
        }  # fmt: skip
    block_s = (result["denoise_ms"] + result["commit_ms"]) / 1e3
    blocks = WARM_UP + (len(work.history) + PROBES) / (len(work.timesteps) + 1)
    return {
        **result,
        "compile_s": max(0.0, result["warm_up_s"] - blocks * block_s),
        "samples": len(times),
        "frames_per_second": FRAMES_PER_LATENT * work.noisy.shape[3] / block_s,
    }


def _groups(
    names: Sequence[str], size: WanConfig, stream: StreamConfig, device: torch.device, dtype: torch.dtype
) -> list[list[str]]:
    """Return the variants that are measured side by side: all, or each alone if the memory of all is too much."""
    if device.type != "cuda":
        return [list(names)]
    cache = RingKVCache.predict_bytes(
        layers=size.num_layers, lanes=1, kv_heads=size.num_attention_heads, head_dim=size.attention_head_dim,
        stream=stream, dtype=dtype, device=device,
    )  # fmt: skip
    free, _ = torch.cuda.mem_get_info(device)
    return [list(names)] if len(names) * (cache + ROOM_GIB * 2**30) < free else [[name] for name in names]


def _wanted(option: str, official: bool) -> list[str]:
    """Return the variants that the option names, ours first."""
    sets = {"ours": set(OURS), "official": set(OFFICIAL), "all": {*OURS, *(OFFICIAL if official else ())}}
    words = {part.strip() for part in option.split(",")}
    wanted = set().union(*(sets.get(word, {word}) for word in words))
    known = [*OURS, *OFFICIAL]
    if not wanted <= set(known):
        raise ConfigError(f"variants: expected {', '.join(sets)} or some of {known}, got {sorted(wanted - set(known))}")
    if wanted & set(OFFICIAL) and not official:
        raise ConfigError(f"official: expected a folder for the variants {sorted(wanted & set(OFFICIAL))}, got none")
    return [name for name in known if name in wanted]


def _check_table(names: Sequence[str], history: int, blocks: int, frames: int) -> None:
    """Raise ConfigError if a stream of the official code would leave its table of rotary angles."""
    most = (LAST_FRAME // frames - history - WARM_UP) // TURNS
    if blocks > most and set(names) & set(OFFICIAL):
        raise ConfigError(
            f"blocks: expected at most {most} with an official variant, whose rotary table ends at frame {LAST_FRAME}, "
            f"got {blocks}"
        )


def _open_official(folder: Path | None, names: Sequence[str], skipped: list[dict[str, Any]]) -> Official | None:
    """Import the official code and check it, if a variant of it is wanted; note it where it cannot be imported."""
    wanted = [name for name in names if name in OFFICIAL]
    if folder is None or not wanted:
        return None
    try:
        return Official(folder)
    except Unavailable as error:
        skipped += [{"variant": name, "reason": str(error), "unavailable": True} for name in wanted]
        return None


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to the rows of ours the fastest official variant's time over their own; None without one."""
    for part in ("denoise", "commit"):
        best = min((row[f"{part}_ms"] for row in rows if row["variant"] in OFFICIAL), default=None)
        for row in rows:
            if row["variant"] in OURS:
                row[f"{part}_best_official_over_this"] = best / row[f"{part}_ms"] if best else None
    return rows


def _reserved(device: torch.device, trim: bool) -> int:
    """Return the bytes reserved on a GPU; with `trim`, after giving back what nothing uses."""
    if device.type != "cuda":
        return 0
    if trim:
        gc.collect()
        torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def _ratio(value: float | None) -> str:
    return f" x{value:.2f} of the best official" if value else ""


def _table(report: Mapping[str, Any]) -> str:
    lines = []
    for row in report["results"]:
        parts = [
            f"{part} {row[f'{part}_ms']:.2f} ms [{row[f'{part}_p10']:.2f}, {row[f'{part}_p90']:.2f}] "
            f"{row[f'{part}_fraction_of_floor']:.2f} of the floor" + _ratio(row.get(f"{part}_best_official_over_this"))
            for part in ("denoise", "commit")
        ]
        lines.append(
            f"{row['variant']:<23} {', '.join(parts)}; {row['frames_per_second']:.1f} frames/s, "
            f"compile {row['compile_s']:.1f} s, {row['gpu_gib']:.1f} GiB, error {max(row['error'].values()):.1e}"
        )
    lines += [f"{row['variant']:<23} skipped: {row['reason']}" for row in report["skipped"]]
    tflop, floor = report["tflop_a_pass"], report["floor_ms"]
    lines.append(
        f"{tflop['matmul']:.2f} + {tflop['attention']:.2f} TFLOP a pass (linear layers + attention); floor "
        f"{floor['denoise']:.1f} + {floor['commit']:.1f} ms at {report['rulers']['matmul_bf16_tflops']:.0f} TFLOP/s; "
        f"weights {report['weights_gib']:.1f} GiB; {'interleaved' if report['interleaved'] else 'one after another'}"
    )
    return "\n".join(lines)
