from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

import swba_infer
from swba_infer import ConfigError, StreamConfig, SwbaError

SIZES = {"tokens_per_frame": 4, "frames_per_block": 3, "window_frames": 7, "sink_frames": 2, "first_block_frames": 1}


def test_sizes_in_tokens_are_frames_times_tokens_per_frame():
    stream = StreamConfig(**SIZES)
    assert (stream.block_tokens, stream.window_tokens, stream.sink_tokens, stream.capacity_tokens) == (12, 28, 8, 36)
    pattern = stream.pattern
    assert (pattern.block_size, pattern.window, pattern.sink, pattern.first_block) == (12, 28, 8, 4)


def test_a_config_survives_a_dict_and_is_frozen_and_hashable():
    stream = StreamConfig(**SIZES)
    assert StreamConfig.from_dict(stream.to_dict()) == stream
    assert hash(stream) == hash(dataclasses.replace(stream))
    with pytest.raises(dataclasses.FrozenInstanceError):
        stream.window_frames = 8  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_per_frame": 0}, "tokens_per_frame: expected at least 1, got 0"),
        ({"tokens_per_frame": True}, "tokens_per_frame: expected an int, got bool True"),
        ({"frames_per_block": 1.0}, "frames_per_block: expected an int, got float 1.0"),
        ({"sink_frames": -1}, "sink_frames: expected at least 0, got -1"),
        ({"window_frames": 2}, r"window_frames: expected at least frames_per_block \(3\), got 2"),
        ({"first_block_frames": 4}, r"first_block_frames: expected at most frames_per_block \(3\), got 4"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected_and_what_came(change, message):
    with pytest.raises(ConfigError, match=message):
        StreamConfig(**{**SIZES, **change})


def test_unknown_and_missing_keys_are_errors():
    with pytest.raises(ConfigError, match="window_size"):
        StreamConfig.from_dict({**SIZES, "window_size": 3})
    with pytest.raises(ConfigError, match=r"\['window_frames'\] missing"):
        StreamConfig.from_dict({"tokens_per_frame": 4, "frames_per_block": 3})


def test_every_error_is_a_swba_error_and_a_value_error():
    for name in ("ConfigError", "StreamStateError", "CheckpointError", "NumericsError"):
        assert issubclass(getattr(swba_infer, name), SwbaError)
        assert issubclass(getattr(swba_infer, name), ValueError)


def test_the_engine_imports_without_triton_video_or_model_libraries():
    code = (
        "import sys, swba_infer\n"
        "for name in swba_infer.__all__: getattr(swba_infer, name) if name != 'VideoGenerator' else None\n"
        "loaded = [m for m in ('triton', 'av', 'vizdoom', 'diffusers', 'transformers', 'matplotlib', 'PIL')"
        " if m in sys.modules]\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="StreamingEngin"):
        swba_infer.StreamingEngin  # noqa: B018
    assert set(swba_infer.__all__) <= set(dir(swba_infer))
