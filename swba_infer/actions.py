"""Scripts of actions: "forward*24, left*12, forward+right*8", in an argument or in a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .errors import ConfigError

_TOKEN = re.compile(r"([A-Za-z_+\-]+|\d+)(?:\*(\d{1,7}))?")


def parse_actions(script: str, names: Sequence[str]) -> list[int]:
    """Return the action index of each frame of a script.

    A script is a list of `name` or `name*count`, separated by commas or white space. A combined action may be written
    with its parts in any order ("right+forward" is "forward_right"). A name may also be an index.

    Raises:
        ConfigError: a token that is not of this form, an unknown action, or an empty script; names the token.
    """
    known = {_parts(name): i for i, name in enumerate(names)}
    indices: list[int] = []
    for token in re.split(r"[,\s]+", script.strip()):
        match = _TOKEN.fullmatch(token)
        if not match:
            raise ConfigError(f"actions: expected name or name*count, got {token!r}")
        name, count = match[1], int(match[2] or 1)
        index = int(name) if name.isdigit() and int(name) < len(names) else known.get(_parts(name))
        if index is None:
            raise ConfigError(f"actions: expected one of {list(names)}, got {name!r} in {token!r}")
        indices += [index] * count
    if not indices:
        raise ConfigError(f"actions: expected at least one frame, got {script!r}")
    return indices


def read_actions(script_or_file: str, names: Sequence[str]) -> list[int]:
    """Return the indices of a script, or of a file with one script per line ('#' starts a comment)."""
    path = Path(script_or_file)
    if not _is_file(path):
        return parse_actions(script_or_file, names)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"actions: expected a readable text file, got {path}: {error}") from error
    indices: list[int] = []
    for number, line in enumerate(lines, start=1):
        script = line.split("#", 1)[0].strip()
        if script:
            try:
                indices += parse_actions(script, names)
            except ConfigError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from error
    if not indices:
        raise ConfigError(f"actions: expected at least one action, got none in {path}")
    return indices


def _parts(name: str) -> tuple[str, ...]:
    return tuple(sorted(re.split(r"[_+\-]", name.lower())))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False
