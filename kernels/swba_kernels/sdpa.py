"""The path for CPUs and for GPUs without Triton, on torch's scaled_dot_product_attention.

B rows of the call, L ring lanes, H query heads, Hkv key/value heads, N new tokens, S ring slots, D head dim.

On a CPU positions and lengths are read on the host and every block reads exactly its keys. On a GPU nothing is read
on the host: hidden keys and values are replaced by zeros and masked.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .pattern import BlockWindow


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, block_size: int, window: int, sink: int, grid_start: int,
    need_lse: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend over a whole sequence, block by block.

    Returns:
        out [B, H, N, D] with the layout of q; the natural log-sum-exp [B, H, N] in float32, or [B, H, 0] if not needed.
    """
    pattern = _pattern(block_size, window, sink, grid_start)
    n = q.shape[2]
    if n <= block_size and grid_start == 0:
        return _attend(q, k, v, scale, need_lse)
    out, lse = torch.empty_like(q), _empty_lse(q, need_lse)
    for start, end in pattern.blocks(n):
        keys, values = (_cat(_visible(x, pattern, end)) for x in (k, v))
        rows = slice(start, end)
        out[:, :, rows], lse[:, :, rows] = _attend(q[:, :, rows], keys, values, scale, need_lse)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
    scale: float, block_size: int, window: int, sink: int, grid_start: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute dq, dk, dv block by block with the explicit formulas, in at least float32.

    The probabilities are computed afresh, so `lse` may be empty.
    """
    del lse
    pattern = _pattern(block_size, window, sink, grid_start)
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    delta = (dout.to(wide) * out.to(wide)).sum(-1, keepdim=True)

    def rows_of(x: Tensor, start: int, end: int) -> Tensor:
        """Stack the query heads of a key/value head: [B, H, n, C] to [B, Hkv, G*n, C]."""
        return x[:, :, start:end].to(wide).unflatten(1, (kv_heads, group)).flatten(2, 3)

    for start, end in pattern.blocks(q.shape[2]):
        q_rows, dout_rows, delta_rows = (rows_of(x, start, end) for x in (q, dout, delta))
        keys, values = (_cat(_visible(x, pattern, end)).to(wide) for x in (k, v))
        p = torch.softmax(q_rows @ keys.mT * scale, dim=-1)
        dp = dout_rows @ values.mT
        ds = dp.sub_(delta_rows).mul_(p).mul_(scale)
        dq[:, :, start:end] = (ds @ keys).unflatten(2, (group, end - start)).flatten(1, 2)
        at = 0
        for lo, hi in pattern.key_ranges(start, end):
            dk[:, :, lo:hi] += ds[..., at : at + hi - lo].mT @ q_rows
            dv[:, :, lo:hi] += p[..., at : at + hi - lo].mT @ dout_rows
            at += hi - lo
    return dq, torch.empty_like(k).copy_(dk), torch.empty_like(v).copy_(dv)


def prefill(
    q: Tensor, k: Tensor, v: Tensor, k_ring: Tensor, v_ring: Tensor, position: Tensor, lanes: Tensor | None, *,
    scale: float, block_size: int, window: int, sink: int, grid_start: int, need_lse: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend from new tokens to themselves and to the history in each row's ring lane. Results as in `forward`."""
    pattern = _pattern(block_size, window, sink, grid_start)
    attend = _prefill_exact if q.device.type == "cpu" else _prefill_masked
    out, lse = torch.empty_like(q), _empty_lse(q, need_lse)
    attend(out, lse, q, k, v, k_ring, v_ring, position, lanes, scale, pattern, need_lse)
    return out, lse


