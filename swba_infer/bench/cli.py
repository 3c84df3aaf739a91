"""Time this project's attention beside its peers, or a model in the engine."""

from __future__ import annotations

import argparse
from typing import Any

from . import attention, stream, wan_step, wan_stream, wan_vae

EXAMPLES = """examples:
  swba-infer bench attention --out docs/benchmarks/attention.json
  swba-infer bench attention --shapes decode --peers sdpa-cudnn,sdpa-flash
  swba-infer bench stream --model freedoom --frames 2000 --out docs/benchmarks/stream.json
  swba-infer bench wan-vae --out docs/benchmarks/wan_vae.json
  swba-infer bench wan-step --official Self-Forcing --variants swba-compiled-graph,official --out wan_step.json
  swba-infer bench wan-stream --blocks 500 --save half.safetensors --out docs/benchmarks/wan_stream.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and their options."""
    subparsers = parser.add_subparsers(metavar="WHAT", title="benchmarks", required=True)
    modules: dict[str, Any] = {
        "attention": attention,
        "stream": stream,
        "wan-step": wan_step,
        "wan-vae": wan_vae,
        "wan-stream": wan_stream,
    }
    for name, module in modules.items():
        subparser = subparsers.add_parser(
            name,
            help=module.__doc__.strip().splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(benchmark=module)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that was asked for."""
    return args.benchmark.run(args)
