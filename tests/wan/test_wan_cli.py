"""`swba-infer generate` with prompts, end to end with a folder of tiny models; what is interrupted stays playable."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from generator_cases import clip, embedding, tiny_autoencoder
from safetensors.torch import save_file
from wan_files import DIFFUSERS_CONFIG, SIZES, weights, write_folder

pytest.importorskip("diffusers")

from swba_infer.cli import main
from swba_infer.models.wan import WanTransformer
from swba_infer.video import VideoWriter, read_frames
from swba_infer.wan.prompts import PromptSchedule
from swba_infer.wan.text import EmbeddedPrompts, write_embeds


@pytest.fixture(autouse=True)
def keep_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as diffusers writes a pipeline, without a text encoder."""
    folder = tmp_path_factory.mktemp("wan") / "tiny"
    write_folder(folder / "transformer", DIFFUSERS_CONFIG, weights())
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    tiny_autoencoder().save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def embeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embeds") / "prompts.safetensors"
    schedule = PromptSchedule((0.0, 0.5), ("a", "b"))
    write_embeds(path, EmbeddedPrompts(schedule, torch.stack([embedding(1), embedding(2)])))
    return path


def arguments(model: Path, out: Path, *options: object) -> list[str]:
    fixed = ["generate", "--model", model, "--device", "cpu", "--out", out, "--size", "48x32", "--steps", "2"]
    return [str(word) for word in (*fixed, "--frames-per-block", "2", "--window", "4", *options)]


def test_a_prompt_makes_a_video_and_says_how_fast(model, embeds, tmp_path, capsys):
    out = tmp_path / "new" / "a.mp4"
    assert main(arguments(model, out, "--prompt-embeds", embeds, "--seconds", "1.25", "--sinks", "1")) == 0
    assert read_frames(out).shape == (20, 32, 48, 3)
    assert [p.name for p in out.parent.iterdir()] == ["a.mp4"]
    captured = capsys.readouterr()
    for word in ("48x32 pixels, 2 steps a block", "20 frames", "p50", "p99", "frames/s", "a.mp4"):
        assert word in captured.out
    assert "streaming 20/20" in captured.err
    assert "ms a block" in captured.err


def test_sinks_at_a_bounded_distance_make_another_video_once_the_window_is_full(model, embeds, tmp_path):
    videos = []
    for distance in ("growing", "bounded"):
        out = tmp_path / f"{distance}.mp4"
        options = ("--prompt-embeds", embeds, "--frames", 32, "--sinks", "1", "--sink-distance", distance)
        assert main(arguments(model, out, *options)) == 0
        videos.append(read_frames(out))
    differ = (videos[0] != videos[1]).reshape(32, -1).any(axis=1)
    assert not differ[:13].any()
    assert differ[-1]


