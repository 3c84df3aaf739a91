"""Lanes of one decoder: independent, forkable, resumable, and unchanged by a call that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from swba_infer.errors import CheckpointError, NumericsError, StreamStateError
from swba_infer.wan.decoder import StreamDecoder
from swba_infer.wan.vae import WanVAE

pytest.importorskip("diffusers")


@pytest.fixture
def vae(autoencoder: Any) -> WanVAE:
    return WanVAE(autoencoder)


def latents_of(frames: int, seed: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 4, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


def test_lanes_at_different_frames_decode_as_if_alone(vae: WanVAE) -> None:
    decoder = StreamDecoder(vae, lanes=3)
    latents = [latents_of(6, seed) for seed in range(3)]
    alone = [vae.decode(x)[0] for x in latents]
    first = decoder.decode(latents[2][:, :, :4], lanes=2)
    assert torch.equal(first, alone[2][:, :, :13])
    both = decoder.decode(torch.cat([latents[1], latents[0]])[:, :, :2], lanes=[1, 0])
    assert torch.equal(both, torch.cat([alone[1], alone[0]])[:, :, :5])
    rest = decoder.decode(torch.cat([latents[2][:, :, 4:], latents[0][:, :, 2:4]]), lanes=[2, 0])
    assert torch.equal(rest, torch.cat([alone[2][:, :, 13:], alone[0][:, :, 5:13]]))
    assert decoder.frames == (4, 2, 6)


def test_a_fork_goes_on_as_its_source_and_then_apart(vae: WanVAE) -> None:
    decoder = StreamDecoder(vae, lanes=2)
    decoder.decode(latents_of(3, 0), lanes=0)
    size = decoder.bytes
    decoder.fork(0, 1)
    assert decoder.bytes == size
    assert decoder.frames == (3, 3)
    same = decoder.decode(latents_of(1, 1).expand(2, -1, -1, -1, -1))
    assert torch.equal(same[0], same[1])
    apart = decoder.decode(latents_of(1, 2, batch=2))
    assert not torch.equal(apart[0], apart[1])


def test_reset_begins_afresh(vae: WanVAE) -> None:
    decoder = StreamDecoder(vae, lanes=2)
    first = decoder.decode(latents_of(3, 0, batch=2))
    decoder.reset(1)
    assert decoder.frames == (3, 0)
    assert torch.equal(decoder.decode(latents_of(3, 0, batch=2)[1:], lanes=1), first[1:])


def test_a_snapshot_brings_the_lanes_back(vae: WanVAE) -> None:
    decoder = StreamDecoder(vae, lanes=2)
    decoder.decode(latents_of(2, 0, batch=2))
    snapshot = decoder.snapshot()
    after = decoder.decode(latents_of(2, 1, batch=2))
    decoder.restore(snapshot)
    assert decoder.frames == (2, 2)
    assert torch.equal(decoder.decode(latents_of(2, 1, batch=2)), after)
    with pytest.raises(StreamStateError, match="caches of 2 lanes, got 1"):
        decoder.restore(snapshot[:1])


def test_a_saved_decoder_resumes_bit_for_bit(vae: WanVAE, tmp_path: Path) -> None:
    decoder = StreamDecoder(vae, lanes=3)
    decoder.decode(latents_of(3, 0, batch=2), lanes=[0, 2])
    path = tmp_path / "decoder.safetensors"
    save_file({name: x.contiguous() for name, x in decoder.state_dict().items()}, path)
    after = decoder.decode(latents_of(2, 1, batch=2), lanes=[0, 2])
    resumed = StreamDecoder(vae, lanes=3)
    resumed.load_state_dict(load_file(path))
    assert resumed.frames == (3, 0, 3)
    assert torch.equal(resumed.decode(latents_of(2, 1, batch=2), lanes=[0, 2]), after)


def drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("frames"), "expected frames of 2 lanes, got None"),
        (drop("lane.0.03"), r"lane.0.03: expected torch.float32 \[1, .*, got none"),
        (drop("lane.0.00"), "lane.0.00: expected .*, got none"),
        (lambda state: state.update({"lane.1.00": torch.zeros(1)}), r"extra tensors \['lane.1.00'\]"),
        (lambda state: state.update({"lane.0.00": torch.zeros(1, 4, 2, 4, 8)}), "lane.0.01: expected"),
        (lambda state: state.update({"lane.0.01": state["lane.0.01"].half()}), "lane.0.01: .* got torch.float16"),
        (lambda state: state.update({"frames": torch.tensor([3])}), "expected frames of 2 lanes"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(
    vae: WanVAE, damage: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    decoder = StreamDecoder(vae, lanes=2)
    decoder.decode(latents_of(2, 0), lanes=0)
    state, before = decoder.state_dict(), decoder.snapshot()
    damage(state)
    with pytest.raises(CheckpointError, match=message):
        decoder.load_state_dict(state)
    assert decoder.snapshot() is not before
    assert all(a is b for a, b in zip(decoder.snapshot(), before, strict=True))


def test_nan_is_reported_and_leaves_the_lanes_where_they_were(vae: WanVAE) -> None:
    decoder = StreamDecoder(vae, lanes=2, check_finite=True)
    decoder.decode(latents_of(1, 0, batch=2))
    before = decoder.snapshot()
    latents = latents_of(1, 1, batch=2)
    latents[1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"latent frames \(1, 1\)"):
        decoder.decode(latents)
    assert all(a is b for a, b in zip(decoder.snapshot(), before, strict=True))


@pytest.mark.parametrize(
    ("lanes", "batch", "message"),
    [
        ([0, 1], 2, "all to begin or all to go on"),
        ([0, 0], 2, "expected different lanes"),
        (2, 1, "expected different lanes of 0 to 1, got 2"),
        ([], 1, "expected different lanes"),
        (None, 1, r"latents: expected \[2 lanes"),
        (True, 1, "expected different lanes"),
    ],
)
def test_lanes_that_do_not_fit_are_refused(vae: WanVAE, lanes: Any, batch: int, message: str) -> None:
    decoder = StreamDecoder(vae, lanes=2)
    decoder.decode(latents_of(1, 0), lanes=0)
    with pytest.raises(StreamStateError, match=message):
        decoder.decode(latents_of(1, 0, batch=batch), lanes=lanes)


def test_memory_does_not_grow_with_the_stream(vae: WanVAE) -> None:
    decoder = StreamDecoder(vae)
    sizes = []
    for step in range(4):
        decoder.decode(latents_of(1, step))
        sizes.append(decoder.bytes)
    assert len(set(sizes)) == 1
    assert sizes[0] == sum(4 * torch.Size(shape).numel() for shape in vae.decoder_shapes(4, 6))
