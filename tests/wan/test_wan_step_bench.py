"""The benchmark of the transformer alone: what it counts, what it measures, and that its gate can fail."""

from __future__ import annotations

import json
import re
import signal

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from swba_infer import StreamConfig
from swba_infer.bench import wan_block, wan_step
from swba_infer.bench.wan_stream import SIZES
from swba_infer.cli import main
from swba_infer.models.wan import WanTransformer
from swba_infer.wan.sampler import RenoisingSampler
from swba_infer.wan.synthetic import random_wan

CPU = torch.device("cpu")
TINY = SIZES["tiny"]
STREAM = StreamConfig(tokens_per_frame=TINY.tokens_per_frame, frames_per_block=2, window_frames=4, sink_frames=1)
COMMAND = ["bench", "wan-step", "--model", "tiny", "--device", "cpu", "--frames", "2", "--window", "4", "--blocks", "2"]


@pytest.fixture(autouse=True)
def keep_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def filled() -> tuple[wan_block.EngineStream, wan_block.Work]:
    work = wan_block.Work.draw(TINY, STREAM, RenoisingSampler.with_steps(2), CPU, torch.float32)
    stepper = wan_block.make_ours("swba-eager", random_wan(TINY, device=CPU, dtype=torch.float32), STREAM, work.text)
    wan_block.fill(stepper, work)
    return stepper, work


def test_the_report_has_times_floors_and_what_was_skipped(tmp_path, capsys):
    out = tmp_path / "step.json"
    options = ["--variants", "swba-eager,swba-eager-graph", "--sinks", "1", "--steps", "2", "--out", str(out)]
    assert main([*COMMAND, *options]) == 0
    report = json.loads(out.read_text())
    (row,) = report["results"]
    assert row["variant"] == "swba-eager"
    assert row["samples"] == 4
    for part in ("denoise", "commit"):
        assert 0 < row[f"{part}_p10"] <= row[f"{part}_ms"] <= row[f"{part}_p90"]
        floor = report["floor_ms"][part]
        assert row[f"{part}_fraction_of_floor"] == pytest.approx(floor / row[f"{part}_ms"])
    assert report["floor_ms"]["denoise"] == pytest.approx(2 * report["floor_ms"]["commit"])
    assert report["timesteps"][-1] == 0
    assert 0 <= row["compile_s"] < row["warm_up_s"]
    (skipped,) = report["skipped"]
    assert skipped == {
        "variant": "swba-eager-graph",
        "reason": "CUDA graphs need a CUDA device, got cpu",
        "unavailable": True,
    }
    assert "of the floor" in capsys.readouterr().out


def test_the_flops_are_those_that_a_step_makes():
    stepper, work = filled()
    flops = wan_block.pass_flops(stepper.engine.model, STREAM)
    with FlopCounterMode(display=False) as counter:  # it does not count attention on a CPU
        stepper.step(work.noisy[0], 1000.0, commit=False)
    assert flops["matmul"] == counter.get_total_flops()
    pairs = int(STREAM.pattern.mask(8 * STREAM.block_tokens)[-STREAM.block_tokens :].sum())
    text = STREAM.block_tokens * TINY.text_len
    assert flops["attention"] == TINY.num_layers * 4 * TINY.dim * (pairs + text)


def test_the_flops_of_the_published_size_are_those_of_its_paper():
    with torch.device("meta"):
        model = WanTransformer(SIZES["1.3B"])
    flops = wan_block.pass_flops(model, StreamConfig(tokens_per_frame=1560, frames_per_block=3, window_frames=21))
    assert flops["attention"] / 1e12 == pytest.approx(28.3 + 0.44, abs=0.05)
    assert flops["matmul"] / 1e12 == pytest.approx(11.7, abs=0.1)


def test_a_filled_stream_sees_a_full_window_and_a_block_moves_it_on():
    stepper, work = filled()
    assert stepper.engine.position[0] >= STREAM.capacity_tokens
    before = stepper.engine.position[0]
    times = wan_block.time_blocks(stepper, work, 3, CPU)
    assert len(times) == 3
    assert all(block.denoise > 0 and block.commit > 0 for block in times)
    assert stepper.engine.position[0] == before + 3 * STREAM.block_tokens


def test_a_variant_that_disagrees_is_not_timed_and_fails_the_run(monkeypatch, capsys):
    class Wrong(wan_block.EngineStream):
        def step(self, latents, timestep, commit):
            return super().step(latents, timestep, commit) * (1.01 if self.wrong else 1)

    def make(name, *arguments):
        stepper = Wrong(arguments[0], arguments[1], arguments[2], captured=False)
        stepper.wrong = name == "swba-eager"
        return stepper

    monkeypatch.setattr(wan_step, "make_ours", make)
    assert main([*COMMAND, "--variants", "swba-compiled,swba-eager"]) == 1
    text = capsys.readouterr().out
    assert "swba-eager              skipped: failed the correctness gate" in text
    assert "swba-compiled           denoise" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "fast"], r"variants: expected ours, official, all or some of .*'fast'"),
        (["--blocks", "1"], "blocks: expected at least 2, got 1"),
        (["--window", "1"], "window_frames: expected at least frames_per_block"),
        (["--steps", "0"], "steps: expected an int of 1"),
    ],
)
def test_impossible_options_are_refused(options, message, capsys):
    assert main([*COMMAND, *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_variants_take_turns_in_alternating_order(monkeypatch):
    turns = []

    def time_blocks(stepper, work, blocks, device):
        turns.append(stepper)
        return [wan_block.BlockTime(i, i) for i in range(blocks)]

    monkeypatch.setattr(wan_step, "time_blocks", time_blocks)
    times = wan_step.interleave_blocks({"a": "A", "b": "B"}, None, 5, CPU)
    assert turns == list("ABBAABBA")
    assert [block.denoise for block in times["a"]] == 4 * [2, 3, 4]


@pytest.mark.gpu
def test_all_variants_of_ours_agree_on_a_gpu(tmp_path):
    out = tmp_path / "step.json"
    command = ["cuda" if word == "cpu" else word for word in COMMAND]
    assert main([*command, "--sinks", "1", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [row["variant"] for row in report["results"]] == list(wan_block.OURS)
    assert report["skipped"] == []
    assert report["interleaved"]
