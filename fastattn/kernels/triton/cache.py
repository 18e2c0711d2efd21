"""Appends tokens to a cache, dense or in pages, and turns keys by the angles of their positions on the
way: one pass over what is new. Token t of sequence b goes to position lengths[b] + t, and only the
first counts[b] tokens are written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

BLOCK_T = 16  # tokens of a program


class Tokens(NamedTuple):
    """(B, Hkv, S, D) with contiguous channels; for pages (pages, page_size, Hkv, D) batch is a page's
    stride."""

    ptr: Any
    batch: Any
    head: Any
    token: Any


class Places(NamedTuple):
    """lengths and counts (B,), and the pages of each sequence (B, max_pages), 0 where dense."""

    lengths: Any
    counts: Any
    table: Any
    table_batch: Any
    page_size: Any


class Angles(NamedTuple):
    """cos and sin (P, half); 0 where nothing is turned."""

    cos: Any
    sin: Any
    cos_row: Any
    sin_row: Any
    half: Any


@triton.jit
def cache_append_kernel(store, x, places, angles, H, S, D: tl.constexpr, HALF: tl.constexpr,
                        INTERLEAVED: tl.constexpr, PAGED: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """HALF: pairs of channels that are turned, 0 for none; the channels after them are copied."""
    blocks = tl.cdiv(S, BLOCK_T)
    program = tl.program_id(0)
    t = program % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    head, b = program // blocks % H, program // blocks // H
    inside = (t < tl.minimum(S, tl.load(places.counts + b)))[:, None]
    position = tl.load(places.lengths + b).to(tl.int64) + t
    first = x.ptr + b.to(tl.int64) * x.batch + head.to(tl.int64) * x.head
    source = first + t.to(tl.int64)[:, None] * x.token
    slot, row = b.to(tl.int64) + tl.zeros_like(position), position
    if PAGED:
        at = places.table + b.to(tl.int64) * places.table_batch + position // places.page_size
        slot = tl.load(at, mask=t < tl.load(places.counts + b), other=0).to(tl.int64)
        row = position % places.page_size
    to = slot * store.batch + head.to(tl.int64) * store.head + row * store.token
    target = store.ptr + to[:, None]
    if HALF > 0:
        pair = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
        turned = inside & (pair < HALF)
        a_at, b_at = pair, pair + HALF
        if INTERLEAVED:
            a_at, b_at = 2 * pair, 2 * pair + 1
        where = position[:, None]
        c = tl.load(angles.cos + where * angles.cos_row + pair, mask=turned, other=0.0).to(
            tl.float32
        )
        s = tl.load(angles.sin + where * angles.sin_row + pair, mask=turned, other=0.0).to(
            tl.float32
        )
        u = tl.load(source + a_at, mask=turned, other=0.0).to(tl.float32)
        v = tl.load(source + b_at, mask=turned, other=0.0).to(tl.float32)
        kind = store.ptr.dtype.element_ty
        tl.store(target + a_at, (u * c - v * s).to(kind), mask=turned)
        tl.store(target + b_at, (v * c + u * s).to(kind), mask=turned)
    if 2 * HALF < D:
        d = 2 * HALF + tl.arange(0, triton.next_power_of_2(D - 2 * HALF))[None, :]
        kept = inside & (d < D)
        tl.store(target + d, tl.load(source + d, mask=kept, other=0.0), mask=kept)


def cache_append_(
    key_store: Tensor, value_store: Tensor, key: Tensor, value: Tensor, lengths: Tensor, counts: Tensor,
    page_table: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
) -> None:  # fmt: skip
    """key (B, Hkv, S, D) and value (B, Hkv, S, Dv) into the stores of a KVCache, in place."""
    B, H, S, _ = key.shape
    paged = page_table is not None
    places = Places(
        lengths, counts, 0 if page_table is None else page_table,
        0 if page_table is None else page_table.stride(0), key_store.shape[1] if paged else 1,
    )  # fmt: skip
    for store, x, turned in ((key_store, key, True), (value_store, value, False)):
        x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
        angles, half = Angles(0, 0, 0, 0, 0), 0
        if turned and cos is not None and sin is not None:
            half = cos.shape[1]
            angles = Angles(cos, sin, cos.stride(0), sin.stride(0), half)
        if x.numel():
            cache_append_kernel[(triton.cdiv(S, BLOCK_T) * H * B,)](
                tokens(store, paged), tokens(x, False), places, angles, H, S, x.shape[-1], half, interleaved,
                paged, BLOCK_T, num_warps=4,
            )  # fmt: skip


def tokens(x: Tensor, paged: bool) -> Tokens:
    batch, second, third = x.stride()[:3]
    return Tokens(x, batch, third, second) if paged else Tokens(x, batch, second, third)
