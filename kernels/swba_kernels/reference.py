"""The eager oracle: the pattern as dense masked softmax, in any dtype up to float64, differentiable by autograd.

B batch, H query heads, Hkv key/value heads, N new tokens, M keys, S ring slots, D head dim, L ring lanes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .pattern import BlockWindow


def visible_mask(
    block_ends: Sequence[int],
    window: int,
    sink: int,
    *,
    keys: int,
    history: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the boolean mask [N, keys] of the pattern for explicit blocks; rows are the call's own tokens.

    Args:
        block_ends: increasing end of each block, counted from the call's first token; the last one is N.
        window: tokens a block sees up to its own end.
        sink: tokens at absolute position < sink that every block sees.
        keys: number of keys, at absolute positions 0 .. keys-1; at least history + N.
        history: tokens that precede the call.
    """
    ends = torch.tensor(list(block_ends), dtype=torch.int64, device=device)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1))
    if ends.numel() == 0 or bool((sizes <= 0).any()):
        raise ValueError(f"block_ends: expected increasing positive numbers, got {list(block_ends)}")
    end = torch.repeat_interleave(ends + history, sizes)[:, None]
    key = torch.arange(keys, device=device)
    return (key < end) & ((key >= end - window) | (key < sink))


def block_window_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockWindow,
    *,
    block_ends: Sequence[int] | None = None,
    q_sink: Tensor | None = None,
    sm_scale: float | None = None,
    history: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute softmax(q k^T * sm_scale + mask) v densely, every step in the dtype of the input.

    Args:
        q: [B, H, N, D].
        k, v: [B, Hkv, history + N, D]; H is a multiple of Hkv, query head h reads head h // (H // Hkv).
        pattern: window and sink, and the block grid unless `block_ends` is given.
        block_ends: explicit block ends, counted from the call's first token; the last one is N.
        q_sink: [B, H, N, D], takes the place of q in the scores of keys at absolute position < pattern.sink.
        sm_scale: factor on the scores, 1/sqrt(D) by default.
        history: number of leading keys that precede the call.
        return_lse: also return the natural log-sum-exp [B, H, N] of the scaled scores.
    """
    n = q.shape[2]
    ends = pattern.block_ends(n) if block_ends is None else block_ends
    mask = visible_mask(ends, pattern.window, pattern.sink, keys=k.shape[2], history=history, device=q.device)
    return _masked_attention(q, k, v, mask, sm_scale, return_lse, q_sink, pattern.sink)


def decode_reference(
    q: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    valid: Tensor,
    *,
    lanes: Tensor | None = None,
    q_sink: Tensor | None = None,
    sink: int = 0,
    sm_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from each row's queries to the first valid[b] slots of its ring lane.

    Args:
        q: [B, H, N, D].
        k_ring, v_ring: [L, Hkv, S, D].
        valid: [B] number of slots to read.
        lanes: [B] ring lane of each row; row b reads lane b by default.
        q_sink: [B, H, N, D], takes the place of q in the scores of the first `sink` slots.
    """
    outs, lses = [], []
    for b, (lane, n) in enumerate(zip(_lanes(lanes, q.shape[0]), valid.tolist(), strict=True)):
        k, v = k_ring[lane : lane + 1, :, :n], v_ring[lane : lane + 1, :, :n]
        mask = torch.ones(q.shape[2], n, dtype=torch.bool, device=q.device)
        out, lse = _masked_attention(q[b : b + 1], k, v, mask, sm_scale, True, _row(q_sink, b), sink)
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs)
    return (out, torch.cat(lses)) if return_lse else out


def prefill_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockWindow,
    k_ring: Tensor,
    v_ring: Tensor,
    position: Tensor,
    *,
    lanes: Tensor | None = None,
    q_sink: Tensor | None = None,
    sm_scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from new tokens to themselves and to the history that each row's ring lane retains.

    The history is laid out at its absolute positions (tokens the ring has dropped are zero: nobody sees them).
    """
    outs, lses = [], []
    for b, (lane, p) in enumerate(zip(_lanes(lanes, q.shape[0]), position.tolist(), strict=True)):
        tokens, slots = ring_layout(p, k_ring.shape[2], pattern.sink)
        full = []
        for ring, new in ((k_ring, k), (v_ring, v)):
            old = new.new_zeros(new.shape[1], p, new.shape[3])
            old[:, tokens] = ring[lane][:, slots]
            full.append(torch.cat([old, new[b]], dim=1)[None])
        out, lse = block_window_reference(
            q[b : b + 1],
            full[0],
            full[1],
            pattern,
            q_sink=_row(q_sink, b),
            sm_scale=sm_scale,
            history=p,
            return_lse=True,
        )
        outs.append(out)
        lses.append(lse)
    out = torch.cat(outs)
    return (out, torch.cat(lses)) if return_lse else out


def ring_layout(position: int, capacity: int, sink: int) -> tuple[list[int], list[int]]:
    """Return the tokens that a ring holds after `position` tokens and the slot of each.

    Args:
        position: number of tokens written so far.
        capacity: slots of the ring, sink + window.
        sink: slots that are never overwritten.
    """
    window = capacity - sink
    tokens = [p for p in range(position) if p < sink or p >= position - window]
    return tokens, [p if p < sink else sink + (p - sink) % window for p in tokens]


def ring_write_reference(
    k_ring: Tensor,
    v_ring: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    *,
    sink: int = 0,
    lanes: Tensor | None = None,
) -> None:
    """Write tokens position[b] .. position[b]+N-1 of each row into its ring lane, one after the other."""
    window = k_ring.shape[2] - sink
    for b, (lane, start) in enumerate(zip(_lanes(lanes, k.shape[0]), position.tolist(), strict=True)):
        for i in range(k.shape[2]):
            p = start + i
            slot = p if p < sink else sink + (p - sink) % window
            k_ring[lane, :, slot] = k[b, :, i]
            v_ring[lane, :, slot] = v[b, :, i]


def _lanes(lanes: Tensor | None, batch: int) -> list[int]:
    return list(range(batch)) if lanes is None else lanes.tolist()


def _row(x: Tensor | None, b: int) -> Tensor | None:
    return None if x is None else x[b : b + 1]


def _masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    sm_scale: float | None,
    return_lse: bool,
    q_sink: Tensor | None,
    sink: int,
) -> Tensor | tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    scores = q @ k.transpose(-1, -2) * scale
    if q_sink is not None:
        of_sinks = q_sink @ k.transpose(-1, -2) * scale
        scores = torch.where(torch.arange(k.shape[2], device=k.device) < sink, of_sinks, scores)
    scores = scores.masked_fill(~mask, float("-inf"))
    out = torch.softmax(scores, dim=-1) @ v
    if not return_lse:
        return out
    return out, torch.logsumexp(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1)
