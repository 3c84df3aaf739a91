"""The options of `swba-infer generate` for models that take prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import SINK_DISTANCES
from ..errors import ConfigError

_WORLD_ONLY = ("actions", "sheet")
_PROMPTS = ("prompt", "prompts", "prompt_embeds")
_OTHERS = ("negative", "base", "seconds", "size", "frames_per_block", "window", "sinks", "sink_distance", "guidance")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    group = parser.add_argument_group("models of the Wan family")
    chosen = group.add_mutually_exclusive_group()
    chosen.add_argument("--prompt", help="what the video shows")
    chosen.add_argument("--prompts", type=Path, help='file with a prompt a line and when it begins: "5s: a cat sleeps"')
    chosen.add_argument("--prompt-embeds", type=Path, help="safetensors file of embedded prompts, for no text encoder")
    group.add_argument("--negative", help="what to guide away from: text, or a .safetensors file of its embedding")
    group.add_argument("--base", type=Path, help="folder of the vae and the text encoder (default: the model's)")
    group.add_argument("--seconds", type=float, help="length of the video (default: 10)")
    group.add_argument("--size", help="WIDTHxHEIGHT in pixels (default: 832x480, or 1280x704 for Wan 2.2)")
    group.add_argument("--frames-per-block", type=int, help="latent frames that are drawn together (default: 3)")
    group.add_argument("--window", type=int, help="latent frames that a block sees (default: 21)")
    group.add_argument("--sinks", type=int, help="first latent frames that are seen for ever (default: 0)")
    group.add_argument(
        "--sink-distance",
        choices=SINK_DISTANCES,
        help="whether a block sees the sinks from where it stands or from a bounded distance (default: growing)",
    )
    group.add_argument("--guidance", type=float, help="scale of classifier-free guidance (default: 1, none)")


def takes_prompt(args: argparse.Namespace) -> bool:
    """Say whether the options are those of a Wan; raise ConfigError if they are mixed with a world model's."""
    given = [name for name in (*_PROMPTS, *_OTHERS) if getattr(args, name) is not None]
    if not any(name in given for name in _PROMPTS):
        if given or _is_wan(Path(args.model)):
            why = f"with --{given[0].replace('_', '-')}" if given else f"for the Wan model {args.model}"
            raise ConfigError(f"prompt: expected --prompt, --prompts or --prompt-embeds {why}, got none")
        return False
    for name in _WORLD_ONLY:
        if getattr(args, name) is not None:
            raise ConfigError(f"{name}: expected none with a prompt, got {getattr(args, name)}")
    return True


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Return height and width of "832x480"; raise ConfigError if it is of another form."""
    if text is None:
        return None
    width, cross, height = text.partition("x")
    if not cross or not width.isdecimal() or not height.isdecimal():
        raise ConfigError(f"size: expected WIDTHxHEIGHT such as 832x480, got {text!r}")
    return int(height), int(width)


def _is_wan(path: Path) -> bool:
    if path.suffix == ".safetensors" or (path / "model_index.json").is_file():
        return True
    if not (path / "config.json").is_file():
        return False
    from .architecture import is_wan

    return is_wan(path / "config.json")