def decode(
    q: Tensor, k_ring: Tensor, v_ring: Tensor, valid: Tensor, lanes: Tensor | None, *,
    scale: float, need_lse: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to slots [0, valid[b]) of each row's ring lane. Results as in `forward`."""
    capacity = k_ring.shape[2]
    if q.device.type != "cpu":
        k, v = (x[: q.shape[0]] if lanes is None else x[lanes] for x in (k_ring, v_ring))
        seen = torch.arange(capacity, device=q.device) < valid[:, None]
        return _attend_seen(q, k, v, seen, scale, need_lse)
    lengths = valid.tolist()
    if min(lengths) < 1 or max(lengths) > capacity:
        raise ValueError(f"valid: expected lengths from 1 to {capacity}, got {lengths}")
    if lanes is None and min(lengths) == max(lengths):
        k, v = (x[: q.shape[0], :, : lengths[0]] for x in (k_ring, v_ring))
        return _attend(q, k, v, scale, need_lse)
    out, lse = torch.empty_like(q), _empty_lse(q, need_lse)
    for b, (lane, n) in enumerate(zip(_host_lanes(lanes, q.shape[0], k_ring.shape[0]), lengths, strict=True)):
        k, v = (x[lane : lane + 1, :, :n] for x in (k_ring, v_ring))
        out[b : b + 1], lse[b : b + 1] = _attend(q[b : b + 1], k, v, scale, need_lse)
    return out, lse


def ring_write(
    k_ring: Tensor, v_ring: Tensor, k: Tensor, v: Tensor, position: Tensor, lanes: Tensor | None, *, sink: int
) -> None:
    """Write new tokens into their ring slots; only those that survive the call, each slot once."""
    if k.device.type != "cpu":
        _ring_write_scatter(k_ring, v_ring, k, v, position, lanes, sink)
        return
    n, window = k.shape[2], k_ring.shape[2] - sink
    starts = position.tolist()
    if min(starts) < 0:
        raise ValueError(f"position: expected at least 0, got {starts}")
    for b, (lane, start) in enumerate(zip(_host_lanes(lanes, k.shape[0], k_ring.shape[0]), starts, strict=True)):
        end = start + n
        recent = max(start, end - window)
        for lo, hi in ((start, min(sink, recent)), (recent, end)):
            for a, b_, slot in _segments(lo, hi, sink, window):
                for ring, new in ((k_ring, k), (v_ring, v)):
                    ring[lane, :, slot : slot + b_ - a] = new[b, :, a - start : b_ - start]


def _pattern(block_size: int, window: int, sink: int, grid_start: int) -> BlockWindow:
    return BlockWindow(block_size, window, sink, grid_start + block_size if grid_start else 0)


def _empty_lse(q: Tensor, need_lse: bool) -> Tensor:
    return torch.empty((*q.shape[:2], q.shape[2] if need_lse else 0), dtype=torch.float32, device=q.device)


def _visible(x: Tensor, pattern: BlockWindow, end: int) -> list[Tensor]:
    return [x[:, :, lo:hi] for lo, hi in pattern.key_ranges(0, end) if lo < hi]


def _cat(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, need_lse: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    # On a CPU in float32, matmul-softmax-matmul is no faster at 48 x 768 (0.68 ms both) and twice as slow at 256 x 768.
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    like_q = torch.empty_like(q)
    if out.stride() != like_q.stride():
        out = like_q.copy_(out)
    if not need_lse:
        return out, _empty_lse(q, False)
    wide = torch.promote_types(q.dtype, torch.float32)
    q_rows = q.to(wide).unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))
    scores = (q_rows @ k.to(wide).mT.unsqueeze(2) * scale).flatten(1, 2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return out, torch.logsumexp(scores, dim=-1).float()


def _attend_seen(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, need_lse: bool) -> tuple[Tensor, Tensor]:
    """Attend to the keys marked in `seen` [B, M], the same for all queries of a row; others may hold NaN."""
    k, v = (torch.where(seen[:, None, :, None], x, 0) for x in (k, v))
    return _attend(q, k, v, scale, need_lse, seen[:, None, None, :])


def _segments(lo: int, hi: int, sink: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Cut tokens [lo, hi) of a ring into runs (first, end, slot of the first) that lie in adjacent slots."""
    while lo < hi:
        slot = lo if lo < sink else sink + (lo - sink) % window
        stop = sink if lo < sink else lo + sink + window - slot
        end = min(hi, stop)
        yield lo, end, slot
        lo = end


def _prefill_exact(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, k_ring: Tensor, v_ring: Tensor,
    position: Tensor, lanes: Tensor | None, scale: float, pattern: BlockWindow, need_lse: bool,
) -> None:  # fmt: skip
    window = k_ring.shape[2] - pattern.sink
    starts = position.tolist()
    if min(starts) < 0:
        raise ValueError(f"position: expected at least 0, got {starts}")
    for b, (lane, p) in enumerate(zip(_host_lanes(lanes, q.shape[0], k_ring.shape[0]), starts, strict=True)):
        for start, end in pattern.blocks(q.shape[2]):
            keys, values = [], []
            for lo, hi in pattern.key_ranges(p + start, p + end):
                for a, e, slot in _segments(lo, min(hi, p), pattern.sink, window):
                    keys.append(k_ring[lane : lane + 1, :, slot : slot + e - a])
                    values.append(v_ring[lane : lane + 1, :, slot : slot + e - a])
                if max(lo, p) < hi:
                    keys.append(k[b : b + 1, :, max(lo, p) - p : hi - p])
                    values.append(v[b : b + 1, :, max(lo, p) - p : hi - p])
            one, rows = slice(b, b + 1), slice(start, end)
            out[one, :, rows], lse[one, :, rows] = _attend(q[one, :, rows], _cat(keys), _cat(values), scale, need_lse)


def _prefill_masked(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, k_ring: Tensor, v_ring: Tensor,
    position: Tensor, lanes: Tensor | None, scale: float, pattern: BlockWindow, need_lse: bool,
) -> None:  # fmt: skip
    n, capacity, sink = q.shape[2], k_ring.shape[2], pattern.sink
    slot = torch.arange(capacity, device=q.device)
    p = position[:, None]
    latest = p - 1 - torch.remainder(p - 1 - slot, capacity - sink)
    held = torch.where(slot < sink, slot, latest)
    written = torch.where(slot < sink, slot < p, latest >= slot)
    new = p + torch.arange(n, device=q.device)
    tokens = torch.cat([torch.where(written, held, -1), new], dim=1)
    old_k, old_v = (x[: q.shape[0]] if lanes is None else x[lanes] for x in (k_ring, v_ring))
    keys, values = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
    for start, end in pattern.blocks(n):
        stop = p + end
        seen = (tokens >= 0) & (tokens < stop) & ((tokens >= stop - pattern.window) | (tokens < sink))
        rows = slice(start, end)
        out[:, :, rows], lse[:, :, rows] = _attend_seen(q[:, :, rows], keys, values, seen, scale, need_lse)


def _ring_write_scatter(
    k_ring: Tensor, v_ring: Tensor, k: Tensor, v: Tensor, position: Tensor, lanes: Tensor | None, sink: int
) -> None:
    index, slot = _scatter_slots(position, k.shape[2], k_ring.shape[2], sink)
    row = torch.arange(k.shape[0], device=k.device)[:, None]
    lane = row if lanes is None else lanes[:, None]
    for ring, new in ((k_ring, k), (v_ring, v)):
        ring.transpose(1, 2)[lane, slot] = new.transpose(1, 2)[row, index]


def _scatter_slots(position: Tensor, n: int, capacity: int, sink: int) -> tuple[Tensor, Tensor]:
    """Return which of a row's n new tokens go into the ring and into which slots, both [B, at most capacity].

    A token that does not survive becomes a second copy of the last one: same slot, same value.
    """
    recent = max(0, n - (capacity - sink))
    index = torch.arange(n, device=position.device)
    index = torch.cat([index[: min(sink, recent)], index[recent:]]).expand(position.shape[0], -1)
    index = torch.where((index >= recent) | (position[:, None] + index < sink), index, n - 1)
    token = position[:, None] + index
    return index, torch.where(token < sink, token, sink + torch.remainder(token - sink, capacity - sink))


def _host_lanes(lanes: Tensor | None, rows: int, ring_lanes: int) -> list[int]:
    if lanes is None:
        return list(range(rows))
    on_host = lanes.tolist()
    if min(on_host) < 0 or max(on_host) >= ring_lanes:
        raise ValueError(f"lanes: expected lanes from 0 to {ring_lanes - 1}, got {on_host}")
    return on_host