@pytest.mark.parametrize("sinks", [(), ("--sinks", 0)])
def test_a_distance_without_sinks_is_refused(model, embeds, tmp_path, capsys, sinks):
    options = ("--prompt-embeds", embeds, "--sink-distance", "bounded", *sinks)
    assert main(arguments(model, tmp_path / "a.mp4", *options)) == 2
    assert "sinks: expected at least 1 with --sink-distance bounded, got 0" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_file(model, embeds, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = ("--prompt-embeds", embeds, "--frames", 16, "--seed", seed)
        assert main(arguments(model, tmp_path / f"{name}.mp4", *options)) == 0
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_guidance_and_a_video_to_continue(model, embeds, tmp_path):
    save_file({"x": embedding(9)}, tmp_path / "negative.safetensors")
    with VideoWriter(tmp_path / "clip.mp4") as video:
        for frame in clip(7):
            video.write(frame)
    options = ("--guidance", 3, "--negative", tmp_path / "negative.safetensors", "--context", tmp_path / "clip.mp4")
    out = tmp_path / "a.mkv"
    assert main(arguments(model, out, "--prompt-embeds", embeds, "--frames", 12, *options)) == 0
    assert len(read_frames(out)) == 12


class TextStub:
    """An encoder that knows two prompts."""

    def __enter__(self) -> TextStub:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def encode_all(self, prompts: list[str]) -> torch.Tensor:
        return torch.stack([embedding({"a cat": 1, "a dog": 2}[prompt]) for prompt in prompts])


def test_a_prompt_file_is_encoded_and_gives_what_its_embeddings_give(model, embeds, tmp_path, monkeypatch):
    monkeypatch.setattr("swba_infer.wan.text.TextEncoder.from_pretrained", lambda *given: TextStub())
    (tmp_path / "prompts.txt").write_text("0s: a cat\n0.5s: a dog\n")
    for name, options in (("a", ("--prompts", tmp_path / "prompts.txt")), ("b", ("--prompt-embeds", embeds))):
        assert main(arguments(model, tmp_path / f"{name}.mp4", "--frames", 20, *options)) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert main(arguments(model, tmp_path / "c.mp4", "--frames", 20, "--prompt", "a cat")) == 0
    a, c = read_frames(tmp_path / "a.mp4"), read_frames(tmp_path / "c.mp4")
    assert np.array_equal(a[:5], c[:5])
    assert not np.array_equal(a[-4:], c[-4:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seconds", "0"), "seconds"),
        (("--seconds", "nan"), "seconds"),
        (("--seconds", "-1"), "seconds"),
        (("--seconds", "1e308"), "seconds: expected at most"),
        (("--frames", "1" + 13 * "0"), "frames: expected at least 1 and at most"),
        (("--frames", "0"), "frames"),
        (("--seconds", "1", "--frames", "9"), "seconds"),
        (("--size", "50x32"), "width: expected a positive multiple of 16"),
        (("--size", "big"), "size"),
        (("--window", "1"), "window_frames"),
        (("--window", "1000000000"), "cache: expected at most"),
        (("--size", "640000x640000"), "cache: expected at most"),
        (("--guidance", "3"), "negative"),
        (("--negative", "rain"), "negative"),
        (("--actions", "left"), "actions"),
        (("--sheet", "a.png"), "sheet"),
        (("--context", "demo"), "context"),
        (("--base", "nowhere"), "nowhere"),
        (("--frames", "6"), "every prompt"),
        (("--steps", "0"), "steps"),
        (("--out", "a.gif"), "a.gif"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_is_generated(model, embeds, tmp_path, capsys, options, message):
    assert main(arguments(model, tmp_path / "a.mp4", "--prompt-embeds", embeds, *options)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "expected --prompt, --prompts or --prompt-embeds"),
        (("--prompts", "missing.txt"), "missing.txt"),
        (("--prompt", "a cat"), "text_encoder"),
        (("--prompt-embeds", "missing.safetensors"), "missing.safetensors"),
    ],
)
def test_a_wan_without_a_usable_prompt_is_refused(model, tmp_path, capsys, options, message):
    assert main(arguments(model, tmp_path / "a.mp4", *options)) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_transformer_is_looked_at_before_a_text_is_encoded(model, tmp_path, capsys):
    """The folder has no text encoder either, which is found out later."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    file = next((broken / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    assert main(arguments(broken, tmp_path / "a.mp4", "--prompt", "a cat")) == 2
    assert file.name in capsys.readouterr().err


def test_nan_stops_with_the_block_and_keeps_the_file_so_far(model, embeds, tmp_path, capsys, monkeypatch):
    forward, calls = WanTransformer.forward, iter(range(1000))

    def poisoned(self, *given, **options):
        out = forward(self, *given, **options)
        return out * float("nan") if next(calls) >= 6 else out

    monkeypatch.setattr(WanTransformer, "forward", poisoned)
    assert main(arguments(model, tmp_path / "a.mp4", "--prompt-embeds", embeds, "--frames", 40)) == 2
    error = capsys.readouterr().err
    assert "block 2 (latent frame 4)" in error
    assert "kept 13 frames in" in error
    assert [p.name for p in tmp_path.iterdir()] == ["a.partial.mp4"]
    assert len(read_frames(tmp_path / "a.partial.mp4")) == 13


def test_check_finds_weights_that_attention_would_hide(embeds, model, tmp_path, capsys):
    """Of a row whose scores are all NaN, torch's attention for the CPU makes zeros."""
    poisoned = {**weights(), "blocks.1.attn1.to_k.bias": torch.full((128,), float("nan"))}
    folder = write_folder(tmp_path / "poisoned", DIFFUSERS_CONFIG, poisoned)
    options = ("--base", model, "--prompt-embeds", embeds, "--check")
    assert main(arguments(folder, tmp_path / "a.mp4", *options)) == 2
    assert "tensor 'blocks.1.attn1.to_k.bias': expected finite values" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_an_interrupted_run_leaves_a_playable_file(model, embeds, tmp_path, number, code, suffix):
    out, partial = tmp_path / f"a{suffix}", tmp_path / f"a.partial{suffix}"
    command = [sys.executable, "-m", "swba_infer", *arguments(model, out, "--prompt-embeds", embeds)]
    process = subprocess.Popen([*command, "--frames", "100000"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while (not partial.exists() or partial.stat().st_size < 60_000) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) == code
    finally:
        process.kill()
    assert [p.name for p in tmp_path.iterdir()] == [partial.name]
    frames = read_frames(partial)
    assert len(frames) > 16
    assert frames.shape[1:] == (32, 48, 3)


def test_the_tiny_folder_is_the_size_the_tests_say():
    assert (8 * SIZES.latent_width, 8 * SIZES.latent_height) == (48, 32)
