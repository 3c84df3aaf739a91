"""The command line: `swba-infer generate | convert | train | record | evaluate | bench | doctor`."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import SwbaError


class _Command:
    """A subcommand whose module is imported only when it is used."""

    def __init__(self, module: str, help: str) -> None:
        self.module, self.help = module, help

    def load(self) -> Any:
        return importlib.import_module(self.module, __package__)


COMMANDS = {
    "generate": _Command(".generate", "stream a model into a video file"),
    "convert": _Command(".wan.convert", "turn a training checkpoint of the Wan family into a model folder"),
    "train": _Command(".training.loop", "train a world model on recorded gameplay"),
    "record": _Command(".training.record", "record gameplay with ViZDoom, headless"),
    "evaluate": _Command(".training.evaluate", "measure a model on held-out episodes"),
    "bench": _Command(".bench.cli", "time attention beside its peers, or a model in the engine"),
    "doctor": _Command(".doctor", "say what hardware, versions and kernels would be used, and why"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, 1 for a failed measurement, 2 for bad input, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        parser, command = _parser(argv)
        args = parser.parse_args(argv)
        args.argv = argv
        return COMMANDS[command].load().run(args) if command else _print_help(parser)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (SwbaError, ValueError, OSError) as error:
        print(f"swba-infer: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"swba-infer: {error}; `swba-infer doctor` lists what is missing", file=sys.stderr)
        return 2


def _parser(argv: list[str]) -> tuple[argparse.ArgumentParser, str | None]:
    """Build the parser; only the command that is used declares its options, so that the others are not imported."""
    parser = argparse.ArgumentParser(
        "swba-infer",
        description="Stream autoregressive video transformers from a ring-buffer KV cache.",
        epilog="`swba-infer COMMAND --help` explains a command and gives examples.",
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", title="commands")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            module = command.load()
            subparser.description = getattr(module, "DESCRIPTION", module.__doc__ or "").strip()
            subparser.epilog = getattr(module, "EXAMPLES", None)
            module.add_arguments(subparser)
    return parser, chosen if chosen in COMMANDS else None


def _print_help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 0


def _terminate(number: int, frame: object) -> NoReturn:
    """Turn SIGTERM into an exception, so that half-written files are removed."""
    raise SystemExit(128 + number)
