"""The path for CPUs and for GPUs without Triton, on torch's scaled_dot_product_attention.

B rows of the call, L ring lanes, H query heads, Hkv key/value heads, N new tokens, S ring slots, D head dim.

On a CPU positions and lengths are read on the host and every block reads exactly its keys. On a GPU nothing is read
on the host: hidden keys and values are replaced by zeros and masked.

Two queries in one softmax, q for the window and q_sink for the sinks, are one query of twice the head dim: [q, q_sink]
meets window keys [k, 0] and sink keys [0, k], and values [v, 0], so that torch's fused attention serves them too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .pattern import BlockWindow


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, block_size: int, window: int, sink: int, grid_start: int,
    q_sink: Tensor | None = None, need_lse: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend over a whole sequence, block by block; q_sink takes the place of q in the scores of keys below `sink`.

    Returns:
        out [B, H, N, D] with the layout of q; the natural log-sum-exp [B, H, N] in float32, or [B, H, 0] if not needed.
    """
    pattern = _pattern(block_size, window, sink, grid_start)
    n = q.shape[2]
    if n <= block_size and grid_start == 0:
        return _attend(q, k, v, scale, need_lse, q_sink=q_sink, sinks=min(sink, n))
    out, lse = torch.empty_like(q), _empty_lse(q, need_lse)
    for start, end in pattern.blocks(n):
        keys, values = (_cat(_visible(x, pattern, end)) for x in (k, v))
        rows = slice(start, end)
        out[:, :, rows], lse[:, :, rows] = _attend(
            q[:, :, rows], keys, values, scale, need_lse, q_sink=_rows(q_sink, rows), sinks=min(sink, end)
        )
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *,
    scale: float, block_size: int, window: int, sink: int, grid_start: int, q_sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Compute dq, dk, dv and dq_sink block by block with the explicit formulas, in at least float32.

    The probabilities are computed afresh, so `lse` may be empty.
    """
    del lse
    pattern = _pattern(block_size, window, sink, grid_start)
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    dq, dq_sink = torch.empty_like(q), None if q_sink is None else torch.empty_like(q_sink)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    delta = (dout.to(wide) * out.to(wide)).sum(-1, keepdim=True)

    def rows_of(x: Tensor, start: int, end: int) -> Tensor:
        """Stack the query heads of a key/value head: [B, H, n, C] to [B, Hkv, G*n, C]."""
        return x[:, :, start:end].to(wide).unflatten(1, (kv_heads, group)).flatten(2, 3)

    for start, end in pattern.blocks(q.shape[2]):
        dout_rows, delta_rows = (rows_of(x, start, end) for x in (dout, delta))
        keys, values = (_cat(_visible(x, pattern, end)).to(wide) for x in (k, v))
        parts = [(q, dq, slice(None))]
        if q_sink is not None:
            sinks = min(sink, end)
            parts = [(q_sink, dq_sink, slice(sinks)), (q, dq, slice(sinks, None))]
        rows = [rows_of(x, start, end) for x, _, _ in parts]
        scores = [x @ keys[:, :, columns].mT for x, (_, _, columns) in zip(rows, parts, strict=True)]
        p = torch.softmax(_cat(scores, -1).mul_(scale), dim=-1)
        ds = (dout_rows @ values.mT).sub_(delta_rows).mul_(p).mul_(scale)
        for _, dx, columns in parts:
            dx[:, :, start:end] = (ds[..., columns] @ keys[:, :, columns]).unflatten(2, (group, -1)).flatten(1, 2)
        dk_rows = _cat([ds[..., columns].mT @ x for x, (_, _, columns) in zip(rows, parts, strict=True)])
        dv_rows = p.mT @ dout_rows
        at = 0
        for lo, hi in pattern.key_ranges(start, end):
            dk[:, :, lo:hi] += dk_rows[:, :, at : at + hi - lo]
            dv[:, :, lo:hi] += dv_rows[:, :, at : at + hi - lo]
            at += hi - lo
    return dq, torch.empty_like(k).copy_(dk), torch.empty_like(v).copy_(dv), dq_sink


def prefill(
    q: Tensor, k: Tensor, v: Tensor, k_ring: Tensor, v_ring: Tensor, position: Tensor, lanes: Tensor | None, *,
    scale: float, block_size: int, window: int, sink: int, grid_start: int,
    q_sink: Tensor | None = None, need_lse: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend from new tokens to themselves and to the history in each row's ring lane. Results as in `forward`."""
    pattern = _pattern(block_size, window, sink, grid_start)
    attend = _prefill_exact if q.device.type == "cpu" else _prefill_masked
    out, lse = torch.empty_like(q), _empty_lse(q, need_lse)
    attend(out, lse, q, k, v, q_sink, k_ring, v_ring, position, lanes, scale, pattern, need_lse)
    return out, lse


