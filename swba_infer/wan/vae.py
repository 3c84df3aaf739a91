"""Wan's video autoencoder as a stream: diffusers' layers and weights, with caches that belong to the caller.

The layers of `AutoencoderKLWan` are causal convolutions that look back two frames. diffusers keeps those frames on the
module and forgets them with every call; here they are values that go in and come out, so that any number of streams
share one module, and a stream may be forked, dropped or retried by keeping the value.

B batch, C latent channels, F latent frames, h, w latent rows and columns; T pixel frames, H, W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..device import pick_device
from ..errors import ConfigError, StreamStateError
from .convolution import CausalPass, stack_weights
from .extra import require
from .vae_files import load_autoencoder

FRAMES_PER_LATENT = 4


class FeatureCache(NamedTuple):
    """What the causal convolutions have seen of one stream: latent frames so far, and their last inputs.

    The tensors are never written again, so a copy of the tuple is a copy of the state.
    """

    frames: int = 0
    tensors: tuple[Tensor, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(x.nbytes for x in self.tensors)


class WanVAE:
    """Encode and decode chunk by chunk; the chunks together equal the whole clip.

    Args:
        module: an `AutoencoderKLWan`; it is used as it is, its own caches are left alone.
        compile: run the decoder, from a stream's second latent frame on, through torch.compile: residual sums, norms,
            activations and concatenation fuse into one pass between convolutions, two where frames are stacked.
        frames_at_once: latent frames decoded together from a stream's second on; more take more memory. How a stream is
            cut may change its last bits.
        channels_last: lay features out with the channels innermost; None: on CUDA only.
        stack_frames: run the decoder's convolutions of few channels over stacked frames, on copies of their weights as
            they are now, from a stream's second latent frame on; None: on CUDA with channels innermost.

    Raises:
        ConfigError: the module is not such an autoencoder, or is one whose strides are unknown.
    """

    def __init__(
        self,
        module: Any,
        compile: bool = False,
        frames_at_once: int = 1,
        channels_last: bool | None = None,
        stack_frames: bool | None = None,
    ) -> None:
        kind = require("diffusers").AutoencoderKLWan
        if not isinstance(module, kind):
            raise ConfigError(f"module: expected a {kind.__name__}, got {type(module).__name__}")
        if isinstance(frames_at_once, bool) or not isinstance(frames_at_once, int) or frames_at_once < 1:
            raise ConfigError(f"frames_at_once: expected an int of at least 1, got {frames_at_once!r}")
        config = module.config
        if 2 ** sum(config.temperal_downsample) != FRAMES_PER_LATENT:
            raise ConfigError(
                f"temperal_downsample: expected two levels of {FRAMES_PER_LATENT} frames, "
                f"got {list(config.temperal_downsample)}"
            )
        self.module: Any = module.eval().requires_grad_(False)
        self.channels, self.patch = config.z_dim, config.patch_size or 1
        self.scale = 2 ** (len(config.dim_mult) - 1) * self.patch
        self.device, self.dtype = module.post_quant_conv.weight.device, module.post_quant_conv.weight.dtype
        self.frames_at_once = frames_at_once
        on_gpu = self.device.type == "cuda"
        innermost = on_gpu if channels_last is None else channels_last
        self._format = torch.channels_last_3d if innermost else torch.contiguous_format
        if innermost:
            _lay_channels_last(self.module)
        stack = (on_gpu and innermost) if stack_frames is None else stack_frames
        self._stacked = stack_weights(self.module.decoder) if stack else {}
        self._mean, self._std = (self._statistics(name) for name in ("latents_mean", "latents_std"))
        if not bool((self._std > 0).all()):
            raise ConfigError(f"latents_std: expected positive numbers, got {list(config.latents_std)}")
        self._decode_next = _compile(self._decode_more) if compile else self._decode_more
        self._layout: list[tuple[int, int]] | None = None

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> WanVAE:
        """Load the autoencoder of a diffusers folder, or of its `vae` subfolder.

        Args:
            device: default: cuda if there is one, else cpu.
            dtype: default: bfloat16 on CUDA, float32 on the CPU.
            options: see `WanVAE`.

        Raises:
            ConfigError: no such folder, or a config that does not describe one.
            CheckpointError: damaged weights, or tensors that are missing, left over or of a wrong shape.
        """
        target = pick_device(device)
        dtype = dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
        return cls(load_autoencoder(directory, target, dtype), **options)

    def decode(self, latents: Tensor, cache: FeatureCache | None = None) -> tuple[Tensor, FeatureCache]:
        """Decode the next latent frames of a stream.

        Args:
            latents: normalised, as the transformer makes them, [B, C, F, h, w]; any F >= 1.
            cache: what the call before returned; None starts a stream.

        Returns:
            Frames in [-1, 1], [B, 3, T, H, W], and the cache to go on with. A stream's first latent frame becomes one
            frame, each other one four.

        Raises:
            StreamStateError: latents of another size than the stream's, or not of this autoencoder.
        """
        cache = FeatureCache() if cache is None else cache
        self._check_latents(latents, cache)
        with torch.no_grad():
            z = latents.to(self.device, torch.float32) * self._std + self._mean
            z = self.arrange(self.module.post_quant_conv(self.arrange(z.to(self.dtype))))
            parts, features, start = [], list(cache.tensors), 0
            if not cache.frames:
                first, features = self._decode_first(z[:, :, :1])
                parts, start = [first], 1
            for i in range(start, z.shape[2], self.frames_at_once):
                part, features = self._decode_next(self.arrange(z[:, :, i : i + self.frames_at_once]), features)
                features = [self.arrange(_without_surroundings(feature)) for feature in features]
                parts.append(part)
            frames = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
            return frames, FeatureCache(cache.frames + z.shape[2], tuple(features))

    def encode(self, frames: Tensor, cache: FeatureCache | None = None) -> tuple[Tensor, FeatureCache]:
        """Encode the next frames of a stream to the means of their latents.

        Args:
            frames: in [-1, 1], [B, 3, T, H, W]; 1 + 4 n of them at the start of a stream, 4 n after that.
            cache: what the call before returned; None starts a stream.

        Returns:
            Latents, normalised, float32 [B, C, F, h, w], and the cache to go on with.

        Raises:
            StreamStateError: a number or size of frames that does not fit.
        """
        cache = FeatureCache() if cache is None else cache
        self._check_frames(frames, cache)
        with torch.no_grad():
            x = fold_patches(frames.to(self.device, self.dtype), self.patch)
            features: list[Any] = list(cache.tensors)
            first = 0 if cache.frames else 1
            if first:
                features = [None] * sum(isinstance(m, torch.nn.Conv3d) for m in self.module.encoder.modules())
            parts = []
            for i in range(-3 if first else 0, x.shape[2], FRAMES_PER_LATENT):
                chunk = self.arrange(x[:, :, max(i, 0) : i + FRAMES_PER_LATENT])
                parts.append(self.module.encoder(chunk, feat_cache=features, feat_idx=[0]))
                features = [feature for feature in features if feature is not None]
            moments = self.module.quant_conv(torch.cat(parts, dim=2))
            mean = moments.chunk(2, dim=1)[0].float()
            latents = (mean - self._mean) / self._std
            return latents.contiguous(), FeatureCache(cache.frames + len(parts), tuple(features))

    def decoder_shapes(self, height: int, width: int) -> list[list[int]]:
        """Return the shapes of the decoder's cache tensors of one stream with latents of this size."""
        if self._layout is None:
            probe = torch.zeros(1, self.channels, 1, 2, 2, device=self.device, dtype=self.dtype)
            with torch.no_grad():
                self._layout = [(x.shape[1], x.shape[3] // 2) for x in self._decode_first(self.arrange(probe))[1]]
        return [[1, channels, 2, scale * height, scale * width] for channels, scale in self._layout]

    def _decode_first(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Decode a stream's first latent frame [B, C, 1, h, w], and make the cache one of fixed shapes.

        diffusers leaves one frame where two will be kept from the next call on, and the word "Rep" where a temporal
        upsampling has been passed over: both stand for frames of zeros, which leave every result as it is.
        """
        features: list[Any] = [None] * sum(isinstance(m, torch.nn.Conv3d) for m in self.module.decoder.modules())
        out = self.module.decoder(z, feat_cache=features, feat_idx=[0], first_chunk=True)
        settled: list[Tensor] = []
        for feature in features:
            if isinstance(feature, str):
                # An upsampling reads what the second convolution of the block before it reads, in size.
                settled.append(torch.zeros_like(settled[-1]))
            elif feature is not None:
                settled.append(torch.cat((torch.zeros_like(feature), feature), dim=2))
        return self._finish(out), [self.arrange(feature) for feature in settled]

    def _decode_more(self, z: Tensor, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Decode further latent frames [B, C, F, h, w]; the tensors of `features` are only read.

        The decoder's layers in their order, without diffusers' comparison of tensors with a word, which older
        versions of torch.compile cannot trace.
        """
        decoder, causal = self.module.decoder, CausalPass(features, self._stacked)
        x = causal.convolve(decoder.conv_in, z)
        x = _decode_residual(decoder.mid_block.resnets[0], x, causal)
        for attention, resnet in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
            x = _decode_residual(resnet, attention(x), causal)
        for block in decoder.up_blocks:
            x = _decode_block(block, x, causal)
        out = causal.convolve(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)))
        return self._finish(out), [feature.contiguous(memory_format=self._format) for feature in causal.features]

    def _finish(self, out: Tensor) -> Tensor:
        return unfold_patches(out, self.patch).clamp(-1, 1)

    def arrange(self, x: Tensor) -> Tensor:
        """Return x [B, C, F, h, w] in the memory layout of the features, copied only if it is in another.

        The strides of sizes of one, which layouts leave open, are set too: a compiled graph is chosen by all strides.
        """
        x = x.contiguous(memory_format=self._format)
        _, channels, frames, height, width = x.shape
        if self._format is torch.channels_last_3d:
            column = channels
            strides = (frames * height * width * column, 1, height * width * column, width * column, column)
        else:
            plane = height * width
            strides = (channels * frames * plane, frames * plane, plane, width, 1)
        return x if x.stride() == strides else x.as_strided(x.shape, strides)

    def _statistics(self, name: str) -> Tensor:
        values = torch.tensor(self.module.config[name], dtype=torch.float32, device=self.device)
        if values.shape != (self.channels,) or not bool(torch.isfinite(values).all()):
            raise ConfigError(f"{name}: expected {self.channels} finite numbers, got {self.module.config[name]!r}")
        return values.view(1, -1, 1, 1, 1)

    def _check_latents(self, latents: Tensor, cache: FeatureCache) -> None:
        expected = ["B", self.channels, "F", "h", "w"]
        if cache.frames:
            batch, _, _, height, width = cache.tensors[0].shape
            expected = [batch, self.channels, "F", height, width]
        _check_video("latents", latents, expected)

    def _check_frames(self, frames: Tensor, cache: FeatureCache) -> None:
        expected = ["B", 3, "T", "H", "W"]
        if cache.frames:
            batch, _, _, height, width = cache.tensors[0].shape
            expected = [batch, 3, "T", height * self.patch, width * self.patch]
        _check_video("frames", frames, expected)
        count, height, width = frames.shape[2:]
        if height % self.scale or width % self.scale:
            raise StreamStateError(f"frames: expected sides that {self.scale} divides, got {height} x {width}")
        if count % FRAMES_PER_LATENT != (0 if cache.frames else 1):
            form = "a multiple of 4" if cache.frames else "1 more than a multiple of 4"
            raise StreamStateError(f"frames: expected {form} frames, got {count}")


def _decode_residual(block: Any, x: Tensor, causal: CausalPass) -> Tensor:
    """Run one residual block of the decoder."""
    shortcut = block.conv_shortcut
    given = x if isinstance(shortcut, torch.nn.Identity) else F.conv3d(x, shortcut.weight, shortcut.bias)
    x = causal.convolve(block.conv1, block.nonlinearity(block.norm1(x)))
    x = causal.convolve(block.conv2, block.dropout(block.nonlinearity(block.norm2(x))))
    return x + given


def _decode_block(block: Any, x: Tensor, causal: CausalPass) -> Tensor:
    """Run one block of the decoder: its residual layers, then twice the rows and columns, and the frames if it does."""
    given = x
    for resnet in block.resnets:
        x = _decode_residual(resnet, x, causal)
    upsampler = block.upsampler if hasattr(block, "upsampler") else (block.upsamplers or [None])[0]
    if upsampler is None:
        return x
    if upsampler.mode == "upsample3d":
        pairs = causal.convolve(upsampler.time_conv, x)
        x = pairs.unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
    x = upsampler.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (given.shape[0], -1)).transpose(1, 2)
    shortcut = getattr(block, "avg_shortcut", None)
    return x if shortcut is None else x + shortcut(given, first_chunk=False)


