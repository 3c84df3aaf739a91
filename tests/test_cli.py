from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from swba_infer.actions import parse_actions, read_actions
from swba_infer.cli import COMMANDS, main
from swba_infer.errors import ConfigError
from swba_infer.video import VideoWriter, read_frames

NAMES = ("wait", "forward", "left", "right", "forward_left", "forward_right")


@pytest.fixture(autouse=True)
def keep_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def generate(model, out, *options: str) -> int:
    return main(["generate", "--model", str(model), "--device", "cpu", "--out", str(out), *options])


def test_generate_writes_a_video_and_a_sheet_and_says_how_fast(tiny_model, tmp_path, capsys):
    out, sheet = tmp_path / "new" / "a.mp4", tmp_path / "a.png"
    assert generate(tiny_model, out, "--frames", "9", "--sheet", str(sheet), "--actions", "forward*2,left") == 0
    assert read_frames(out).shape == (9, 96, 128, 3)
    assert read_frames(sheet).shape[0] == 1
    text = capsys.readouterr().out
    for word in ("p50", "p99", "frames/s", "bytes", "a.mp4", "a.png"):
        assert word in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "new"]
    assert [p.name for p in out.parent.iterdir()] == ["a.mp4"]


def test_the_same_seed_gives_the_same_file(tiny_model, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert generate(tiny_model, tmp_path / f"{name}.mp4", "--frames", "6", "--seed", str(seed)) == 0
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_frames_default_to_the_script(tiny_model, tmp_path):
    assert generate(tiny_model, tmp_path / "a.mp4", "--actions", "left*3, forward+left", "--context", "none") == 0
    assert len(read_frames(tmp_path / "a.mp4")) == 4


def test_context_of_another_size_is_refused_unless_resized(tiny_model, tmp_path, capsys):
    with VideoWriter(tmp_path / "clip.mp4") as video:
        for value in (0, 90, 200):
            video.write(np.full((48, 64, 3), value, np.uint8))
    options = ("--context", str(tmp_path / "clip.mp4"), "--frames", "2")
    assert generate(tiny_model, tmp_path / "a.mp4", *options) == 2
    assert "32x24" in capsys.readouterr().err
    assert generate(tiny_model, tmp_path / "a.mp4", *options, "--resize", "area") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--actions", "jump*3"), "jump"),
        (("--actions", "left*"), "left*"),
        (("--context", "missing.mp4"), "missing.mp4"),
        (("--frames", "0"), "frames"),
        (("--frames", "-3"), "frames"),
        (("--scale", "0"), "scale"),
        (("--fps", "0"), "fps"),
        (("--steps", "0"), "steps"),
        (("--out", "a.gif"), "a.gif"),
        (("--out", "{folder}/file/a.mp4"), "writable"),
        (("--sheet", "{folder}/file/a.png"), "writable"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--device", "nonsense"), "nonsense"),
        (("--device", "meta"), "meta"),
        (("--fps", "inf"), "fps"),
        (("--out", "b.mp4", "--sheet", "b.mp4"), "another file"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(tiny_model, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    options = [option.format(folder=tmp_path) for option in options]
    assert generate(tiny_model, tmp_path / "a.mp4", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_model_without_recorded_frames_says_what_else_context_takes(tiny_model, tmp_path, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("context.safetensors"))
    assert generate(model, tmp_path / "a.mp4", "--frames", "2") == 2
    assert "--context takes a video, images or none" in capsys.readouterr().err
    assert generate(model, tmp_path / "a.mp4", "--frames", "2", "--context", "none") == 0


def test_a_sheet_without_pillow_is_refused_before_the_video(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert generate(tiny_model, tmp_path / "a.mp4", "--frames", "2", "--sheet", str(tmp_path / "a.png")) == 2
    assert "pip install" in capsys.readouterr().err
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_run_leaves_nothing_under_the_final_name(tiny_model, tmp_path, number, code):
    out = tmp_path / "a.mp4"
    command = [sys.executable, "-m", "swba_infer", "generate", "--model", str(tiny_model), "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--out", str(out), "--frames", "1000000"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while not [p for p in tmp_path.iterdir() if p.stat().st_size] and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=30) == code
    finally:
        process.kill()
    assert not out.exists()
    if number != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS), ["bench", "attention"], ["bench", "stream"]])
def test_help_explains_every_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: swba-infer" in capsys.readouterr().out


def test_an_unwritable_folder_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    data = tmp_path / "data"
    data.mkdir()
    tensors = {
        "frames": np.zeros((9, 72, 96, 3), np.uint8),
        "actions": np.zeros(9, np.int64),
        "starts": np.array([0, 9]),
        "seeds": np.array([0]),
    }
    save_file(tensors, data / "train-0000.safetensors")
    options = ["--preset", "tiny", "--device", "cpu", "--data", str(data), "--out", str(tmp_path / "file" / "run")]
    assert main(["train", *options]) == 2
    assert "file" in capsys.readouterr().err


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out


def test_doctor_names_versions_choices_and_extras(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "decode: ", "sdpa", "h264", "model"):
        assert word in text


def test_doctor_says_why_the_hopper_kernels_cannot_be_built(capsys, monkeypatch):
    from swba_infer import doctor

    for obstacle, line in ((None, "kernels can be built"), ("too old a Triton", "cannot be built: too old a Triton")):
        monkeypatch.setattr(doctor, "build_obstacle", lambda obstacle=obstacle: obstacle)
        assert main(["doctor"]) == 0
        assert line in capsys.readouterr().out


def test_bench_attention_passes_its_gate_and_writes_json_and_plot(tmp_path, capsys):
    out = tmp_path / "attention.json"
    assert (
        main(["bench", "attention", "--device", "cpu", "--shapes", "tiny", "--budget", "0.01", "--out", str(out)]) == 0
    )
    report = json.loads(out.read_text())
    assert {row["pass"] for row in report["results"]} == {"forward", "backward", "prefill", "decode"}
    assert {"device", "versions", "command", "date", "method", "rulers"} <= report.keys()
    for row in report["results"]:
        assert row["ms_p10"] <= row["ms"] <= row["ms_p90"]
        assert max(row["error_over_bound"].values()) <= 1
    assert out.with_suffix(".png").stat().st_size > 1000


def test_bench_attention_refuses_to_report_a_wrong_result(tmp_path, monkeypatch, capsys):
    import swba_kernels

    right = swba_kernels.block_window_attention
    monkeypatch.setattr(swba_kernels, "block_window_attention", lambda *a, **k: right(*a, **k) * 1.001)
    out = tmp_path / "attention.json"
    assert main(["bench", "attention", "--device", "cpu", "--shapes", "train-b1-h2-d32", "--budget", "0.01"]) == 1
    assert "failed the correctness gate" in capsys.readouterr().out
    assert not out.exists()


@pytest.mark.parametrize("options", [("--shapes", "nope"), ("--peers", "nope"), ("--impl", "nope")])
def test_bench_attention_rejects_unknown_names(options, capsys):
    code = main(["bench", "attention", "--device", "cpu", "--budget", "0.01", *options])
    assert code in (1, 2)
    captured = capsys.readouterr()
    assert "nope" in captured.out + captured.err


def test_bench_stream_measures_frames(tiny_model, tmp_path, capsys):
    out = tmp_path / "stream.json"
    assert (
        main(["bench", "stream", "--model", str(tiny_model), "--device", "cpu", "--frames", "12", "--out", str(out)])
        == 0
    )
    report = json.loads(out.read_text())
    assert report["frames"] == 12
    assert report["ms_p50"] <= report["ms_p99"]
    assert report["frames_per_second"] > 0


def test_scripts_of_actions(tmp_path):
    assert parse_actions("forward*2, left right+forward", NAMES) == [1, 1, 2, 5]
    assert parse_actions("5,forward-left*2,WAIT", NAMES) == [5, 4, 4, 0]
    script = tmp_path / "walk.txt"
    script.write_text("forward*2  # ahead\n\n# nothing here\nleft, wait*1\n")
    assert read_actions(str(script), NAMES) == [1, 1, 2, 0]
    assert read_actions("left", NAMES) == [2]


@pytest.mark.parametrize("bad", ["", "jump", "left*x", "left**2", "left;right", "9", "left*0", "-1"])
def test_a_bad_script_names_its_token(tmp_path, bad):
    with pytest.raises(ConfigError, match="actions"):
        parse_actions(bad, NAMES)
    script = tmp_path / "walk.txt"
    script.write_text(f"left\n{bad}\n")
    if bad:
        with pytest.raises(ConfigError, match="line 2"):
            read_actions(str(script), NAMES)


def test_an_empty_file_of_actions_is_refused(tmp_path):
    (tmp_path / "walk.txt").write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"walk\.txt"):
        read_actions(str(tmp_path / "walk.txt"), NAMES)


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "swba_infer", "doctor"], capture_output=True, env=os.environ, check=False
    )
    assert done.returncode == 0


def test_a_prompt_for_a_model_that_is_no_wan_names_the_model(tmp_path, capsys):
    assert main(["generate", "--prompt", "a cat", "--out", str(tmp_path / "a.mp4")]) == 2
    assert "model: expected a Wan checkpoint, got 'freedoom'" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none.pt"), str(tmp_path / "out")]) == 2
    assert "none.pt': no such file or folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