def decode(
    q: Tensor, k_ring: Tensor, v_ring: Tensor, valid: Tensor, lanes: Tensor | None, *,
    scale: float, q_sink: Tensor | None = None, sink: int = 0, need_lse: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to slots [0, valid[b]) of each row's ring lane, with q_sink to those below `sink`. Results as above."""
    capacity = k_ring.shape[2]
    if q.device.type != "cpu":
        k, v = (x[: q.shape[0]] if lanes is None else x[lanes] for x in (k_ring, v_ring))
        seen = torch.arange(capacity, device=q.device) < valid[:, None]
        return _attend_seen(q, k, v, seen, scale, need_lse, q_sink, sink)
    lengths = valid.tolist()
    if min(lengths) < 1 or max(lengths) > capacity:
        raise ValueError(f"valid: expected lengths from 1 to {capacity}, got {lengths}")
    if lanes is None and min(lengths) == max(lengths):
        k, v = (x[: q.shape[0], :, : lengths[0]] for x in (k_ring, v_ring))
        return _attend(q, k, v, scale, need_lse, q_sink=q_sink, sinks=min(sink, lengths[0]))
    out, lse = torch.empty_like(q), _empty_lse(q, need_lse)
    for b, (lane, n) in enumerate(zip(_host_lanes(lanes, q.shape[0], k_ring.shape[0]), lengths, strict=True)):
        k, v = (x[lane : lane + 1, :, :n] for x in (k_ring, v_ring))
        one = slice(b, b + 1)
        own = None if q_sink is None else q_sink[one]
        out[one], lse[one] = _attend(q[one], k, v, scale, need_lse, q_sink=own, sinks=min(sink, n))
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


def _cat(pieces: list[Tensor], dim: int = 2) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[:, :, rows]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, need_lse: bool, mask: Tensor | None = None, *,
    q_sink: Tensor | None = None, sinks: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend from q, and from q_sink to the first `sinks` keys or to those marked in `sinks` [B, M]."""
    if q_sink is not None:
        of_sinks = torch.arange(k.shape[2], device=k.device) < sinks if isinstance(sinks, int) else sinks[:, None]
        both = (k.masked_fill(hidden[..., None], 0) for hidden in (of_sinks, ~of_sinks))
        two = torch.cat([q, q_sink], dim=-1), torch.cat([*both], dim=-1), F.pad(v, (0, v.shape[3]))
        out, lse = _attend(*two, scale, need_lse, mask)
        return torch.empty_like(q).copy_(out[..., : q.shape[3]]), lse
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


def _attend_seen(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, need_lse: bool,
    q_sink: Tensor | None = None, sinks: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend to the keys marked in `seen` [B, M], the same for all queries of a row; others may hold NaN."""
    k, v = (torch.where(seen[:, None, :, None], x, 0) for x in (k, v))
    return _attend(q, k, v, scale, need_lse, seen[:, None, None, :], q_sink=q_sink, sinks=sinks)


def _segments(lo: int, hi: int, sink: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Cut tokens [lo, hi) of a ring into runs (first, end, slot of the first) that lie in adjacent slots."""
    while lo < hi:
        slot = lo if lo < sink else sink + (lo - sink) % window
        stop = sink if lo < sink else lo + sink + window - slot
        end = min(hi, stop)
        yield lo, end, slot
        lo = end


def _prefill_exact(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None, k_ring: Tensor, v_ring: Tensor,
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
            out[one, :, rows], lse[one, :, rows] = _attend(
                q[one, :, rows], _cat(keys), _cat(values), scale, need_lse,
                q_sink=None if q_sink is None else q_sink[one, :, rows], sinks=min(pattern.sink, p + end),
            )  # fmt: skip


def _prefill_masked(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor | None, k_ring: Tensor, v_ring: Tensor,
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
        out[:, :, rows], lse[:, :, rows] = _attend_seen(
            q[:, :, rows], keys, values, seen, scale, need_lse, _rows(q_sink, rows), tokens < sink
        )


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
