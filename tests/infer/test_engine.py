from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_model import TinyModel
from torch import Tensor

from swba_infer import ConfigError, FullSequence, NumericsError, StreamConfig, StreamingEngine, StreamStateError

STREAM = StreamConfig(tokens_per_frame=2, frames_per_block=2, window_frames=5, sink_frames=1)


def draw(lanes: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(lanes, tokens, 3, generator=torch.Generator().manual_seed(seed))


def started(lanes: int = 2, tokens: int = 22, **options) -> StreamingEngine:
    """Return an engine whose ring has wrapped around; two of them hold the same stream."""
    engine = StreamingEngine(TinyModel(state=True), STREAM, lanes=lanes, **options)
    engine.set_state("prompt", torch.randn(lanes, 16, generator=torch.Generator().manual_seed(5)))
    engine.prefill(draw(lanes, tokens, 7))
    return engine


def assert_same_future(engine: StreamingEngine, twin: StreamingEngine) -> None:
    """A step, a committed step and a prefill give the same bits in both."""
    assert engine.position == twin.position
    for commit in (False, True):
        tokens = draw(engine.lanes, 10, 11 + commit)
        assert torch.equal(engine.step(tokens, commit=commit), twin.step(tokens, commit=commit))
    tokens = draw(engine.lanes, 13, 20)
    assert torch.equal(engine.prefill(tokens), twin.prefill(tokens))
    assert torch.equal(engine.step(tokens[:, :4]), twin.step(tokens[:, :4]))
    assert engine.position == twin.position == tuple(engine.cache.position_tensor.tolist())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("call", ["step", "look", "prefill"])
@pytest.mark.parametrize("lanes", [None, [1]])
def test_a_model_that_fails_in_any_layer_leaves_the_stream_as_it_was(call, layer, empty, lanes):
    engine, twin = started(), started()
    if empty:
        engine.reset()
        twin.reset()
    tokens = draw(2 if lanes is None else 1, 8, 3)
    engine.model.fail_in = layer
    options = {} if call == "prefill" else {"commit": call == "step"}
    with pytest.raises(RuntimeError, match=f"layer {layer} fails"):
        (engine.prefill if call == "prefill" else engine.step)(tokens, lanes=lanes, **options)
    engine.model.fail_in = None
    assert_same_future(engine, twin)


def test_a_step_that_fails_before_it_wrote_does_not_bind_the_next_ones_size():
    engine = started()
    engine.model.fail_in = 0
    with pytest.raises(RuntimeError):
        engine.step(draw(2, 10))
    engine.model.fail_in = 1
    with pytest.raises(RuntimeError):
        engine.step(draw(2, 6))
    engine.model.fail_in = None
    with pytest.raises(StreamStateError, match="step of at least 6"):
        engine.step(draw(2, 4))
    engine.step(draw(2, 6))


def test_an_interrupt_between_device_and_host_bookkeeping_leaves_the_stream_as_it_was(monkeypatch):
    engine, twin = started(), started()

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.cache, "advance_host", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.step(draw(2, 4))
    assert_same_future(engine, twin)


BAD_CALLS = {
    "rank": (lambda: {"tokens": torch.zeros(2, 4)}, r"tokens: expected \[2 lanes, tokens, channels\], got \[2, 4\]"),
    "lanes": (lambda: {"tokens": torch.zeros(1, 4, 3)}, r"\[2 lanes"),
    "dtype": (lambda: {"tokens": torch.zeros(2, 4, 3, dtype=torch.uint8)}, "floating dtype, got torch.uint8"),
    "device": (lambda: {"tokens": torch.zeros(2, 4, 3, device="meta")}, "expected a tensor on cpu, got meta"),
    "list": (lambda: {"tokens": [[0.0]]}, "expected a tensor, got list"),
    "too long": (lambda: {"tokens": torch.zeros(2, 11, 3)}, r"expected 1 to 10 \(the window\), got 11"),
    "no token": (lambda: {"tokens": torch.zeros(2, 0, 3)}, "got 0"),
    "lane range": (lambda: {"tokens": torch.zeros(1, 4, 3), "lanes": [2]}, r"lanes: expected ints in 0..1, got 2"),
    "unknown": (lambda: {"tokens": torch.zeros(2, 4, 3), "prompt": 1}, r"\['action', 'flip', 'shift'\].*\['prompt'\]"),
    "value": (lambda: {"tokens": torch.zeros(2, 4, 3), "shift": [1.0]}, "shift: expected a tensor, a number"),
    "channels": (lambda: {"tokens": torch.zeros(2, 4, 5)}, "shapes cannot be multiplied"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("call", ["step", "prefill"])
def test_bad_input_is_named_and_changes_nothing(name, call):
    make, message = BAD_CALLS[name]
    if (name, call) == ("too long", "prefill"):
        return
    engine, twin = started(), started()
    with pytest.raises((StreamStateError, RuntimeError), match=message):
        getattr(engine, call)(**make())
    assert_same_future(engine, twin)


class Misbehaving(TinyModel):
    """Attends as `habit` says."""

    habit = "twice"

    def forward(self, tokens, context, **conditioning):
        out = super().forward(tokens, context, **conditioning)
        if self.habit == "twice":
            self.attend(0, torch.zeros(*tokens.shape[:2], 16), context)
        return {"tuple": (out,), "short": out[:, 1:]}.get(self.habit, out)

    def attend(self, layer, x, context):
        return x if self.habit == "skips" and layer == 1 else super().attend(layer, x, context)


@pytest.mark.parametrize(
    ("habit", "message"),
    [
        ("twice", "each layer to attend once in a forward, got 0 twice"),
        ("skips", r"layers \[1\] did not"),
        ("tuple", r"expected an output \[2, 4, channels\], got tuple"),
        ("short", r"got \[2, 3, 3\]"),
    ],
)
@pytest.mark.parametrize("commit", [True, False])
def test_a_model_that_breaks_the_protocol_is_found_out(habit, message, commit):
    model = Misbehaving()
    model.habit = habit
    engine = StreamingEngine(model, STREAM, lanes=2)
    with pytest.raises(StreamStateError, match=message):
        engine.step(draw(2, 4), commit=commit)
    assert engine.position == (0, 0)


@pytest.mark.parametrize("where", ["tokens", "output"])
@pytest.mark.parametrize("call", ["step", "prefill"])
def test_nan_is_refused_when_checking_is_on_and_changes_nothing(where, call):
    engine, twin = started(check_finite=True), started()
    bad = draw(2, 4)
    bad[1, 2] = float("inf")
    given = {"tokens": bad} if where == "tokens" else {"tokens": draw(2, 4), "shift": float("nan")}
    with pytest.raises(NumericsError, match=where if where == "tokens" else r"positions \[22, 22\]"):
        getattr(engine, call)(**given)
    assert_same_future(engine, twin)


def test_lanes_advance_by_themselves_and_in_the_order_asked_for():
    engine, twin = started(), started()
    tokens = draw(2, 4)
    both = twin.step(tokens)
    swapped = engine.step(tokens.flip(0), lanes=[1, 0])
    torch.testing.assert_close(swapped.flip(0), both)
    alone = engine.step(tokens[:1], lanes=1)
    assert (alone.shape, engine.position) == ((1, 4, 3), (26, 30))


def test_conditioning_means_the_same_as_a_number_a_0_dim_tensor_and_a_tensor_of_lanes():
    engine = started()
    tokens = draw(2, 4)
    outs = [
        engine.step(tokens, commit=False, shift=shift, action=action)
        for shift, action in [
            (0.5, 2),
            (torch.tensor(0.5), torch.tensor(2)),
            (torch.full((2,), 0.5), torch.full((2,), 2)),
        ]
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], engine.step(tokens, commit=False, shift=0.5, action=3))
    assert not torch.equal(outs[0], engine.step(tokens, commit=False, shift=0.5, action=2, flip=True))


class NeedsAction(TinyModel):
    def forward(self, tokens, context, *, action, note=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        assert action.dtype == torch.int64
        assert note in (None, "fast")
        return super().forward(tokens, context, action=action)


def test_a_missing_required_conditioning_is_named():
    engine = StreamingEngine(NeedsAction(), STREAM)
    with pytest.raises(StreamStateError, match=r"required: \['action'\]\), \['action'\] missing"):
        engine.step(draw(1, 4))
    engine.step(draw(1, 4), action=1, note="fast")


def test_fork_makes_two_lanes_the_same_stream_lane_state_included():
    engine = started(lanes=3)
    engine.reset([1])
    engine.fork(0, [1, 2])
    assert engine.position == (22, 22, 22)
    tokens = draw(1, 4).expand(3, -1, -1)
    out = engine.step(tokens)
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[0], out[2])
    engine.step(tokens[:1] * 2, lanes=0)
    out = engine.step(tokens)
    assert not torch.equal(out[0], out[1])
    assert torch.equal(out[1], out[2])


def test_restore_returns_to_the_snapshot_bit_for_bit():
    engine, twin = started(), started()
    snapshot = engine.snapshot()
    engine.step(draw(2, 9))
    engine.reset(0)
    engine.set_state("prompt", torch.zeros(1, 16), lanes=[1])
    engine.prefill(draw(1, 30), lanes=0)
    engine.restore(snapshot)
    assert_same_future(engine, twin)
    with pytest.raises(StreamStateError, match="expected an EngineSnapshot"):
        engine.restore(snapshot.ring)  # pyright: ignore[reportArgumentType]


def test_a_snapshot_remembers_what_an_abandoned_step_has_overwritten():
    engine = started()
    engine.step(draw(2, 6), commit=False)
    snapshot = engine.snapshot()
    engine.reset()
    engine.restore(snapshot)
    with pytest.raises(StreamStateError, match="step of at least 6"):
        engine.step(draw(2, 4))


def test_reset_empties_lanes_and_their_state():
    engine = started()
    engine.reset(1)
    assert engine.position == (22, 0)
    assert not engine.state["prompt"][1].any()
    assert engine.state["prompt"][0].any()
    fresh = StreamingEngine(TinyModel(state=True), STREAM)
    torch.testing.assert_close(engine.step(draw(1, 4), lanes=1), fresh.step(draw(1, 4)))


def test_lane_state_reaches_the_model_and_is_checked():
    engine = started()
    tokens = draw(2, 4)
    before = engine.step(tokens, commit=False)
    engine.set_state("prompt", torch.ones(1, 16), lanes=[1])
    after = engine.step(tokens, commit=False)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    for name, value, message in [
        ("promt", torch.ones(2, 16), r"expected one of \['prompt'\], got 'promt'"),
        ("prompt", torch.ones(1, 16), r"expected torch.float32 \[2, 16\], got torch.float32 \[1, 16\]"),
        ("prompt", torch.ones(2, 16).double(), "got torch.float64"),
    ]:
        with pytest.raises(StreamStateError, match=message):
            engine.set_state(name, value)
    with pytest.raises(TypeError):
        engine.state["prompt"] = torch.ones(2, 16)  # pyright: ignore[reportIndexIssue]


def test_the_engine_follows_the_dtype_of_most_of_the_model_and_casts_tokens():
    model = TinyModel().to(torch.bfloat16)
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    engine = StreamingEngine(model, STREAM)
    assert engine.dtype == engine.cache.dtype == torch.bfloat16
    assert engine.step(draw(1, 4).double()).dtype == torch.bfloat16
    assert StreamingEngine(TinyModel(), STREAM, dtype=torch.float64).step(draw(1, 4)).dtype == torch.float64


def test_what_a_step_returns_belongs_to_the_caller():
    engine = started()
    out = engine.step(draw(2, 4), commit=False)
    assert not out.is_inference()
    assert not out.requires_grad
    kept = out.clone()
    engine.step(draw(2, 4, 1), commit=False)
    assert torch.equal(out, kept)
    out.add_(1)


def test_memory_is_constant_and_as_predicted():
    engine = started()
    predicted = engine.cache.predict_bytes(
        layers=2, lanes=2, kv_heads=1, head_dim=8, stream=STREAM, dtype=torch.float32
    )  # fmt: skip
    before = engine.memory()
    assert before == {
        "cache": predicted, "lane_state": 2 * 16 * 4, "graph_buffers": 0, "staged_peak": 0,
    }  # fmt: skip
    for _ in range(20):
        engine.step(draw(2, 4))
    assert engine.memory() == before
    engine.prefill(draw(2, 4))
    assert engine.memory()["staged_peak"] == 2 * 2 * 2 * 1 * 4 * 8 * 4


def test_steps_of_different_size_follow_one_another():
    model = TinyModel().double()
    engine = StreamingEngine(model, STREAM)
    sizes = [1, 3, 10, 2, 7, 10, 1]
    tokens = draw(1, sum(sizes)).double()
    outs = [engine.step(part) for part in tokens.split(sizes, dim=1)]
    assert engine.position == (34,)
    fresh = StreamingEngine(model, STREAM)
    for part, out in zip(tokens.split(sizes, dim=1), outs, strict=True):
        torch.testing.assert_close(fresh.prefill(part) if len(part[0]) <= 4 else fresh.step(part), out)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Linear(2, 2), r"layers, kv_heads, head_dim, forward; \['layers', 'kv_heads', 'head_dim'\] missing"),
        (TinyModel(head_dim=4), "head_dim: expected a multiple of 8"),
    ],
)
def test_a_model_that_cannot_stream_is_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        StreamingEngine(model, STREAM)


