"""The peer of the transformer's benchmark: Self-Forcing's own modules, where SWBA_OFFICIAL_DIR names a checkout.

Without one, what is tested is what the benchmark says of folders that it cannot use.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from swba_infer import StreamConfig
from swba_infer.bench import wan_block, wan_step
from swba_infer.bench.peers import Unavailable
from swba_infer.bench.wan_official import OFFICIAL, Official, OfficialStream
from swba_infer.bench.wan_stream import TINY
from swba_infer.cli import main
from swba_infer.errors import ConfigError, NumericsError
from swba_infer.wan.sampler import RenoisingSampler
from swba_infer.wan.synthetic import random_wan

CPU = torch.device("cpu")
SIZE = replace(TINY, num_attention_heads=3, attention_head_dim=24)
COMMAND = ["bench", "wan-step", "--model", "tiny", "--device", "cpu", "--blocks", "2", "--window", "4", "--frames", "2"]
FOLDER = os.environ.get("SWBA_OFFICIAL_DIR")
needs_official = pytest.mark.skipif(FOLDER is None, reason="SWBA_OFFICIAL_DIR names no checkout of Self-Forcing")


@pytest.fixture(autouse=True)
def keep_process():
    """Undo what a run leaves in the process: its signal handler and the official modules."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    for name in [name for name in sys.modules if name.split(".")[0] == "wan"]:
        del sys.modules[name]


def pretend(folder: Path, code: str) -> Path:
    """Write a folder that looks like a checkout."""
    modules = folder / "wan" / "modules"
    modules.mkdir(parents=True)
    (modules / "causal_model.py").write_text(code)
    return folder


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    assert main([*COMMAND, "--official", str(tmp_path)]) == 2
    assert "official: expected a folder with wan/modules/causal_model.py, got" in capsys.readouterr().err


def test_official_variants_need_the_folder(capsys):
    assert main([*COMMAND, "--variants", "swba-eager,official"]) == 2
    assert "official: expected a folder for the variants" in capsys.readouterr().err


@pytest.mark.parametrize(
    "code",
    [
        "import no_such_module_of_theirs",
        "try:\n import no_such_module_of_theirs\nexcept ImportError as error:\n raise RuntimeError('lazy') from error",
    ],
)
def test_a_missing_module_is_named_and_ours_are_still_measured(tmp_path, capsys, code):
    folder = pretend(tmp_path, code)
    with pytest.raises(Unavailable, match="it needs the module no_such_module_of_theirs, which is not installed"):
        Official(folder)
    assert "wan" not in sys.modules
    assert main([*COMMAND, "--variants", "swba-eager,official-flash", "--official", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "swba-eager              denoise" in text
    assert "official-flash          skipped: the official code cannot be imported: it needs the module no_such" in text


def test_another_package_of_that_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wan", type(sys)("wan"))
    with pytest.raises(ConfigError, match="expected no other package 'wan' to be imported"):
        Official(pretend(tmp_path, ""))


def test_blocks_beyond_the_rotary_table_are_refused():
    wan_step._check_table(list(OFFICIAL), history=7, blocks=83, frames=3)
    wan_step._check_table(["swba-eager"], history=7, blocks=84, frames=3)
    with pytest.raises(ConfigError, match=r"blocks: expected at most 83 with an official variant, .* got 84"):
        wan_step._check_table(list(OFFICIAL), history=7, blocks=84, frames=3)


def both(stream: StreamConfig, compiled: bool = False) -> tuple[list, wan_block.Work]:
    model = random_wan(SIZE, device=CPU, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    work = wan_block.Work.draw(SIZE, stream, RenoisingSampler.with_steps(2), CPU, torch.float32)
    ours = wan_block.make_ours("swba-eager", model, stream, work.text)
    return [ours, Official(Path(str(FOLDER))).stream(model, stream, work.text, "math", compiled)], work


def compare(steppers: list, work: wan_block.Work, blocks: int) -> None:
    for i in range(blocks):
        clean = work.history[i % len(work.history)]
        for latents, timestep, commit in ((work.noisy[0], 937.5, False), (clean, 0.0, True)):
            ours, theirs = (stepper.step(latents, timestep, commit) for stepper in steppers)
            assert (ours - theirs).norm() < 1e-5 * ours.norm()


@needs_official
@pytest.mark.parametrize(("frames", "window", "sinks"), [(1, 3, 0), (1, 3, 2), (2, 4, 1), (3, 6, 0), (3, 5, 2)])
def test_the_official_code_agrees_with_ours_over_several_windows(frames, window, sinks):
    stream = StreamConfig(
        tokens_per_frame=SIZE.tokens_per_frame, frames_per_block=frames, window_frames=window, sink_frames=sinks
    )
    compare(*both(stream), blocks=12)


@needs_official
@pytest.mark.slow
def test_compiling_the_official_code_changes_nothing():
    stream = StreamConfig(tokens_per_frame=SIZE.tokens_per_frame, frames_per_block=2, window_frames=4)
    compare(*both(stream, compiled=True), blocks=5)


@needs_official
def test_a_run_measures_the_official_code_beside_ours(tmp_path):
    out = tmp_path / "step.json"
    options = ["--variants", "swba-eager,official", "--official", str(FOLDER), "--sinks", "1", "--out", str(out)]
    assert main([*COMMAND, *options]) == 0
    report = json.loads(out.read_text())
    ours, theirs = report["results"]
    assert (ours["variant"], theirs["variant"]) == ("swba-eager", "official-flash")
    assert 0 < max(theirs["error"].values()) < report["error_bound"]
    assert 0 < report["official_error"] < 1e-5
    assert ours["denoise_best_official_over_this"] == theirs["denoise_ms"] / ours["denoise_ms"]
    reasons = {row["variant"]: row["reason"] for row in report["skipped"]}
    assert reasons == dict.fromkeys(list(OFFICIAL)[1:], "cuDNN attention needs a CUDA device, got cpu")


@needs_official
def test_official_code_that_computes_something_else_is_not_measured(monkeypatch):
    right = OfficialStream.step
    monkeypatch.setattr(OfficialStream, "step", lambda *arguments: right(*arguments) * 1.001)
    with pytest.raises(NumericsError, match="official: expected the flow of our model within"):
        Official(Path(str(FOLDER)))
