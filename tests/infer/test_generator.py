from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_world import ACTIONS, SIZE, tiny_dit, tiny_stream

from swba_infer import VideoGenerator
from swba_infer.context import FullSequence
from swba_infer.errors import CheckpointError, ConfigError, NumericsError
from swba_infer.models.video_dit import patchify, unpatchify
from swba_infer.sampling import FlowSampler

WALK = [1, 1, 2, 3, 0, 1, 2, 2, 1]


@pytest.fixture
def context() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, SIZE.height, SIZE.width, 3), dtype=np.uint8)


def generator(stream=None, **options) -> VideoGenerator:
    return VideoGenerator(tiny_dit(), stream or tiny_stream(), FlowSampler(steps=2), ACTIONS, **options)


def collect(iterator) -> np.ndarray:
    return np.stack(list(iterator))


def test_frames_are_uint8_pictures_that_use_their_range(tiny_model):
    frames = collect(VideoGenerator.from_pretrained(tiny_model, device="cpu").stream(actions=WALK))
    assert frames.shape == (len(WALK), SIZE.height, SIZE.width, 3)
    assert frames.dtype == np.uint8
    assert frames.std() > 10


def test_the_same_seed_gives_the_same_video_bit_for_bit(tiny_model, context):
    first, second = (VideoGenerator.from_pretrained(tiny_model, device="cpu") for _ in range(2))
    a = collect(first.stream(context, actions=WALK, seed=5))
    np.testing.assert_array_equal(a, collect(second.stream(context, actions=WALK, seed=5)))
    np.testing.assert_array_equal(a, collect(first.stream(context, actions=WALK, seed=5)))
    assert (a != collect(first.stream(context, actions=WALK, seed=6))).any()


def test_context_history_actions_and_their_order_all_matter(context):
    base = collect(generator().stream(context, [1, 1, 1], actions=WALK))
    others = [
        generator().stream(context[::-1].copy(), [1, 1, 1], actions=WALK),
        generator().stream(context, [1, 2, 1], actions=WALK),
        generator().stream(context, actions=WALK),
        generator().stream(None, actions=WALK),
        generator().stream(context, [1, 1, 1], actions=[2, *WALK[1:]]),
    ]
    for other in others:
        assert (collect(other)[0] != base[0]).any()


