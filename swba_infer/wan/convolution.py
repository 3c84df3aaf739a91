"""Causal convolutions of the decoder on values: what they have seen comes in, what they will look back to goes out.

The same sums in two forms, because cuDNN has no good three-dimensional kernel for few channels. Milliseconds of one
3x3x3 convolution on an H200 (bfloat16, channels last, C channels in and out):

    C, frames x rows x columns   conv3d   padded before   conv2d over stacked frames   and its copy
    96,  4 x 480 x 832            2.75        2.59                  1.49                   2.58
    192, 4 x 240 x 416            1.26        1.72                  1.40                   2.00
    384, 2 x 120 x 208            0.66        0.68                  0.55                   0.69

So convolutions of at most `STACKED_CHANNELS` channels in, and no fewer out, which would not pay for the copy, run over
stacked frames; all others are conv3d, which pads rows and columns itself.

B batch, C channels, T frames, h rows, w columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

STACKED_CHANNELS = 128


def stack_weights(module: torch.nn.Module) -> dict[torch.nn.Module, Tensor]:
    """Return the weights of the 3x3x3 convolutions of few channels as a conv2d over stacked frames takes them.

    They are copies [C out, 3 C in, 3, 3], channels innermost: 3.2 MiB for Wan 2.1's decoder in bfloat16.
    """
    return {
        layer: layer.weight.detach().transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        for layer in module.modules()
        if isinstance(layer, torch.nn.Conv3d) and _runs_stacked(layer)
    }


def _runs_stacked(layer: torch.nn.Conv3d) -> bool:
    few = layer.in_channels <= min(STACKED_CHANNELS, layer.out_channels)
    return few and layer.kernel_size == (3, 3, 3)


class CausalPass:
    """One pass through a decoder's causal convolutions, in their order.

    Args:
        features: for each convolution the two frames it has seen last, [B, C, 2, h, w]; only read.
        stacked: weights by `stack_weights` of those that run as conv2d over stacked frames.
    """

    def __init__(self, features: Sequence[Tensor], stacked: Mapping[Any, Tensor]) -> None:
        self.features, self.stacked = list(features), stacked
        self._next = 0

    def convolve(self, layer: Any, x: Tensor) -> Tensor:
        """Run the next convolution on what it has seen and x [B, C, T, h, w], and keep what it will look back to."""
        i, self._next = self._next, self._next + 1
        frames = torch.cat((self.features[i], x), dim=2)
        self.features[i] = frames[:, :, -2:].clone()
        if layer in self.stacked:
            return _convolve_stacked(frames, self.stacked[layer], layer.bias)
        _, rows, columns = layer.kernel_size
        return F.conv3d(frames, layer.weight, layer.bias, padding=(0, rows // 2, columns // 2))


def _convolve_stacked(frames: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve [B, C, T + 2, h, w] to [B, C out, T, h, w], one conv2d over each three frames as 3 C channels.

    Through one view with strides that overlap the copy would be shorter to write, but Triton would load each element
    of it alone; of a cat's slices it loads eight at once.
    """
    stacked = torch.cat((frames[:, :, :-2], frames[:, :, 1:-1], frames[:, :, 2:]), dim=1)
    out = F.conv2d(stacked.transpose(1, 2).flatten(0, 1), weight, bias, padding=1)
    return out.unflatten(0, (len(frames), -1)).transpose(1, 2)
