"""Measures on frames: how alike, how fast they turn, whether they still look like the world.

B pairs or streams, T frames, H height, W width. Frames are uint8 [..., H, W, 3].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .record import FORWARD, FORWARD_LEFT, FORWARD_RIGHT, LEFT, RIGHT, WAIT

LEFT_TURNS, RIGHT_TURNS, NO_TURNS = (LEFT, FORWARD_LEFT), (RIGHT, FORWARD_RIGHT), (WAIT, FORWARD)
MAX_SHIFT = 11
ZOOMS = (1.0, 1.05, 1.1, 1.18, 1.3)


class Motion(NamedTuple):
    """Sideways shift of the picture in columns of equal angle, positive to the right, and the texture it rests on."""

    shift: Tensor
    texture: Tensor


def psnr(frames: Tensor, others: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each pair of frames, [...]; equal frames count as 60 dB."""
    error = (frames.float() - others.float()).square().mean((-3, -2, -1))
    return (10 * torch.log10(255**2 / error.clamp(min=1e-9))).clamp(max=60)


def luma(frames: Tensor) -> Tensor:
    """Return brightness [..., H, W] in [0, 1]."""
    return (frames.float() @ torch.tensor([0.299, 0.587, 0.114], device=frames.device)) / 255


def horizontal_motion(before: Tensor, after: Tensor) -> Motion:
    """Estimate how far the picture moved sideways between frames [B, H, W, 3].

    The rows around the horizon are resampled to columns of equal angle (90 degrees of view), where turning on the spot
    is a plain shift. Walking enlarges the picture, so the middle of the later frame is sought in the earlier one over
    shifts and enlargements; the best normalised correlation wins and is refined by a parabola.
    """
    width = after.shape[-2]
    low, size = width // 4, width - 2 * (width // 4)
    later = _horizon(after, 1.0)[..., low : low + size]
    b = (later - later.mean((1, 2), keepdim=True)).flatten(1)
    scores = []
    for zoom in ZOOMS:
        earlier = _horizon(before, zoom)
        for shift in range(-MAX_SHIFT, MAX_SHIFT + 1):
            a = earlier[..., low - shift : low - shift + size].flatten(1)
            a = a - a.mean(1, keepdim=True)
            scores.append((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-3))
    score = torch.stack(scores, 1).unflatten(1, (len(ZOOMS), -1)).amax(1)
    best = score.argmax(1)
    inner = best.clamp(1, 2 * MAX_SHIFT - 1)[:, None]
    left, middle, right = (score.gather(1, inner + i)[:, 0] for i in (-1, 0, 1))
    bend = (left - 2 * middle + right).clamp(max=-1e-6)
    refined = inner[:, 0] + (0.5 * (left - right) / bend).clamp(-0.5, 0.5)
    shift = torch.where(best == inner[:, 0], refined, best.float()) - MAX_SHIFT
    return Motion(shift, later.std((1, 2)))


def _horizon(frames: Tensor, zoom: float) -> Tensor:
    """Return brightness of the middle rows at columns of equal angle [B, rows, W], enlarged by `zoom`."""
    gray = luma(frames)
    height, width = gray.shape[-2:]
    angle = ((torch.arange(width, device=gray.device) + 0.5) / width * (math.pi / 2) - math.pi / 4) / zoom
    rows = height // 2
    across = angle.tan()[None, :].expand(rows, width)
    along = torch.linspace(-0.4, 0.4, rows, device=gray.device)[:, None] / angle.cos() / zoom
    grid = torch.stack((across, along.clamp(-1, 1)), -1).expand(len(gray), -1, -1, -1)
    return F.grid_sample(gray[:, None], grid, align_corners=False, padding_mode="border")[:, 0]


class Agreement(NamedTuple):
    """Share of frames whose motion fits the action, [left, right, straight], and how many frames were judged."""

    left: float
    right: float
    straight: float
    overall: float
    judged: int
    skipped: int


def turn_agreement(frames: Tensor, actions: Tensor, threshold: float = 4.0, texture: float = 0.04) -> Agreement:
    """Compare the motion of streams [B, T, H, W, 3] with their actions [B, T].

    A left turn moves the picture right by at least `threshold` columns, a right turn to the left, walking straight or
    waiting by less. Frames whose horizon has next to no texture cannot be judged and are skipped.
    """
    before, after, chosen = frames[:, :-1].flatten(0, 1), frames[:, 1:].flatten(0, 1), actions[:, 1:].flatten()
    parts = [horizontal_motion(b, a) for b, a in zip(before.split(2048), after.split(2048), strict=True)]
    shift, known = torch.cat([p.shift for p in parts]), torch.cat([p.texture for p in parts]) > texture
    groups = (
        (LEFT_TURNS, shift > threshold),
        (RIGHT_TURNS, shift < -threshold),
        (NO_TURNS, shift.abs() <= threshold),
    )
    rates, right, judged = [], 0, 0
    for kinds, fits in groups:
        mask = known & torch.isin(chosen, torch.tensor(kinds, device=chosen.device))
        count, good = int(mask.sum()), int((mask & fits).sum())
        rates.append(good / max(1, count))
        right, judged = right + good, judged + count
    to_left, to_right, straight = (round(rate, 4) for rate in rates)
    overall = round(right / max(1, judged), 4)
    return Agreement(to_left, to_right, straight, overall, judged, int((~known).sum()))


def edge_energy(frames: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels' brightness, [...]: falls when pictures blur."""
    gray = luma(frames)
    return gray.diff(dim=-1).abs().mean((-2, -1)) + gray.diff(dim=-2).abs().mean((-2, -1))


def histogram(frames: Tensor, bins: int = 32) -> Tensor:
    """Return the distribution of brightness over all pixels of `frames`, [bins]."""
    counts = torch.histc(luma(frames), bins=bins, min=0, max=1)
    return counts / counts.sum()


def thumbnails(frames: Tensor) -> Tensor:
    """Return frames [T, H, W, 3] as float32 pictures of 12 x 9 pixels, flattened, in [0, 1]."""
    small = [
        F.adaptive_avg_pool2d(part.permute(0, 3, 1, 2).float() / 255, (9, 12)).flatten(1) for part in frames.split(1024)
    ]
    return torch.cat(small)


def nearest(frames: Tensor, bank: Tensor) -> Tensor:
    """Return the root mean square distance of each frame [T, H, W, 3] to its nearest thumbnail in `bank` [K, 324]."""
    own = thumbnails(frames)
    return torch.cat([torch.cdist(part, bank).amin(1) for part in own.split(512)]) / bank.shape[1] ** 0.5