@pytest.mark.parametrize("sizes", [{}, {"sink_frames": 2}, {"frames_per_block": 2, "first_block_frames": 1}])
def test_frames_equal_those_of_full_sequence_forwards(context, sizes):
    """The loop, ring and all, against the plainest possible sampler: the whole history in one forward each time."""
    stream = tiny_stream(**sizes)
    sampler = FlowSampler(steps=2)
    model = tiny_dit()
    made = collect(generator(stream).stream(actions=WALK, seed=3))

    def predict(history, block, t, actions):
        tokens = torch.cat([history, block], dim=1)
        frames = tokens.shape[1] // SIZE.tokens_per_frame
        levels = torch.zeros(1, frames)
        levels[:, -(block.shape[1] // SIZE.tokens_per_frame) :] = t
        whole = FullSequence(stream.pattern, 1, tokens.shape[1])
        return model(tokens, whole, timestep=levels, action=torch.tensor([actions]))[:, -block.shape[1] :]

    history = torch.empty(1, 0, SIZE.token_channels)
    ends = [end // SIZE.tokens_per_frame for end in stream.pattern.block_ends(len(WALK) * SIZE.tokens_per_frame)]
    times = sampler.times()
    with torch.no_grad():
        for start, end in itertools.pairwise([0, *ends]):
            x = sampler.noise(3, 0, start, 0, (1, (end - start) * SIZE.tokens_per_frame, SIZE.token_channels))
            for t, s in itertools.pairwise(times):
                x = sampler.advance(x, predict(history, x, t, WALK[:end]), t, s)
            history = torch.cat([history, x.clamp(-1, 1)], dim=1)
    expected = unpatchify(history, SIZE.height, SIZE.width, SIZE.patch)[0].numpy()
    assert np.abs(made.astype(int) - expected).max() <= 1


def test_closing_early_leaves_a_stream_that_goes_on(context):
    whole = collect(generator().stream(context, actions=WALK, seed=2))
    parted = generator()
    stream = parted.stream(context, actions=WALK, seed=2)
    first = [next(stream) for _ in range(4)]
    stream.close()
    assert parted.position == (7,)
    rest = list(parted.stream(actions=WALK[4:]))
    np.testing.assert_array_equal(np.stack(first + rest), whole)


def test_frames_limit_actions_and_unknown_actions(context):
    made = generator()
    assert len(list(made.stream(context, actions=WALK, frames=2))) == 2
    assert len(list(made.stream(actions=WALK[:3], frames=50))) == 3
    assert len(list(made.stream(frames=4))) == 4
    assert list(made.stream(frames=0)) == []
    assert len(list(itertools.islice(made.stream(), 6))) == 6
    assert made.position == (3 + 2 + 3 + 4 + 6,)


def test_action_names_and_indices_mean_the_same(context):
    names = collect(generator().stream(context, actions=[ACTIONS[i] for i in WALK]))
    np.testing.assert_array_equal(names, collect(generator().stream(context, actions=np.array(WALK))))


def test_nothing_happens_before_the_first_frame_is_asked_for(context):
    made = generator()
    list(made.stream(context, actions=WALK))
    made.stream(context)
    assert made.position == (3 + len(WALK),)


def test_a_long_stream_keeps_its_memory(context):
    made = generator()
    before = made.engine.cache.bytes
    assert len(list(made.stream(context, frames=60))) == 60
    assert made.engine.cache.bytes == before


def test_lanes_stream_independently(context):
    made = generator(lanes=2)
    alone = [generator(lanes=2), generator(lanes=2)]
    expected = [collect(alone[i].stream(context, actions=WALK, seed=4, lane=i)) for i in range(2)]
    pair = [made.stream(context, actions=WALK, seed=4, lane=i) for i in range(2)]
    frames = [(next(pair[0]), next(pair[1])) for _ in WALK]
    for lane in range(2):
        np.testing.assert_array_equal(np.stack([f[lane] for f in frames]), expected[lane])
    assert (expected[0] != expected[1]).any(), "noise is keyed by lane"


def test_a_saved_stream_goes_on_in_another_process(tmp_path, tiny_model, context):
    made = VideoGenerator.from_pretrained(tiny_model, device="cpu")
    list(made.stream(context, actions=WALK[:5], seed=9))
    made.save(tmp_path / "stream.safetensors")
    code = (
        "import sys, numpy as np\nfrom swba_infer import VideoGenerator\n"
        "made = VideoGenerator.from_pretrained(sys.argv[1], device='cpu')\nmade.load(sys.argv[2])\n"
        f"np.save(sys.argv[3], np.stack(list(made.stream(actions={WALK[5:]}))))\n"
    )
    arguments = [str(tiny_model), str(tmp_path / "stream.safetensors"), str(tmp_path / "rest.npy")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "rest.npy"), collect(made.stream(actions=WALK[5:])))


def test_a_stream_saved_by_the_bare_engine_is_refused(tmp_path, context):
    made = generator()
    list(made.stream(context, actions=WALK))
    made.engine.save(tmp_path / "bare.safetensors")
    before = made.engine.position
    with pytest.raises(CheckpointError, match="VideoGenerator"):
        made.load(tmp_path / "bare.safetensors")
    assert made.engine.position == before


def test_steps_and_context_noise_can_be_overridden(tiny_model):
    made = VideoGenerator.from_pretrained(tiny_model, device="cpu", steps=3, context_noise=0.1)
    assert (made.sampler.steps, made.sampler.context_noise) == (3, 0.1)
    base = collect(VideoGenerator.from_pretrained(tiny_model, device="cpu", steps=3).stream(actions=WALK))
    noisy = collect(made.stream(actions=WALK))
    np.testing.assert_array_equal(noisy[0], base[0])
    assert (noisy[1] != base[1]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": np.zeros((3, 24, 30, 3), np.uint8)}, r"context.*24, 32.*resize_frames"),
        ({"context": np.zeros((0, 24, 32, 3), np.uint8)}, "context"),
        ({"context": np.zeros((3, 24, 32, 3), np.float32)}, "context.*uint8"),
        ({"context": np.zeros((24, 32, 3), np.uint8)}, "context"),
        ({"context": [1, 2]}, "context.*list"),
        ({"context": np.array([None])}, "context.*object"),
        ({"context": np.zeros((1, 24, 32, 3), np.uint8), "context_actions": 1}, "context_actions.*int"),
        ({"actions": 5}, "actions.*int"),
        ({"actions": "forward"}, "actions.*str"),
        ({"context": np.zeros((3, 24, 32, 3), np.uint8), "context_actions": [1]}, "context_actions.*3.*1"),
        ({"context": np.zeros((1, 24, 32, 3), np.uint8), "context_actions": [9]}, "action.*9"),
        ({"context_actions": [1]}, "context_actions"),
        ({"frames": -1}, "frames"),
        ({"frames": True}, "frames"),
        ({"frames": 2.0}, "frames"),
        ({"seed": "7"}, "seed"),
        ({"lane": 1}, "lane"),
    ],
)
def test_bad_arguments_raise_at_the_call_and_leave_the_stream(context, arguments, message):
    made, untouched = generator(), generator()
    for each in (made, untouched):
        list(each.stream(context, actions=WALK))
    with pytest.raises(ConfigError, match=message):
        made.stream(**arguments)
    np.testing.assert_array_equal(collect(made.stream(actions=WALK)), collect(untouched.stream(actions=WALK)))


@pytest.mark.parametrize("bad", ["jump", -1, len(ACTIONS) + 1, True, 1.5, None])
def test_a_bad_action_raises_when_it_is_reached_and_leaves_the_stream(context, bad):
    made, untouched = generator(), generator()
    list(untouched.stream(context, actions=WALK[:2]))
    stream = made.stream(context, actions=[*WALK[:2], bad])
    next(stream), next(stream)
    with pytest.raises(ConfigError, match="action"):
        next(stream)
    np.testing.assert_array_equal(collect(made.stream(actions=WALK)), collect(untouched.stream(actions=WALK)))


def test_not_a_number_names_the_frame_and_leaves_the_stream(context):
    made, untouched = generator(check_finite=True), generator(check_finite=True)
    for each in (made, untouched):
        list(each.stream(context, actions=WALK[:4]))
    weight = made.engine.model.embed.weight
    good = weight.clone()
    weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="frame 7"):
        next(made.stream(actions=WALK))
    with pytest.raises(NumericsError):
        next(made.stream(context, actions=WALK))
    weight.copy_(good)
    np.testing.assert_array_equal(collect(made.stream(actions=WALK)), collect(untouched.stream(actions=WALK)))


