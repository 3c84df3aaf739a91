"""Prompts over time, from a text file of `5s: a prompt`, one a line or with commas between."""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError

_LINE = re.compile(r"([0-9]+(?:\.[0-9]+)?)s\s*:\s*(.*)")
_NEXT = re.compile(r"\s*,\s*(?=[0-9.]+s\s*:)")
_FORM = "'SECONDSs: PROMPT', such as '5s: a cat runs'"


@dataclass(frozen=True, slots=True)
class PromptSchedule:
    """Prompts and the seconds of video time at which each begins; the first begins at 0.

    Args:
        starts: seconds, rising from 0.
        texts: one prompt for each.

    Raises:
        ConfigError: no prompt, an empty one, or starts that are not finite, not rising or not from 0.
    """

    starts: tuple[float, ...]
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.starts or len(self.starts) != len(self.texts):
            raise ConfigError(f"prompts: expected as many starts as texts, got {len(self.starts)}, {len(self.texts)}")
        for i, (start, text) in enumerate(zip(self.starts, self.texts, strict=True)):
            problem = _problem(self.starts[:i], start, text)
            if problem:
                raise ConfigError(f"prompts[{i}]: {problem}")

    @classmethod
    def single(cls, text: str) -> PromptSchedule:
        """Return the schedule of one prompt for the whole video."""
        return cls((0.0,), (text,))

    def at(self, seconds: float) -> int:
        """Return the index of the prompt that holds at a time: the last that has begun by then."""
        if not seconds >= 0:
            raise ConfigError(f"seconds: expected at least 0, got {seconds!r}")
        return bisect_right(self.starts, seconds) - 1

    def check_blocks(self, begins: Sequence[int], frames: int, fps: float) -> None:
        """Raise ConfigError unless every prompt gets a block of a video of `frames` frames.

        A prompt takes hold with the first block that begins at its time or later.

        Args:
            begins: rising frames with which the blocks begin, negative ones as 0; a range may be long.
            fps: frames per second.
        """
        for i, start in enumerate(self.starts):
            first = bisect_left(begins, start, key=lambda frame: max(0, frame) / fps)
            if first == len(begins) or begins[first] >= frames or self.at(max(0, begins[first]) / fps) != i:
                raise ConfigError(
                    f"prompts: expected every prompt to hold when a block of the {frames / fps:g} s video begins, "
                    f"got none for '{start:g}s: {self.texts[i]}'"
                )

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[tuple[float, str]]:
        return iter(zip(self.starts, self.texts, strict=True))


def parse_prompts(text: str, source: str = "prompts") -> PromptSchedule:
    """Read a schedule; empty lines and lines that begin with '#' are skipped.

    Raises:
        ConfigError: a line that is not of this form, an empty prompt, a time that does not rise, or a first prompt that
            does not begin at 0s; names the line.
    """
    starts: list[float] = []
    texts: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        for entry in _NEXT.split(line):
            match = _LINE.fullmatch(entry)
            if not match:
                raise ConfigError(f"{source}, line {number}: expected {_FORM}, got {_short(entry)!r}")
            start, prompt = float(match[1]), match[2]
            problem = _problem(starts, start, prompt)
            if problem:
                raise ConfigError(f"{source}, line {number}: {problem}")
            starts.append(start)
            texts.append(prompt)
    if not starts:
        raise ConfigError(f"{source}: expected at least one line of the form {_FORM}, got none")
    return PromptSchedule(tuple(starts), tuple(texts))


def read_prompts(path: str | os.PathLike[str]) -> PromptSchedule:
    """Read a schedule from a UTF-8 file; see `parse_prompts`."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts: expected a readable UTF-8 text file, got {path}: {error}") from error
    return parse_prompts(text, str(path))


def _problem(before: Sequence[float], start: float, text: str) -> str | None:
    """Say what is wrong with a prompt that follows those which begin at `before`."""
    if isinstance(start, bool) or not isinstance(start, (int, float)) or not math.isfinite(start):
        return f"expected a finite number of seconds, got {start!r}"
    if not before and start != 0:
        return f"expected the first prompt to begin at 0s, got {start:g}s"
    if before and start <= before[-1]:
        return f"expected a time after {before[-1]:g}s, got {start:g}s"
    if not isinstance(text, str) or not text.strip():
        return f"expected a prompt after '{start:g}s:', got {text!r}"
    return None


def _short(line: str) -> str:
    return line if len(line) <= 60 else line[:57] + "..."
