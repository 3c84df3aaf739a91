from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from swba_infer.errors import ConfigError
from swba_infer.training import metrics
from swba_infer.training.record import FORWARD, LEFT, RIGHT


def panorama(offsets: list[float]) -> torch.Tensor:
    """Draw a smooth random surrounding as a camera with 90 degrees of view sees it, turned by offsets (columns)."""
    rng = np.random.default_rng(0)
    waves = [(rng.integers(2, 40), rng.uniform(0, 6.3), rng.uniform(0, 6.3)) for _ in range(30)]
    x = (np.arange(96) + 0.5) / 48 - 1
    frames = []
    for offset in offsets:
        angle = np.arctan(x) - offset / 96 * np.pi / 2
        rows = sum(np.sin(k * angle[None] + a + 0.1 * np.arange(72)[:, None] * np.sin(b)) for k, a, b in waves)
        frames.append(np.repeat((rows / 12 + 0.5).clip(0, 1)[..., None], 3, -1) * 255)
    return torch.from_numpy(np.stack(frames).astype(np.uint8))


@pytest.mark.parametrize("shift", [-8.0, -3.5, 0.0, 2.0, 8.0])
def test_turning_on_the_spot_is_measured_in_columns(shift):
    frames = panorama([0.0, shift])
    motion = metrics.horizontal_motion(frames[:1], frames[1:])
    assert float(motion.shift) == pytest.approx(shift, abs=0.3)


def test_agreement_counts_turns_by_their_side():
    frames = panorama([0, 8, 16, 16, 8, 0])[None]
    right_way = torch.tensor([[0, LEFT, LEFT, FORWARD, RIGHT, RIGHT]])
    assert metrics.turn_agreement(frames, right_way).overall == 1
    wrong_way = torch.tensor([[0, RIGHT, RIGHT, FORWARD, LEFT, LEFT]])
    result = metrics.turn_agreement(frames, wrong_way)
    assert (result.left, result.right, result.straight) == (0, 0, 1)
    assert (result.judged, result.skipped) == (5, 0)


def test_blank_frames_are_not_judged():
    blank = torch.full((1, 4, 72, 96, 3), 90, dtype=torch.uint8)
    assert metrics.turn_agreement(blank, torch.ones(1, 4, dtype=torch.int64)).skipped == 3


def test_psnr_and_distances_of_equal_frames():
    frames = torch.randint(0, 256, (3, 72, 96, 3), dtype=torch.uint8)
    assert metrics.psnr(frames, frames).tolist() == [60, 60, 60]
    off = (frames.int() + torch.where(frames > 127, -10, 10)).to(torch.uint8)
    torch.testing.assert_close(metrics.psnr(frames, off), torch.full((3,), 28.13), atol=0.01, rtol=0)
    assert metrics.nearest(frames, metrics.thumbnails(frames)).max() < 1e-3
    assert metrics.histogram(frames).sum() == pytest.approx(1)


def test_blur_lowers_the_edge_energy():
    frames = torch.randint(0, 256, (2, 72, 96, 3), dtype=torch.uint8)
    soft = torch.nn.functional.avg_pool2d(frames.permute(0, 3, 1, 2).float(), 3, 1, 1).permute(0, 2, 3, 1)
    assert metrics.edge_energy(soft.to(torch.uint8)).max() < 0.6 * metrics.edge_energy(frames).min()


@pytest.mark.slow
def test_record_train_and_evaluate_work_as_commands(tmp_path, capsys):
    pytest.importorskip("vizdoom")
    from swba_infer.training import card, evaluate, loop, record

    data, out = str(tmp_path / "data"), tmp_path / "run"
    assert record.main(["--out", data, "--episodes", "4", "--held-out", "6", "--frames", "40", "--workers", "1"]) == 0
    assert loop.main(["--data", data, "--out", str(out), "--preset", "tiny", "--steps", "4", "--device", "cpu"]) == 0
    folder = ["--model", str(out / "model"), "--data", data, "--out", str(out / "eval"), "--device", "cpu"]
    assert evaluate.main([*folder, "--lanes", "2", "--frames", "12", "--context", "4", "--no-sweep"]) == 0
    result = json.loads((out / "eval" / "metrics.json").read_text())
    assert result["next_frame"]["copy_psnr"] > 10
    assert len(result["rollout"]["over_time"]) == 6
    assert (out / "eval" / "contact.png").is_file()
    assert (out / "eval" / "rollouts.png").is_file()
    assert "next_frame" in capsys.readouterr().out

    (out / "model" / "metrics.json").write_bytes((out / "eval" / "metrics.json").read_bytes())
    assert card.main(["--model", str(out / "model"), "--name", "small", "--data", data]) == 0
    text = (out / "model" / "MODEL_CARD.md").read_text()
    record_facts = json.loads((tmp_path / "data" / "record.json").read_text())
    assert text.startswith("# small:")
    assert f"4 episodes, {record_facts['frames']} frames, seeds 0 to 3" in " ".join(text.split())
    assert f"{result['next_frame']['psnr']:.1f} dB | {result['next_frame']['copy_psnr']:.1f} dB by copying" in text
    assert "1. 4 steps in" in text
    assert "side by side" not in text
    assert "ships with another sampler" not in text

    row = {"weights": "before", "turn_agreement": result["real"]["turn_agreement"]}
    row |= {"edge_energy": 0.01234, "nearest_real": 0.02, "sampler": {"steps": 2, "shift": 1.5, "context_noise": 0.1}}
    compared = {"lanes": 3, "frames": 70, "device": "2 CPU cores", "dtype": "float32", "bank": 160, "rows": [row]}
    sampler = {"steps": 5, "shift": 2.0, "context_noise": 0.0}
    (out / "model" / "metrics.json").write_text(json.dumps({**result, "sampler": sampler, "comparison": compared}))
    assert card.main(["--model", str(out / "model"), "--data", data]) == 0
    text = (out / "model" / "MODEL_CARD.md").read_text()
    assert "ships with another sampler" in " ".join(text.split())
    assert "3 streams of 70 frames on 2 CPU cores" in " ".join(text.split())
    assert "| before, 2 denoising steps (shift 1.5, history at noise level 0.1) |" in text
    assert "| 0.0123 | 0.0200 |" in text


@pytest.mark.parametrize("option", ["--lanes", "--frames", "--context"])
def test_evaluation_refuses_counts_below_one_before_it_starts(tmp_path, option):
    from swba_infer.training import evaluate

    with pytest.raises(ConfigError, match=option[2:]):
        evaluate.main(["--out", str(tmp_path / "out"), option, "0"])
    with pytest.raises(ConfigError, match="shipped models"):
        evaluate.main(["--model", "nope", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
