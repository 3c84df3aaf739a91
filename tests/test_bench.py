"""The benchmark's own parts on a CPU: shapes, peers' masks, the gate, and what happens when a variant fails."""

from __future__ import annotations

import json

import pytest
import torch

from swba_infer.bench import attention, peers, wan_vae
from swba_infer.bench.clock import interleave
from swba_infer.bench.gate import check, expect
from swba_infer.bench.report import header, summary
from swba_infer.bench.sensors import sensors
from swba_infer.bench.shapes import SETS, Shape, _prefill, _training, select
from swba_infer.cli import main
from swba_infer.errors import ConfigError

CPU = torch.device("cpu")
PATTERNS = [
    _training(1, 1, 16, 100, 3, 7),
    _training(1, 2, 16, 333, 2, 3, tail=100),
    _training(1, 2, 16, 130, 2, 5, sinks=2),
    _training(1, 2, 16, 48, 4, 9, kv_heads=1, sinks=1, tail=5),
    _training(1, 1, 16, 256, 2, 4, sinks=1),
]
PREFILLS = [
    _prefill(2, 2, 16, 100, 3, 1),
    _prefill(1, 2, 16, 150, 2, 3, sinks=1),
    _prefill(1, 4, 16, 48, 9, 4, kv_heads=2, sinks=2),
    _prefill(1, 1, 16, 130, 2, 2),
]


def name_of(shape: Shape) -> str:
    return shape.name


def test_names_of_shapes_differ() -> None:
    names = [shape.name for shape in {*SETS["all"], *SETS["odd"], *SETS["tiny"]}]
    assert len(names) == len(set(names))
    assert len(SETS["all"]) == 22
    assert select("odd") == [*SETS["odd-training"], *SETS["odd-decode"]]


def mask_of(shape: Shape) -> torch.Tensor:
    """Return who sees whom, [N, keys]."""
    return shape.pattern.mask(shape.keys)[shape.history :]


@pytest.mark.parametrize("shape", PATTERNS + PREFILLS, ids=name_of)
def test_blocks_and_the_keys_that_they_see(shape) -> None:
    mask = torch.zeros(shape.tokens, shape.keys, dtype=torch.bool)
    for start, end, spans in shape.blocks_and_keys():
        for low, high in spans:
            mask[start:end, low:high] = True
    assert torch.equal(mask, mask_of(shape))


@pytest.mark.parametrize("shape", PATTERNS + PREFILLS, ids=name_of)
def test_flops_count_each_pair_that_is_seen(shape) -> None:
    assert shape.flops == 4 * shape.batch * shape.heads * shape.head_dim * int(mask_of(shape).sum())


