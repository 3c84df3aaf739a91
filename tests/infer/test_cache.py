"""The ring cache call by call: its memory, retries, refusals and failures, prefills, lanes and snapshots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cache_cases import HEAD_DIM, KV_HEADS, LAYERS, STREAM, draw_qkv, filled, make_cache, run_step

from swba_infer import ConfigError, RingKVCache, StreamStateError


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layers", "lanes", "kv_heads", "head_dim"), [(1, 1, 1, 8), (3, 2, 5, 24)])
def test_memory_is_exactly_what_predict_bytes_says(layers, lanes, kv_heads, head_dim, dtype):
    sizes = {"layers": layers, "lanes": lanes, "kv_heads": kv_heads, "head_dim": head_dim, "stream": STREAM}
    cache = RingKVCache(**sizes, dtype=dtype, device="cpu")
    held = cache.k.untyped_storage().nbytes() + cache.v.untyped_storage().nbytes() + 8 * lanes
    assert RingKVCache.predict_bytes(**sizes, dtype=dtype, device="cpu") == cache.bytes == held


def test_the_ring_is_never_reallocated():
    cache, generator = filled()
    places = cache.k.data_ptr(), cache.v.data_ptr(), cache.position_tensor.data_ptr()
    snapshot = cache.snapshot()
    for _ in range(9):
        run_step(cache, draw_qkv(1, 4, generator))
        cache.commit()
    cache.restore(snapshot)
    cache.reset()
    assert places == (cache.k.data_ptr(), cache.v.data_ptr(), cache.position_tensor.data_ptr())


def test_an_uncommitted_step_may_be_repeated_and_gives_the_same_bits():
    cache, generator = filled()
    noisy, clean = draw_qkv(1, 4, generator), draw_qkv(1, 4, generator)
    once = run_step(cache, clean)
    run_step(cache, noisy)
    assert all(torch.equal(a, b) for a, b in zip(once, run_step(cache, clean), strict=True))
    assert cache.position == (20,)


def test_a_shorter_step_after_an_abandoned_one_is_refused_until_a_long_enough_one_is_committed():
    cache, generator = filled()
    run_step(cache, draw_qkv(1, 5, generator))
    with pytest.raises(StreamStateError, match="step of at least 5, since"):
        run_step(cache, draw_qkv(1, 4, generator))
    with pytest.raises(StreamStateError, match="first block of at least 5"):
        cache.prefill(0, *draw_qkv(1, 12, generator)[0])
    run_step(cache, draw_qkv(1, 5, generator))
    cache.commit()
    run_step(cache, draw_qkv(1, 1, generator))


def test_a_shorter_step_is_accepted_while_the_ring_has_room():
    cache, generator = filled(tokens=2)
    run_step(cache, draw_qkv(1, 5, generator))
    run_step(cache, draw_qkv(1, 1, generator))
    cache.commit()
    assert cache.position == (3,)


def test_commit_refuses_unless_every_layer_attended_the_same_block():
    cache, generator = filled(lanes=2)
    with pytest.raises(StreamStateError, match="got no block"):
        cache.commit()
    (q, k, v), other = draw_qkv(2, 4, generator)
    cache.attend(0, q, k, v)
    with pytest.raises(StreamStateError, match=r"layers \[1\] did not"):
        cache.commit()
    with pytest.raises(StreamStateError, match="layer 1: expected the block that other layers attended"):
        cache.attend(1, *(x[:, :, :3] for x in other))
    with pytest.raises(StreamStateError, match="lanes"):
        cache.attend(1, *(x[:1] for x in other), lanes=[0])
    with pytest.raises(StreamStateError, match="prefill"):
        cache.prefill(1, *other)
    assert cache.position == (20, 20)
    cache.attend(1, *other)
    cache.commit()
    assert cache.position == (24, 24)


def test_a_rejected_call_leaves_the_open_block_as_it_was():
    cache, generator = filled()
    twin, _ = filled()
    first, second = draw_qkv(1, 4, generator)
    cache.attend(0, *first)
    for bad in (first[0][..., :4], first[0].float(), first[0][:, :, :, None]):
        with pytest.raises(StreamStateError):
            cache.attend(1, bad, *second[1:])
    with pytest.raises(StreamStateError, match=r"layer: expected an int in 0\.\.1, got 2"):
        cache.attend(2, *second)
    out = cache.attend(1, *second)
    cache.commit()
    assert torch.equal(out, run_step(twin, [first, second])[1])


@pytest.mark.parametrize("prefill", [False, True])
def test_a_kernel_that_fails_leaves_the_stream_as_it_was(prefill, monkeypatch):
    cache, generator = filled()
    twin, _ = filled()
    qkv = draw_qkv(1, 6, generator)

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    for name in ("window_decode_attention", "prefill_attention"):
        with monkeypatch.context() as patch:
            patch.setattr(f"swba_kernels.{name}", fail)
            with pytest.raises(RuntimeError, match="out of memory") if (name[0] == "p") == prefill else _nothing():
                for layer, x in enumerate(draw_qkv(1, 6, generator)):
                    (cache.prefill if prefill else cache.attend)(layer, *x)
    assert cache.position == (20,)
    assert all(torch.equal(a, b) for a, b in zip(run_step(cache, qkv), run_step(twin, qkv), strict=True))


def test_a_prefill_on_history_writes_nothing_before_its_commit_and_reports_what_it_stages():
    cache, generator = filled()
    before = cache.k.clone()
    qkv = draw_qkv(1, 9, generator)
    for layer, x in enumerate(qkv):
        cache.prefill(layer, *x)
    assert torch.equal(cache.k, before)
    staged = 2 * LAYERS * KV_HEADS * 6 * HEAD_DIM * 8
    assert cache.staged_bytes == staged
    cache.commit()
    assert (cache.staged_bytes, cache.staged_peak_bytes, cache.position) == (0, staged, (29,))


def test_a_prefill_of_an_empty_lane_beside_one_with_history_is_exact_for_both():
    (cache, generator), (twin, _) = filled(lanes=2), filled(lanes=2)
    cache.reset(0)
    twin.reset(0)
    qkv = draw_qkv(2, 9, generator)
    both = [cache.prefill(layer, *x) for layer, x in enumerate(qkv)]
    cache.commit()
    for lane in (0, 1):
        alone = [twin.prefill(i, *(y[lane : lane + 1] for y in x), lanes=lane) for i, x in enumerate(qkv)]
        twin.commit()
        torch.testing.assert_close([x[lane : lane + 1] for x in both], alone)
    step = draw_qkv(2, 4, generator)
    torch.testing.assert_close(run_step(cache, step), run_step(twin, step))


def test_first_blocks_of_empty_lanes_do_not_mix_with_lanes_that_have_history():
    cache = make_cache(replace(STREAM, first_block_frames=1), lanes=2)
    generator = torch.Generator().manual_seed(0)
    for layer, x in enumerate(draw_qkv(1, 6, generator)):
        cache.prefill(layer, *x, lanes=1)
    cache.commit()
    with pytest.raises(StreamStateError, match=r"positions \[0, 6\]"):
        cache.prefill(0, *draw_qkv(2, 6, generator)[0])
    assert cache.position == (0, 6)


@pytest.mark.parametrize("lanes", [[], [0, 0], [2], [-1], [True], "0", 0.5, torch.tensor([0])])
def test_lanes_must_be_distinct_ints_in_range(lanes):
    cache, generator = filled(lanes=2)
    with pytest.raises(StreamStateError, match="lanes"):
        cache.attend(0, *draw_qkv(1, 2, generator)[0], lanes=lanes)


def test_a_step_longer_than_the_window_is_refused():
    cache, generator = filled()
    with pytest.raises(StreamStateError, match=r"expected 1 to 6 \(the window\), got 7"):
        cache.attend(0, *draw_qkv(1, 7, generator)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers: expected an int of at least 1"),
        ({"lanes": True}, "lanes"),
        ({"head_dim": 12}, "head_dim: expected a multiple of 8"),
        ({"kv_heads": 1.5}, "kv_heads"),
        ({"dtype": torch.int64}, "dtype: expected a floating dtype"),
        ({"stream": {"tokens_per_frame": 1}}, "stream: expected a StreamConfig, got dict"),
    ],
)
def test_a_wrong_size_is_named_before_anything_is_allocated(change, message):
    sizes = {"layers": 1, "lanes": 1, "kv_heads": 1, "head_dim": 8, "stream": STREAM, "dtype": torch.float32}
    with pytest.raises(ConfigError, match=message):
        RingKVCache(**{**sizes, **change, "device": "cpu"})
    with pytest.raises(ConfigError, match=message):
        RingKVCache.predict_bytes(**{**sizes, **change})


def test_a_snapshot_of_another_stream_is_refused_and_changes_nothing():
    cache, _ = filled()
    position = cache.position
    other = make_cache(replace(STREAM, window_frames=4, sink_frames=0)).snapshot()
    with pytest.raises(StreamStateError, match="snapshot"):
        cache.restore(other)
    with pytest.raises(StreamStateError, match="2 lanes"):
        filled(lanes=2)[0].restore(cache.snapshot())
    assert cache.position == position


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...
