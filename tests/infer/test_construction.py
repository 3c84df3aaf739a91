"""What a cache and an engine refuse before anything is streamed, and a fork that fails as a whole."""

from __future__ import annotations

import pytest
import torch
from tiny_model import TinyModel

from swba_infer import RingKVCache, StreamConfig, StreamingEngine
from swba_infer.errors import ConfigError, StreamStateError

STREAM = StreamConfig(tokens_per_frame=4, frames_per_block=1, window_frames=3)


def cache(**changes):
    given = {"layers": 1, "lanes": 2, "kv_heads": 1, "head_dim": 8, "stream": STREAM}
    return RingKVCache(**{**given, "dtype": torch.float32, "device": "cpu", **changes})


@pytest.mark.parametrize("impl", ["hopper", "nonsense", None])
def test_an_implementation_that_cannot_run_is_refused_at_once(impl):
    with pytest.raises(ConfigError, match="impl"):
        cache(impl=impl)


@pytest.mark.parametrize("device", ["meta", "foo", "cuda:99"])
def test_an_unusable_device_is_refused_at_once(device):
    with pytest.raises(ConfigError, match="device"):
        cache(device=device)
    with pytest.raises(ConfigError, match="device"):
        StreamingEngine(TinyModel(), STREAM, device=device)


@pytest.mark.parametrize("dtype", [torch.int8, "bf16"])
def test_a_dtype_that_is_not_floating_is_refused_at_once(dtype):
    with pytest.raises(ConfigError, match="dtype"):
        cache(dtype=dtype)
    with pytest.raises(ConfigError, match="dtype"):
        StreamingEngine(TinyModel(), STREAM, dtype=dtype)


def test_a_fork_to_no_lane_changes_nothing():
    ring = cache()
    q = torch.randn(1, 1, 4, 8)
    ring.attend(0, q, q, q, lanes=0)
    ring.commit()
    with pytest.raises(StreamStateError, match="dst"):
        ring.fork(0, None)
    assert ring.position == (4, 0)
    assert ring.fork(0, [1]) == (1,)
    assert ring.position == (4, 4)


@pytest.mark.parametrize("snapshot", [None, 5])
def test_only_a_snapshot_can_be_restored(snapshot):
    with pytest.raises(StreamStateError, match="snapshot"):
        cache().restore(snapshot)


def test_what_decode_returns_carries_no_gradient():
    from swba_kernels import window_decode_attention

    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    ring = torch.randn(1, 1, 12, 8)
    out = window_decode_attention(q, ring, ring, torch.tensor([5]))
    assert not out.requires_grad
