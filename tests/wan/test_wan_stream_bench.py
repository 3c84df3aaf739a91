"""The benchmark of whole streams runs, and goes on with what an earlier run saved."""

from __future__ import annotations

import json
import signal

import pytest

pytest.importorskip("diffusers")

from swba_infer.cli import main


@pytest.fixture(autouse=True)
def keep_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_two_runs_are_joined_by_a_file(tmp_path):
    saved = str(tmp_path / "stream")
    for name, options in (("a", ["--save", saved]), ("b", ["--load", saved])):
        command = ["bench", "wan-stream", "--model", "tiny", "--device", "cpu", "--no-compile", "--blocks", "12"]
        sizes = ["--window", "4", "--frames", "2", "--steps", "2", "--sinks", "1", "--sink-distance", "bounded"]
        assert main([*command, *sizes, *options, "--out", str(tmp_path / name)]) == 0
    a, b = (json.loads((tmp_path / name).read_text()) for name in "ab")
    assert [part["first"] for part in a["parts"]] == [4, 6, 8, 10, 12, 14]
    assert b["parts"][0]["first"] == a["parts"][-1]["last"] + 1
    assert a["memory"] == b["memory"]
    for report in (a, b):
        assert report["stream"]["sink_distance"] == "bounded"
        assert report["frames_per_second"] > 0
        assert all(part["p99"] >= part["p50"] > 0 for part in report["parts"])


def test_an_impossible_number_of_blocks_is_refused(capsys):
    assert main(["bench", "wan-stream", "--model", "tiny", "--device", "cpu", "--blocks", "0"]) == 2
    assert "blocks: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("bench", ["wan-stream", "wan-step"])
def test_a_distance_without_sinks_is_refused(bench, capsys):
    assert main(["bench", bench, "--model", "tiny", "--device", "cpu", "--sink-distance", "bounded"]) == 2
    assert "sink_distance: expected growing without sinks" in capsys.readouterr().err


def test_a_missing_file_is_refused_before_anything_is_made(tmp_path, capsys):
    missing = str(tmp_path / "none")
    assert main(["bench", "wan-stream", "--model", "1.3B", "--device", "cpu", "--load", missing]) == 2
    assert f"load: expected a file that --save wrote, got {missing}" in capsys.readouterr().err
