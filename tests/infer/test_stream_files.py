from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import TinyModel
from torch import Tensor

from swba_infer import CheckpointError, ConfigError, StreamConfig, StreamingEngine, StreamStateError

STREAM = StreamConfig(tokens_per_frame=2, frames_per_block=2, window_frames=5, sink_frames=1)
TESTS = Path(__file__).parents[1]


def draw(lanes: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(lanes, tokens, 3, generator=torch.Generator().manual_seed(seed))


def make_engine(lanes: int = 2, stream: StreamConfig = STREAM, dtype: torch.dtype | None = None, **model):
    return StreamingEngine(TinyModel(**{"state": True, **model}), stream, lanes=lanes, dtype=dtype)


def started(**options) -> StreamingEngine:
    engine = make_engine(**options)
    engine.set_state("prompt", torch.full((engine.lanes, 16), 0.5, dtype=engine.dtype))
    engine.prefill(draw(engine.lanes, 22))
    engine.step(draw(1, 3), lanes=[0])
    engine.step(draw(engine.lanes, 6), commit=False)
    return engine


def future(engine: StreamingEngine) -> list[Tensor]:
    return [engine.step(draw(engine.lanes, 6, 1)), engine.prefill(draw(engine.lanes, 13, 2))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_stream_resumes_bit_for_bit_with_its_counters(tmp_path, dtype):
    engine = started(dtype=dtype)
    engine.save(tmp_path / "stream.safetensors", extra={"seed": 7, "block": 3, "note": "left turn"})
    fresh = make_engine(dtype=dtype)
    assert fresh.load(tmp_path / "stream.safetensors") == {"seed": 7, "block": 3, "note": "left turn"}
    assert fresh.position == (25, 22) == tuple(fresh.cache.position_tensor.tolist())
    with pytest.raises(StreamStateError, match="step of at least 6"):
        fresh.step(draw(2, 4))
    assert same(future(fresh), future(engine))


def test_a_saved_stream_resumes_in_another_process(tmp_path):
    engine = started()
    engine.save(tmp_path / "stream.safetensors")
    code = (
        "import torch, sys; from test_stream_files import make_engine, future\n"
        "engine = make_engine(); engine.load(sys.argv[1]); torch.save(future(engine), sys.argv[2])\n"
    )
    run([sys.executable, "-c", code, str(tmp_path / "stream.safetensors"), str(tmp_path / "out.pt")])
    assert same(torch.load(tmp_path / "out.pt", weights_only=True), future(engine))


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    paths = [str(TESTS), str(TESTS / "infer"), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def test_an_empty_stream_and_one_whose_ring_is_half_full_can_be_saved(tmp_path):
    for tokens in (0, 5):
        engine, fresh = make_engine(), make_engine()
        fresh.prefill(draw(2, 30))
        if tokens:
            engine.prefill(draw(2, tokens))
        engine.save(tmp_path / "stream.safetensors")
        fresh.load(tmp_path / "stream.safetensors")
        assert fresh.position == (tokens, tokens)
        assert same(future(fresh), future(engine))


class Crash(BaseException):
    pass


@pytest.mark.parametrize("moment", ["save_file", "half a file", "_flush", "chmod", "replace", "second _flush"])
def test_a_crash_at_any_moment_of_saving_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, moment):
    path = tmp_path / "stream.safetensors"
    old = started()
    old.save(path, extra={"block": 1})
    engine = started()
    future(engine)
    calls = 0

    def crash(*args, **kwargs):
        nonlocal calls
        calls += 1
        if moment == "half a file":
            Path(args[1]).write_bytes(b"\x40" * 100)
        if moment != "second _flush" or calls == 2:
            raise Crash

    where = {
        "save_file": "swba_infer.stream_state.save_file",
        "half a file": "swba_infer.stream_state.save_file",
        "chmod": "pathlib.Path.chmod",
        "replace": "pathlib.Path.replace",
    }.get(moment, "swba_infer.stream_state._flush")
    with monkeypatch.context() as patch:
        patch.setattr(where, crash)
        with pytest.raises(Crash):
            engine.save(path, extra={"block": 2})
    fresh = make_engine()
    survivor = fresh.load(path)
    new = moment == "second _flush"
    assert survivor == {"block": 2 if new else 1}
    assert same(future(fresh), future(engine if new else old))
    assert os.listdir(tmp_path) == ["stream.safetensors"]


@pytest.mark.slow
def test_a_process_killed_while_it_saves_leaves_a_whole_file(tmp_path):
    path = tmp_path / "stream.safetensors"
    code = (
        "import sys; from test_stream_files import started, draw\n"
        "engine = started()\n"
        "for block in range(10**9):\n"
        "    engine.step(draw(2, 6, block)); engine.save(sys.argv[1], extra={'block': block})\n"
        "    print(block, flush=True)\n"
    )
    expected = started()
    done = -1
    for delay in (0.0, 0.003, 0.0071):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, env=environment()
        )
        try:
            assert process.stdout is not None
            for _ in range(3):
                assert process.stdout.readline()
            time.sleep(delay)
        finally:
            process.kill()
            process.communicate()
        fresh = make_engine()
        block = fresh.load(path)["block"]
        assert isinstance(block, int)
        assert block >= 2
        expected = started()
        for done in range(block + 1):
            expected.step(draw(2, 6, done))
        assert same(future(fresh), future(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "model: weights"),
        ({"layers": 3}, "model: config"),
        ({"stream": replace(STREAM, window_frames=4, sink_frames=2)}, "stream: window_frames 4, got 5"),
        ({"lanes": 3}, "cache: lanes 3, got 2"),
        ({"dtype": torch.float64}, "model: weights"),
    ],
)
def test_a_stream_of_another_model_or_other_sizes_is_refused_and_nothing_changes(tmp_path, options, message):
    started().save(tmp_path / "stream.safetensors")
    engine, twin = started(**options), started(**options)
    with pytest.raises(CheckpointError, match=message):
        engine.load(tmp_path / "stream.safetensors")
    assert engine.position == twin.position
    assert same(future(engine), future(twin))


