"""`swba-infer doctor`: what hardware and versions are here, what would be used, and why."""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
from collections.abc import Iterator

import torch

import swba_kernels
from swba_kernels.hopper.assembler import describe
from swba_kernels.hopper.supports import build_obstacle

from .bench.report import device_name, versions
from .checkpoint import PRETRAINED, read_config
from .errors import SwbaError

OPS = ("forward", "prefill", "decode", "ring_write")
EXTRAS = {"av": "video", "PIL": "video", "rich": "video", "vizdoom": "train", "matplotlib": "train"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the doctor's options."""
    parser.add_argument("--head-dim", type=int, default=64, help="of the model in question (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the report; return 0, for a missing extra is not an error."""
    for line in report(args.head_dim):
        print(line)
    return 0


def report(head_dim: int = 64) -> Iterator[str]:
    """Yield the lines of the report."""
    yield "versions     " + ", ".join(f"{name} {version}" for name, version in versions().items())
    yield f"cpu          {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count()):
        devices.insert(i, torch.device("cuda", i))
        properties = torch.cuda.get_device_properties(i)
        yield (
            f"cuda:{i}       {device_name(devices[i])}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        )
    if len(devices) == 1:
        yield "cuda         no device that torch can use" + ("" if torch.version.cuda else " (a torch without CUDA)")
    for device in devices:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        for op in OPS:
            choice = swba_kernels.choose_impl(device, dtype, head_dim, op)
            yield f"{device!s:<13}{op}: {choice.name} ({choice.reason}; {str(dtype)[6:]}, head dim {head_dim})"
    yield "hopper       " + _hopper()
    for module, extra in EXTRAS.items():
        yield f"{module:<13}" + _presence(module, extra)
    yield "h264         " + _encoder()
    yield "compiler     " + (
        shutil.which("cc") or shutil.which("gcc") or "none found: torch.compile and triton need one"
    )
    yield from _models()


def _hopper() -> str:
    obstacle = build_obstacle()
    if not obstacle:
        try:
            return f"kernels can be built by this Triton ({describe()})"
        except (ImportError, RuntimeError) as error:  # no backend for NVIDIA, or one without an assembler
            obstacle = str(error)
    return f"kernels cannot be built: {obstacle}"


def _presence(module: str, extra: str) -> str:
    try:
        found = importlib.import_module(module)
    except ImportError:
        return f"missing: pip install swba-infer[{extra}]"
    return str(getattr(found, "__version__", "present"))


def _encoder() -> str:
    try:
        codec = importlib.import_module("av.codec").Codec("libx264", "w")
    except ImportError:
        return "no encoder: pip install swba-infer[video]"
    except ValueError:
        return "this PyAV was built without libx264: videos cannot be written"
    return codec.long_name


def _models() -> Iterator[str]:
    found = sorted(path.parent for path in PRETRAINED.glob("*/config.json"))
    if not found:
        yield "model        none shipped"
    for directory in found:
        try:
            config = read_config(directory)
            size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
            yield f"model        {directory.name}: {config['architecture']}, {config['dtype']}, {size / 1e6:.1f} MB"
        except SwbaError as error:
            yield f"model        {directory.name}: {error}"