def test_a_config_that_contradicts_itself_is_refused():
    with pytest.raises(ConfigError, match="tokens per frame"):
        VideoGenerator(tiny_dit(), replace(tiny_stream(), tokens_per_frame=13))
    with pytest.raises(ConfigError, match="actions"):
        VideoGenerator(tiny_dit(), tiny_stream(), actions=("left", "right"))
    with pytest.raises(ConfigError, match="lane"):
        generator().reset(3)


def test_reset_starts_over(context):
    made = generator()
    first = collect(made.stream(actions=WALK))
    made.reset()
    assert made.position == (0,)
    np.testing.assert_array_equal(collect(made.stream(actions=WALK)), first)


@pytest.mark.parametrize("sizes", [{}, {"frames_per_block": 2, "first_block_frames": 1}])
def test_context_frames_before_those_that_can_matter_do_not(sizes):
    made = generator(tiny_stream(**sizes))
    count = made.context_frames
    frames = np.random.default_rng(0).integers(0, 256, (count + 4, SIZE.height, SIZE.width, 3), dtype=np.uint8)
    base = collect(made.stream(frames, actions=WALK))
    earlier, recent = frames.copy(), frames.copy()
    earlier[:-count] = 0
    recent[-2] = 0
    np.testing.assert_array_equal(collect(made.stream(earlier, actions=WALK)), base)
    assert (collect(made.stream(recent, actions=WALK)) != base).any()


def test_with_sinks_every_context_frame_counts():
    assert generator(tiny_stream(sink_frames=1)).context_frames is None


def test_context_is_seen_as_pixels(context):
    tokens = patchify(torch.from_numpy(context)[None], SIZE.patch)
    np.testing.assert_array_equal(unpatchify(tokens, SIZE.height, SIZE.width, SIZE.patch)[0].numpy(), context)