def test_an_implementation_asked_for_by_name_runs_or_raises():
    engine = StreamingEngine(TinyModel(), STREAM, impl="sdpa")
    engine.step(draw(1, 4))
    for name in ("triton", "nonsense"):
        with pytest.raises(ValueError, match="impl"):
            StreamingEngine(TinyModel(), STREAM, impl=name).step(draw(1, 4))


@pytest.mark.slow
def test_a_compiled_model_streams_the_same_and_is_not_recompiled_as_positions_move():
    torch._dynamo.reset()
    model = TinyModel().double()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    engine = StreamingEngine(compiled, STREAM)
    tokens = draw(1, 60).double()
    with torch._dynamo.config.patch(error_on_recompile=False):
        outs = [engine.step(part) for part in tokens[:, :8].split(4, dim=1)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        outs += [engine.step(part) for part in tokens[:, 8:].split(4, dim=1)]
    with torch.no_grad():
        full = model(tokens, FullSequence(STREAM.pattern, 1, 60))
    torch.testing.assert_close(torch.cat(outs, dim=1), full)


@pytest.mark.slow
@pytest.mark.parametrize("distance", ["growing", "bounded"])
def test_a_compiled_model_prefills_on_history_and_steps_by_other_sizes_as_it_does_uncompiled(distance):
    torch._dynamo.reset()
    stream = replace(STREAM, sink_frames=1, sink_distance=distance)
    model = TinyModel().double()
    engines = [StreamingEngine(m, stream) for m in (model, torch.compile(model, fullgraph=True, backend="eager"))]
    for tokens in (8, 5, 12, 31, 1):
        x = draw(1, tokens).double()
        for expected, out in zip(*([engine.prefill(x), engine.step(x[:, -4:])] for engine in engines), strict=True):
            torch.testing.assert_close(out, expected)
    expected, peak = (engine.memory()["staged_peak"] for engine in engines)
    assert peak == expected > 0
    assert isinstance(peak, int)
