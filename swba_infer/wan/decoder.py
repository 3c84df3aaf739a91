"""One decoder, several lanes: each lane has a feature cache of its own.

B lanes of a call, C latent channels, F latent frames, T pixel frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError, NumericsError, StreamStateError
from .vae import FeatureCache, WanVAE


class StreamDecoder:
    """Decode independent lanes with one `WanVAE`, in the order in which their latents come.

    Lanes are decoded one after the other, so a lane's pixels do not depend on the others, bit for bit. A call that
    raises leaves every lane as it was.

    Args:
        vae: the autoencoder.
        lanes: independent streams.
        check_finite: reject NaN and infinity in the frames, at the price of waiting for the device.
    """

    def __init__(self, vae: WanVAE, lanes: int = 1, check_finite: bool = False) -> None:
        if isinstance(lanes, bool) or not isinstance(lanes, int) or lanes < 1:
            raise StreamStateError(f"lanes: expected an int of at least 1, got {lanes!r}")
        self.vae, self.lanes, self.check_finite = vae, lanes, check_finite
        self._caches = [FeatureCache()] * lanes

    @property
    def frames(self) -> tuple[int, ...]:
        """Latent frames that each lane has decoded."""
        return tuple(cache.frames for cache in self._caches)

    @property
    def bytes(self) -> int:
        """Bytes of all caches; lanes forked and not stepped since share theirs, which count once."""
        return sum({x.data_ptr(): x.nbytes for cache in self._caches for x in cache.tensors}.values())

    def decode(self, latents: Tensor, lanes: int | Sequence[int] | None = None) -> Tensor:
        """Decode the next latent frames [B, C, F, h, w] of the lanes (None: all) to [B, 3, T, H, W] in [-1, 1].

        Raises:
            StreamStateError: latents that do not fit, or lanes of which some begin and some go on.
            NumericsError: with `check_finite`, NaN or infinity came out.
        """
        chosen = self._choose(lanes)
        if not isinstance(latents, Tensor) or latents.ndim != 5 or len(latents) != len(chosen):
            got = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise StreamStateError(f"latents: expected [{len(chosen)} lanes, C, F, h, w], got {got}")
        if len({self._caches[lane].frames > 0 for lane in chosen}) > 1:
            raise StreamStateError(f"lanes: expected all to begin or all to go on, got frames {self.frames}")
        made = [self.vae.decode(row[None], self._caches[lane]) for row, lane in zip(latents, chosen, strict=True)]
        frames = torch.cat([frames for frames, _ in made])
        if self.check_finite and not bool(torch.isfinite(frames).all()):
            raise NumericsError(f"decoder: expected finite frames, got NaN or infinity at latent frames {self.frames}")
        for lane, (_, cache) in zip(chosen, made, strict=True):
            self._caches[lane] = cache
        return frames

    def reset(self, lanes: int | Sequence[int] | None = None) -> None:
        """Make the lanes (None: all) begin afresh."""
        for lane in self._choose(lanes):
            self._caches[lane] = FeatureCache()

    def fork(self, src: int, dst: int | Sequence[int]) -> None:
        """Let the lane(s) `dst` go on from where lane `src` stands; nothing is copied."""
        (source,) = self._choose(src)
        for lane in self._choose(dst):
            self._caches[lane] = self._caches[source]

    def snapshot(self) -> tuple[FeatureCache, ...]:
        """Return the lanes' caches; they are never written again, so nothing is copied."""
        return tuple(self._caches)

    def restore(self, snapshot: Sequence[FeatureCache]) -> None:
        """Return to a snapshot."""
        if len(snapshot) != self.lanes or not all(isinstance(cache, FeatureCache) for cache in snapshot):
            raise StreamStateError(f"snapshot: expected the caches of {self.lanes} lanes, got {len(snapshot)}")
        self._caches = list(snapshot)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the caches as named tensors: `frames` [lanes], and `lane.INDEX.NUMBER` for lanes that have begun."""
        state = {"frames": torch.tensor(self.frames, dtype=torch.int64)}
        for lane, cache in enumerate(self._caches):
            state |= {_name(lane, i): x for i, x in enumerate(cache.tensors)}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned, bit for bit.

        Raises:
            CheckpointError: missing or extra tensors, or one of another shape or dtype; the lanes are unchanged.
        """
        frames = state.get("frames")
        if frames is None or frames.dtype != torch.int64 or list(frames.shape) != [self.lanes] or min(frames) < 0:
            raise CheckpointError(f"decoder: expected frames of {self.lanes} lanes, got {frames}")
        caches = [self._read_lane(state, lane, count) for lane, count in enumerate(frames.tolist())]
        names = {"frames"} | {_name(lane, i) for lane, cache in enumerate(caches) for i in range(len(cache.tensors))}
        if set(state) != names:
            raise CheckpointError(f"decoder: extra tensors {sorted(set(state) - names)[:5]}")
        self._caches = caches

    def _read_lane(self, state: Mapping[str, Tensor], lane: int, frames: int) -> FeatureCache:
        if not frames:
            return FeatureCache()
        first = state.get(_name(lane, 0))
        height, width = first.shape[3:] if first is not None and first.ndim == 5 else (1, 1)
        tensors = []
        for i, shape in enumerate(self.vae.decoder_shapes(height, width)):
            x = state.get(_name(lane, i))
            if x is None or list(x.shape) != shape or x.dtype != self.vae.dtype:
                got = "none" if x is None else f"{x.dtype} {list(x.shape)}"
                raise CheckpointError(f"decoder: {_name(lane, i)}: expected {self.vae.dtype} {shape}, got {got}")
            tensors.append(self.vae.arrange(x.detach().to(self.vae.device, copy=True)))
        return FeatureCache(frames, tuple(tensors))

    def _choose(self, lanes: int | Sequence[int] | None) -> list[int]:
        chosen = list(range(self.lanes)) if lanes is None else [lanes] if isinstance(lanes, int) else list(lanes)
        known = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < self.lanes for i in chosen)
        if not chosen or not known or len(set(chosen)) != len(chosen):
            raise StreamStateError(f"lanes: expected different lanes of 0 to {self.lanes - 1}, got {lanes!r}")
        return chosen


def _name(lane: int, number: int) -> str:
    return f"lane.{lane}.{number:02d}"
