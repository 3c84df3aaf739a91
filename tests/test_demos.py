from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMOS = Path(__file__).parent.parent / "demos"
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(DEMOS / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_steered_world_is_written_to_a_video(tiny_model, tmp_path):
    text = run("stream_world.py", "--model", str(tiny_model), "--frames", "6", "--out", str(tmp_path / "a.mp4"))
    assert "30 frames" in text
    assert (tmp_path / "a.mp4").stat().st_size > 0


def test_a_bare_cache_streams_what_the_whole_clip_gives():
    assert "equals the whole clip" in run("cache_in_your_model.py")


def test_the_window_decides_what_can_be_learned():
    narrow, wide = (float(line.rsplit(" ", 1)[1]) for line in run("train_step.py").strip().splitlines())
    assert narrow > 0.9
    assert wide < 0.1


@pytest.mark.parametrize("path", sorted(DEMOS.glob("*.py")), ids=lambda path: path.name)
def test_demos_are_short_and_use_public_names_only(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert not re.search(r"\b_[a-z]|\._[a-z]", text)