@pytest.mark.parametrize("shape", PATTERNS + PREFILLS, ids=name_of)
def test_the_mask_of_flex_attention_is_the_pattern(shape) -> None:
    tile, n = 128, shape.tokens
    mask = peers.block_mask(shape, CPU, tile)
    exact = mask_of(shape)
    q, k = torch.meshgrid(torch.arange(n), torch.arange(shape.keys), indexing="ij")
    assert torch.equal(mask.mask_mod(0, 0, q, k), exact)
    tiles = -(-shape.keys // tile)
    for i in range(-(-n // tile)):
        full = set(mask.full_kv_indices[0, 0, i, : mask.full_kv_num_blocks[0, 0, i]].tolist())
        partial = set(mask.kv_indices[0, 0, i, : mask.kv_num_blocks[0, 0, i]].tolist())
        assert not full & partial
        for j in range(tiles):
            part = exact[i * tile : (i + 1) * tile, j * tile : (j + 1) * tile]
            if j in full:
                assert part.all()
                assert part.shape[1] == tile
            elif j not in partial:
                assert not part.any()


@pytest.mark.parametrize("shape", PATTERNS, ids=name_of)
@pytest.mark.parametrize("name", ["swba", "loop-math"])
def test_ours_and_the_loop_over_blocks_pass_the_gate(shape, name) -> None:
    tensors = attention.make_tensors(shape, CPU)
    expected = expect(shape, tensors)
    errors = attention._gate(peers.make(name, shape, tensors), expected, tensors)
    assert set(errors) == {"out", "dq", "dk", "dv"}
    assert max(errors.values()) <= 1


@pytest.mark.parametrize("shape", PREFILLS, ids=name_of)
@pytest.mark.parametrize("name", ["swba", "loop-math"])
def test_a_prefill_on_rings_and_the_loop_over_blocks_pass_the_gate(shape, name) -> None:
    """Ours reads full rings that wrapped around; nobody reads the block in them that is older than the window."""
    tensors = attention.make_tensors(shape, CPU)
    expected = expect(shape, tensors)
    assert attention._gate(peers.make(name, shape, tensors), expected, tensors)["out"] <= 1
    tensors["k"][:, :, : shape.history] += 1
    assert check(expected, {"out": peers.make(name, shape, tensors)(*(tensors[x] for x in "qkv"))})["out"] > 1


def test_the_rings_of_a_prefill_are_full_and_wrapped() -> None:
    shape = PREFILLS[2]
    tensors = attention.make_tensors(shape, CPU)
    (k_ring, v_ring), position = peers.full_rings(shape, tensors)
    size, sink, window = shape.block_size, shape.pattern.sink, shape.pattern.window
    assert k_ring.shape == v_ring.shape == (1, 2, sink + window, 16)
    assert (position >= sink + window).all()
    assert (position[0] - sink) % window % size > 0
    assert int((k_ring == 0).all(-1).sum()) == 2 * size
    assert torch.equal(k_ring[:, :, :sink], tensors["k"][:, :, :sink])


def test_the_gate_sees_every_query_head_of_a_group() -> None:
    shape = PATTERNS[3]
    tensors = attention.make_tensors(shape, CPU)
    expected = expect(shape, tensors)
    assert check(expected, {"dk": expected.exact["dk"][None, None]}) == {"dk": 0}
    alone = {name: x if name in "kv" else x[:, 1:] for name, x in tensors.items()}
    assert check(expected, {"dk": expect(shape, alone).exact["dk"][None, None]})["dk"] > 1


def test_a_partly_filled_ring_counts_and_checks_what_is_visible() -> None:
    (shape,) = select("decode-tiny-filled")
    full = Shape(**{**{x: getattr(shape, x) for x in shape.__slots__}, "filled": 0})
    assert shape.flops * full.keys == full.flops * shape.filled
    tensors = attention.make_tensors(shape, CPU)
    tensors["k"][:, :, shape.filled :] = tensors["v"][:, :, shape.filled :] = float("nan")
    for name in ("swba", "sdpa-math"):
        out = peers.make(name, shape, tensors)(tensors["q"], tensors["k"], tensors["v"])
        assert check(expect(shape, tensors), {"out": out})["out"] <= 1


def run(*options: str) -> int:
    return main(
        ["bench", "attention", "--device", "cpu", "--budget", "0.01", "--shapes", "decode-tiny-filled", *options]
    )


def test_a_peer_that_fails_is_one_line_and_no_failure(monkeypatch, capsys) -> None:
    def broken(shape, tensors, impl):
        def call(q, k, v):
            raise RuntimeError("\n\nptxas fatal: no\nmore")

        return call

    monkeypatch.setitem(peers._DECODE, "sdpa-math", broken)
    assert run() == 0
    text = capsys.readouterr().out
    assert "skipped: RuntimeError: ptxas fatal: no\n" in text
    assert "more" not in text


def test_one_of_ours_that_fails_fails_the_run(monkeypatch, capsys) -> None:
    def broken(shape, tensors, impl):
        return lambda q, k, v: q / 0

    monkeypatch.setitem(peers._DECODE, "triton", broken)
    assert run() == 1
    assert "FAILED decode-tiny-filled all triton: failed the correctness gate" in capsys.readouterr().out


def test_variants_are_chosen_by_name(capsys) -> None:
    assert run("--ours", "swba", "--peers", "none") == 0
    text = capsys.readouterr().out
    assert "hopper" not in text
    assert "sdpa" not in text
    for options in (("--ours", "fa4"), ("--peers", "hopper")):
        with pytest.raises(ConfigError, match="expected all, none or some of"):
            attention._wanted(*{"--ours": (options[1], "all"), "--peers": ("all", options[1])}[options[0]], PATTERNS[0])


def test_only_the_second_half_of_a_turn_counts() -> None:
    calls = {name: (lambda: None, 1) for name in "ab"}
    timings = interleave(calls, CPU, budget=1e-9, rounds=4)
    assert {name: timing.samples for name, timing in timings.items()} == {"a": 4, "b": 4}


def test_without_a_gpu_a_report_says_why_clock_and_power_are_missing(tmp_path) -> None:
    assert run("--ours", "swba", "--peers", "none", "--out", str(tmp_path / "report.json")) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["no_sensors"] == "no sensors on cpu"
    assert [(row["sm_mhz"], row["watts"]) for row in report["results"]] == [(None, None)]


def test_errors_of_the_sensors_cost_readings_and_no_more(monkeypatch) -> None:
    class NVMLError(Exception):
        pass

    def fails(device: torch.device) -> float:
        raise NVMLError("Not Supported")

    monkeypatch.setattr(torch.cuda, "clock_rate", fails)
    read, reason = sensors(torch.device("cuda"))
    assert (read(), reason) == (None, "NVMLError: Not Supported")
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda device: 1500)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 700_000)
    read, reason = sensors(torch.device("cuda"))
    assert (read(), reason) == ((1500.0, 700.0), "")
    monkeypatch.setattr(torch.cuda, "clock_rate", fails)
    assert read() is None


@pytest.mark.gpu
def test_on_a_gpu_clock_and_power_are_read_while_it_works() -> None:
    device = torch.device("cuda")
    _, reason = sensors(device)
    if reason:
        pytest.skip(reason)
    x = torch.randn(4096, 4096, device=device)
    (timing,) = interleave({"matmul": (lambda: x @ x, 1)}, device, budget=0.2, rounds=2).values()
    assert timing.sm_mhz > 100
    assert timing.watts > 50


def test_the_summary_puts_ratios_on_ours() -> None:
    def row(variant: str, ms: float, ratio: float) -> dict:
        return {"shape": "s", "pass": "decode", "variant": variant, "ms": ms, "tflops": 1, "best_peer_over_this": ratio}

    text = summary({"results": [row("swba", 0.5, 2.0), row("fa4", 1.0, 1.0)]}, ("swba",))
    assert text.splitlines()[0] == "| shape | pass | unit | fa4 | swba |"
    assert text.splitlines()[2] == "| s | decode | ms | 1.0000 | 0.5000 x2.00 |"


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "inf"])
@pytest.mark.parametrize("what", ["attention", "wan-vae"])
def test_an_impossible_budget_is_refused_before_anything_is_timed(what, budget, capsys) -> None:
    assert main(["bench", what, "--device", "cpu", f"--budget={budget}"]) == 2
    assert capsys.readouterr().err.startswith("swba-infer: budget: expected a positive number of seconds")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "0"], "frames: expected at least 1, got 0"),
        (["--only", "compiled, nhwc"], "only: expected a part of one of"),
        (["--only", "compiled", "--no-compile"], "only: expected a part of one of"),
        (["--height", "0"], "height: expected a positive multiple of 8 pixels, got 0"),
        (["--height", "16", "--width", "17"], "width: expected a positive multiple of 8 pixels, got 17"),
    ],
)
def test_bad_options_of_the_decoders_benchmark_are_refused_by_name(options, message, monkeypatch, capsys) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setitem(wan_vae.MODELS, "wan2.1", {"base_dim": 8, "num_res_blocks": 1})
    assert main(["bench", "wan-vae", "--device", "cpu", *options]) == 2
    assert f"swba-infer: {message}" in capsys.readouterr().err


def test_the_command_in_a_report_can_be_given_to_a_shell() -> None:
    argv = ["bench", "wan-vae", "--only", "channels last", "--budget", "1.5"]
    command = header(CPU, argv)["command"]
    assert command == "swba-infer bench wan-vae --only 'channels last' --budget 1.5"
