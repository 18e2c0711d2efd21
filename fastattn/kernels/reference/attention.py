"""Attention with every feature of the library, from the formula, in plain PyTorch.

    score = scale * q k^T;  softcap * tanh(score / softcap);  + bias - slope * |i + diagonal - j|
    out = dropout(softmax over visible keys, and the sink) v;   lse = log of the softmax's denominator

Key j is on the diagonal of query i where j = i + Sk - Sq; causal and window count from there.
Dense (B, H, S, D) or packed (total, H, D) with cu_seqlens. Memory is O(Sq * Sk): this is the
definition, not a kernel.
"""

import torch
from torch import Tensor

from .philox import keep_mask, keep_scale


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_lengths: Tensor | None,
    page_table: Tensor | None,
    philox: Tensor | None,
    scale: float,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    dropout_p: float,
    diagonal_at_length: bool,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    accumulate: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, Hq, Sq, Dv) in query's dtype, lse (B, Hq, Sq) in fp32 (fp64 for fp64 inputs), and what
    rounding lse left.

    Packed: out (total_q, Hq, Dv) and lse (Hq, total_q). With a page_table (B, max_pages), key and
    value are pages (pages, page_size, Hkv, D).
    """
    if page_table is not None:
        key, value = (gather_pages(x, page_table) for x in (key, value))
    spec = (scale, causal, window_left, window_right, softcap, dropout_p, diagonal_at_length)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        first = torch.zeros((), dtype=torch.int64, device=query.device)
        return dense(
            query, key, value, bias, mask, alibi_slopes, sinks, key_lengths, philox, first, *spec,
            accumulate=accumulate,
        )  # fmt: skip
    parts = []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if len(starts_q) == 1:  # no sequences: like one of no tokens
        starts_q, starts_k = [0, 0], [0, 0]
    for b in range(len(starts_q) - 1):
        q = query[starts_q[b] : starts_q[b + 1]].transpose(0, 1)[None]
        k = key[starts_k[b] : starts_k[b + 1]].transpose(0, 1)[None]
        v = value[starts_k[b] : starts_k[b + 1]].transpose(0, 1)[None]
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b : b + 1].sum(0)  # (Hq,), its row b, or zeros where there is none
        first = torch.full((), b, device=query.device)
        out, lse, low = dense(
            q, k, v, None, None, slopes, sinks, None, philox, first, *spec, accumulate=accumulate
        )
        parts.append((out[0].transpose(0, 1), lse[0], low[0]))
    outs, lses, lows = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses, -1), torch.cat(lows, -1)


def gather_pages(pages: Tensor, page_table: Tensor) -> Tensor:
    """(pages, page_size, Hkv, D) and a table (B, max_pages) -> (B, Hkv, max_pages * page_size, D)."""
    return pages[page_table.long()].flatten(1, 2).transpose(1, 2)


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_lengths: Tensor | None,
    philox: Tensor | None,
    first: Tensor,
    scale: float,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float,
    dropout_p: float,
    diagonal_at_length: bool,
    *,
    accumulate: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One batch of equal lengths; `first` is the batch index of its first entry, for dropout."""
    B, Hq, Sq, _ = query.shape
    Hkv, Sk = key.shape[1:3]
    acc = accumulate or torch.promote_types(query.dtype, torch.float32)
    if key_lengths is not None:  # what lies past the length may be NaN: take zeros instead
        valid = torch.arange(Sk, device=key.device) < key_lengths[:, None]  # (B, Sk)
        key, value = (torch.where(valid[:, None, :, None], x, 0) for x in (key, value))
    q = query.to(acc)
    k, v = (x.to(acc).repeat_interleave(Hq // max(Hkv, 1), 1) for x in (key, value))

    score = q @ k.mT * scale  # (B, Hq, Sq, Sk)
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    if bias is not None:
        score = score + bias.to(acc)
    distance = diagonal_distance(query, Sk, key_lengths if diagonal_at_length else None)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(acc)[..., None, None]  # (Hq, 1, 1) or (B, Hq, 1, 1)
        score = score - slopes * distance.abs().to(acc)
    keep = visible(distance, causal, window_left, window_right)
    if key_lengths is not None:
        keep = keep & valid[:, None, None, :]
    if mask is not None:
        keep = keep & mask
    keep = keep & (score.detach() != -torch.inf)  # -inf in a bias is a mask
    score = torch.where(keep, score, -torch.inf)

    sink = None if sinks is None else sinks.to(acc)[:, None].expand(B, Hq, Sq)
    row_max = score.detach().amax(-1) if Sk else score.new_full((B, Hq, Sq), -torch.inf)
    if sink is not None:
        row_max = torch.maximum(row_max, sink.detach())
    row_max = torch.where(row_max == -torch.inf, 0.0, row_max)  # a row that sees no key
    weights = torch.exp(score - row_max[..., None])
    row_sum = weights.sum(-1)
    if sink is not None:
        row_sum = row_sum + torch.exp(sink - row_max)
    seen = row_sum > 0
    safe_sum = torch.where(seen, row_sum, 1.0)
    lse = torch.where(seen, row_max + torch.log(safe_sum), -torch.inf)
    weights = weights / safe_sum[..., None]
    if dropout_p and philox is not None:
        i = torch.arange(Sq, device=query.device)
        planes = torch.arange(B * Hq, device=query.device).reshape(B, Hq, 1) + first * Hq
        kept = keep_mask(i, planes, Sk, philox, dropout_p)
        weights = torch.where(kept, weights * keep_scale(dropout_p), 0.0)
    rounded = lse.detach().to(torch.promote_types(query.dtype, torch.float32))
    low = torch.where(seen, lse.detach() - rounded, 0.0).to(rounded.dtype)
    return (weights @ v).to(query.dtype), lse.to(rounded.dtype), low


def diagonal_distance(query: Tensor, Sk: int, lengths: Tensor | None) -> Tensor:
    """i + L - Sq - j, for L = Sk, or each sequence's length: (Sq, Sk) or (B, 1, Sq, Sk)."""
    Sq = query.shape[2]
    i = torch.arange(Sq, device=query.device)[:, None]
    j = torch.arange(Sk, device=query.device)
    if lengths is None:
        return i + (Sk - Sq) - j
    return i + (lengths[:, None, None, None] - Sq) - j


def visible(
    distance: Tensor, causal: bool, window_left: int | None, window_right: int | None
) -> Tensor:
    """Where a key is visible by position: causal is a right window of at most 0."""
    keep = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        keep = keep & (distance >= 0)
    if window_left is not None:
        keep = keep & (distance <= window_left)
    if window_right is not None:
        keep = keep & (distance >= -window_right)
    return keep