def fold_patches(frames: Tensor, patch: int) -> Tensor:
    """Turn squares of pixels into channels: [B, c, T, H, W] to [B, c patch patch, T, H / patch, W / patch]."""
    if patch == 1:
        return frames
    x = frames.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unfold_patches(x: Tensor, patch: int) -> Tensor:
    """Undo `fold_patches`."""
    if patch == 1:
        return x
    return x.unflatten(1, (-1, patch, patch)).permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def to_pixels(frames: Tensor) -> Tensor:
    """Turn frames in [-1, 1], [B, 3, T, H, W], into uint8 [B, T, H, W, 3], rounded and clipped."""
    return ((frames.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def from_pixels(frames: Tensor) -> Tensor:
    """Turn uint8 frames [B, T, H, W, 3] into float32 in [-1, 1], [B, 3, T, H, W]."""
    if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
        raise StreamStateError(f"frames: expected uint8 [B, T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    return (frames.float() / 127.5 - 1).permute(0, 4, 1, 2, 3).contiguous()


def _check_video(name: str, x: Any, expected: list[int | str]) -> None:
    """Raise StreamStateError unless x is a non-empty floating tensor of these sizes; a letter stands for any."""
    if not isinstance(x, Tensor):
        raise StreamStateError(f"{name}: expected a tensor {expected}, got {type(x).__name__}")
    fits = x.ndim == 5 and all(isinstance(e, str) or e == size for e, size in zip(expected, x.shape, strict=True))
    if not fits or not x.is_floating_point() or x.numel() == 0:
        raise StreamStateError(f"{name}: expected floating {expected}, got {x.dtype} {list(x.shape)}")


def _without_surroundings(x: Tensor) -> Tensor:
    """Return x, copied if it is part of a larger buffer that it would keep alive."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile for fixed sizes, as one graph.

    Inductor must not reuse buffers. It writes some features straight into the input of a convolution; the copy that is
    returned is then made in place, as a view of that input, whose memory torch 2.13 gives to a later kernel. Without
    reuse the buffers are freed all the same.

    Its thresholds are for kernels that it may make larger: at the usual ones a norm behind several residual layers is
    written in float32 before its activation, and read again to be laid between the frames before it.
    """
    options: dict[str, Any] = {
        "allow_buffer_reuse": False, "inplace_buffers": False, "realize_reads_threshold": 16,
        "realize_acc_reads_threshold": 16, "realize_opcount_threshold": 100,
    }  # fmt: skip
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


def _lay_channels_last(module: torch.nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last_3d)
        elif isinstance(layer, torch.nn.Conv2d):
            layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)
