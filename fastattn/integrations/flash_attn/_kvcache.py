"""flash_attn_with_kvcache: new keys and values into the caller's cache, in place, and attention over it.

A dense cache (B, S, Hkv, D) is read as pages as long as itself, so that cache_batch_idx is a table of pages.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ops import checks, inference
from ...ops.attention import Options, asks_nothing
from ...ops.cache import attend_pages
from ...ops.rotary import rotary
from ._attend import check_heads, forward
from ._rows import check_page_table, rows

NAME = "flash_attn_with_kvcache"


class Cache(NamedTuple):
    """k, v: (pages, page_size, Hkv, D); table (B, max_pages) names each sequence's, lengths (B,) int32 the
    tokens that they hold, from leftpad (B,) on where it is given."""

    k: Tensor
    v: Tensor
    table: Tensor
    lengths: Tensor
    leftpad: Tensor | None
    in_order: bool  # sequence b is k[b], v[b]

    @property
    def capacity(self) -> int:
        return self.table.shape[1] * self.k.shape[1]


class Rotary(NamedTuple):
    cos: Tensor
    sin: Tensor
    interleaved: bool


def check_tensors(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any, v: Any) -> None:
    """Layouts of the tensors of a call, new keys and values both or neither."""
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    if (k is None) != (v is None):
        raise ValueError(
            f"{NAME}: k and v are given both or neither, got only {'v' if k is None else 'k'}"
        )
    if k is not None:
        given |= {"k": k, "v": v}
    checks.is_tensor(NAME, **given)
    checks.is_float(NAME, **given)
    checks.same_dtype(NAME, **given)
    checks.same_device(NAME, **given)
    for name, x in given.items():
        layout = "(pages, page_size, H, D)" if name.endswith("_cache") else "(B, S, H, D)"
        checks.has_dims(NAME, name, x, 4, layout=layout)
    for name in (n for n in ("k_cache", "v_cache") if given[n].stride(-1) != 1):
        raise ValueError(
            f"{NAME}: {name} must have a contiguous last dimension: it is changed in place"
        )
    checks.agree(NAME, "D", 3, q=q, k_cache=k_cache)
    for d, letter in ((0, "pages"), (1, "page_size"), (2, "Hkv")):
        checks.agree(NAME, letter, d, k_cache=k_cache, v_cache=v_cache)
    check_heads(NAME, q, k_cache)
    if k is not None:
        B, S, (Hkv, D), Dv = q.shape[0], k.shape[1], k_cache.shape[2:], v_cache.shape[3]
        checks.has_shape(NAME, "k", k, (B, S, Hkv, D), layout="(B, S, Hkv, D)")
        checks.has_shape(NAME, "v", v, (B, S, Hkv, Dv), layout="(B, S, Hkv, Dv)")


def rotary_tables(
    cos: Tensor | None, sin: Tensor | None, interleaved: bool, new: bool
) -> Rotary | None:
    if (cos is None) != (sin is None):
        raise ValueError(f"{NAME}: rotary_cos and rotary_sin are given both or neither")
    if cos is None or sin is None:
        return None
    if not new:
        raise ValueError(f"{NAME}: rotary_cos and rotary_sin turn new tokens: give k and v")
    return Rotary(cos, sin, interleaved)


def cache_of(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
) -> Cache:
    B, device = len(q), q.device
    if block_table is not None and cache_batch_idx is not None:
        raise ValueError(
            f"{NAME}: cache_batch_idx has no meaning beside a block_table: reorder its rows"
        )
    table = block_table
    if table is None:
        table = torch.arange(B, device=device) if cache_batch_idx is None else cache_batch_idx
        per_sequence("cache_batch_idx", table, B)
        if cache_batch_idx is None and len(k_cache) != B:
            raise ValueError(
                f"{NAME}: q and k_cache disagree on B, and there is no cache_batch_idx: "
                f"{checks.described(q=q, k_cache=k_cache)}"
            )
        table = table[:, None]
    if cache_seqlens is None:
        cache_seqlens = table.shape[1] * k_cache.shape[1]
    if not isinstance(cache_seqlens, Tensor):
        checks.is_int(NAME, "cache_seqlens", cache_seqlens, low=0)
        cache_seqlens = torch.full((B,), cache_seqlens, dtype=torch.int32, device=device)
    per_sequence("cache_seqlens", cache_seqlens, B)
    if cache_leftpad is not None:
        per_sequence("cache_leftpad", cache_leftpad, B)
    checks.same_device(
        NAME, q=q, cache_seqlens=cache_seqlens, block_table=table, leftpad=cache_leftpad
    )
    in_order = block_table is None and cache_batch_idx is None
    table, lengths = table.int().contiguous(), cache_seqlens.int().contiguous()
    return Cache(k_cache, v_cache, table, lengths, cache_leftpad, in_order)


def per_sequence(argument: str, x: Tensor, B: int) -> None:
    checks.is_tensor(NAME, **{argument: x})
    checks.is_integer(NAME, **{argument: x})
    checks.has_shape(NAME, argument, x, (B,), layout="(B,)")


def check_room(cache: Cache, new: int) -> None:
    """Before anything is changed: every sequence has room for `new` tokens more, in pages that exist."""
    table, lengths = cache.table, cache.lengths
    if checks.can_read(lengths) and lengths.numel():
        if int(lengths.min()) < 0:
            raise ValueError(f"{NAME}: cache_seqlens must be at least 0, got {lengths.tolist()}")
        if int(lengths.max()) + new > cache.capacity:
            raise ValueError(
                f"{NAME}: the cache (or its block_table) has room for {cache.capacity} tokens a sequence, "
                f"cache_seqlens are {lengths.tolist()} and {new} more are to be added"
            )
        if cache.leftpad is not None and bool(
            ((cache.leftpad < 0) | (cache.leftpad > lengths)).any()
        ):
            raise ValueError(
                f"{NAME}: cache_leftpad must be in [0, cache_seqlens], got {cache.leftpad.tolist()} "
                f"for {lengths.tolist()}"
            )
    check_page_table(NAME, table, cache.k, len(lengths), lengths + new)


def turned(
    q: Tensor, k: Tensor, cache: Cache, tables: Rotary, one_position: bool
) -> tuple[Tensor, ...]:
    """q and k by the angles of their places, from cache_seqlens on; all of q at the first if one_position."""
    cos, sin, interleaved = tables

    def turn(x: Tensor, positions: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return rotary(x, cos, sin, interleaved=interleaved, positions=positions).transpose(1, 2)

    after = torch.arange(max(q.shape[1], k.shape[1]), device=q.device)
    at = cache.lengths.long()[:, None] + after
    at_q = at[:, :1].expand(-1, q.shape[1]) if one_position else at[:, : q.shape[1]]
    return turn(q, at_q), turn(k, at[:, : k.shape[1]])


def append(cache: Cache, k: Tensor, v: Tensor) -> Cache:
    """k and v (B, S, Hkv, D) behind what the cache holds, in place."""
    S = k.shape[1]
    page_size = cache.k.shape[1]
    at = cache.lengths.long()[:, None] + torch.arange(S, device=k.device)
    page, row = cache.table.long().gather(1, at // page_size), at % page_size
    cache.k[page, row], cache.v[page, row] = k, v
    return cache._replace(lengths=cache.lengths + S)


def attend(q: Tensor, cache: Cache, options: Options, return_lse: bool) -> Any:
    """out (B, Sq, Hq, Dv), or with lse (B, Hq, Sq), the last query at the last token."""
    query = q.transpose(1, 2)
    if cache.in_order and cache.leftpad is None and not return_lse and asks_nothing(options):
        key, value = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
        out = inference.attend(query, key, value, options.causal, cache.lengths)
        if out is not None:
            return out.transpose(1, 2)
    if cache.leftpad is None:
        options = options._replace(key_lengths=cache.lengths)
        out, lse = attend_pages(NAME, query, cache.k, cache.v, cache.table, options)
        out = out.transpose(1, 2)
    else:
        out, lse = attend_padded(q, cache, cache.leftpad, options)
    return (out, lse) if return_lse else out


def attend_padded(
    q: Tensor, cache: Cache, leftpad: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Tokens before leftpad are never read: those behind are gathered."""
    B, Sq = q.shape[:2]
    kept = rows(leftpad, cache.lengths - leftpad, cache.table, cache.k.shape[1])
    k, v = (kept.take(x.flatten(0, 1)) for x in (cache.k, cache.v))
    options = options._replace(
        cu_seqlens_q=torch.arange(B + 1, dtype=torch.int32, device=q.device) * Sq,
        cu_seqlens_k=kept.cu_seqlens,
        max_seqlen_q=Sq,
        max_seqlen_k=cache.capacity,
    )
    out, lse, _ = forward(NAME, q.flatten(0, 1), k, v, options)
    return out.unflatten(0, (B, Sq)), lse.unflatten(1, (B, Sq)).transpose(0, 1)