def test_the_fingerprint_follows_weights_that_change_in_place(tmp_path):
    engine = started()
    engine.save(tmp_path / "before.safetensors")
    with torch.no_grad():
        engine.model.head.weight.add_(1e-3)
    with pytest.raises(CheckpointError, match="model: weights"):
        engine.load(tmp_path / "before.safetensors")
    engine.save(tmp_path / "after.safetensors")
    engine.load(tmp_path / "after.safetensors")


def damage(change):
    """Rewrite a stream file with `change(tensors, metadata)` applied."""

    def apply(path: Path) -> None:
        tensors = load_file(path)
        metadata = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])["__metadata__"]
        change(tensors, metadata)
        save_file(tensors, path, metadata=metadata)

    return apply


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "truncated": (cut, "expected .* bytes"),
    "empty": (lambda path: path.write_bytes(b""), "truncated"),
    "no file": (lambda path: path.unlink(), "stream.safetensors"),
    "missing tensor": (damage(lambda t, m: t.pop("ring.v")), r"missing tensors \['ring.v'\]"),
    "extra tensor": (damage(lambda t, m: t.update(more=torch.ones(1))), r"extra tensors \['more'\]"),
    "other shape": (damage(lambda t, m: t.update({"ring.k": t["ring.k"][:, :1].clone()})), "snapshot.k"),
    "other dtype": (damage(lambda t, m: t.update({"ring.k": t["ring.k"].double()})), "snapshot.k"),
    "bad position": (damage(lambda t, m: t.update(position=torch.tensor([-1, 22]))), "positions of at least 0"),
    "float position": (damage(lambda t, m: t.update(position=torch.ones(2))), "position: expected int64"),
    "other state": (damage(lambda t, m: t.update({"state.prompt": torch.ones(2, 3)})), "state.prompt"),
    "other format": (damage(lambda t, m: m.update(format="pt")), "expected a stream file"),
    "no fingerprint": (damage(lambda t, m: m.pop("fingerprint")), "fingerprint"),
    "odd fingerprint": (damage(lambda t, m: m.update(fingerprint="[]")), "expected a stream of this model"),
    "broken extra": (damage(lambda t, m: m.update(extra="{")), "expected a fingerprint and extra in JSON"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_and_nothing_changes(tmp_path, name):
    change, message = DAMAGE[name]
    path = tmp_path / "stream.safetensors"
    engine, twin = started(), started()
    started().save(path)
    change(path)
    with pytest.raises(CheckpointError, match=message):
        engine.load(path)
    assert same(future(engine), future(twin))


def test_saving_says_what_is_wrong_with_its_arguments(tmp_path):
    engine = started()
    for extra in ({"rate": 0.5}, {1: 2}):
        with pytest.raises(StreamStateError, match="extra: expected names with ints or strings"):
            engine.save(tmp_path / "stream.safetensors", extra=extra)
    with pytest.raises(ConfigError, match="directory"):
        engine.save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="writable"):
        engine.save(tmp_path / "file" / "stream.safetensors")
    assert os.listdir(tmp_path) == ["file"]


def test_a_callers_tensors_come_back_from_read_and_are_refused_by_load(tmp_path):
    engine = StreamingEngine(TinyModel(), STREAM)
    own = {"a.b": torch.arange(6).reshape(2, 3).T}
    engine.save(tmp_path / "own", {"n": 1}, own)
    stored = engine.read(tmp_path / "own")
    assert stored.extra == {"n": 1}
    assert list(stored.tensors) == ["a.b"]
    assert torch.equal(stored.tensors["a.b"], own["a.b"])
    with pytest.raises(CheckpointError, match="expected no tensors of a caller, got"):
        engine.load(tmp_path / "own")
