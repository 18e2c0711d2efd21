"""Rotary embedding: (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (d, d + half), or
(2d, 2d + 1) when interleaved. The backward is the rotation by the opposite angle, and the tables' is

    dcos = sum of da a + db b;  dsin = sum of db a - da b

over the heads of all tokens that a row of the tables turns, by one program and so in one order.
A row of x is one token of one head: row = (b * H + h) * S + s. Channels from 2 * half on are copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import Gradient, Rows, rows_of, tile

MOST_ROWS = 16  # of a program: the addresses of more rows of six tensors spill


class Tokens(NamedTuple):
    """(B, H, S, D) with contiguous channels, by strides."""

    ptr: Any
    batch: Any
    head: Any
    token: Any


class Held(NamedTuple):
    """Tokens b * S + s in the order of the row that turns them: starts[p] to starts[p + 1] are row p's."""

    tokens: Any
    starts: Any


@triton.jit
def token_ptrs(x, batch, head, token):
    at = batch.to(tl.int64) * x.batch + head.to(tl.int64) * x.head + token.to(tl.int64) * x.token
    return x.ptr + at[:, None]


@triton.jit
def channels(pairs, half, INTERLEAVED: tl.constexpr):
    """Of a pair's first and second member."""
    if INTERLEAVED:
        return 2 * pairs, 2 * pairs + 1
    else:
        return pairs, pairs + half


@triton.jit
def load_pairs(ptrs, first, second, inside):
    a = tl.load(ptrs + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(ptrs + second, mask=inside, other=0.0).to(tl.float32)
    return a, b


@triton.jit(do_not_specialize=["R"])
def rotary_kernel(
    y, x, cos, sin, positions, R, H, S, D, half, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = (rows < R)[:, None]
    batch, head, token = rows // S // H, rows // S % H, rows % S
    from_x, to_y = token_ptrs(x, batch, head, token), token_ptrs(y, batch, head, token)
    at = token.to(tl.int64)
    if positions is not None:
        at += batch.to(tl.int64) * positions.row
        at = tl.load(positions.ptr + at, mask=rows < R, other=0)

    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    inside = in_rows & (pairs < half)
    c = tl.load(cos.ptr + at[:, None] * cos.row + pairs, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin.ptr + at[:, None] * sin.row + pairs, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    first, second = channels(pairs, half, INTERLEAVED)
    a, b = load_pairs(from_x, first, second, inside)
    tl.store(to_y + first, a * c - b * s, mask=inside)
    tl.store(to_y + second, b * c + a * s, mask=inside)

    if BLOCK_REST > 0:
        rest = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
        inside = in_rows & (rest < D)
        tl.store(to_y + rest, tl.load(from_x + rest, mask=inside, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["B"])
def rotary_tables_kernel(
    dcos, dsin, dy, x, held, B, H, S, half, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """Row program_id of dcos and dsin, in fp64: it may turn every token. held None: tokens (b, row)."""
    p = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    first, second = channels(pairs, half, INTERLEAVED)
    start = tl.full((), 0, tl.int64)
    R = tl.where(p < S, B * H, 0)
    if held is not None:
        start = tl.load(held.starts + p)
        R = (tl.load(held.starts + p + 1) - start).to(tl.int32) * H
    cos_sum = tl.zeros((BLOCK_R, BLOCK_PAIRS), tl.float64)
    sin_sum = tl.zeros((BLOCK_R, BLOCK_PAIRS), tl.float64)
    for n in range(0, R, BLOCK_R):
        rows = n + tl.arange(0, BLOCK_R)
        batch, head, token = rows // H, rows % H, p + tl.zeros_like(rows)
        if held is not None:  # in 32 bits: a division of 64 takes a hundred instructions
            at = tl.load(held.tokens + start + rows // H, mask=rows < R, other=0).to(tl.int32)
            batch, token = at // S, at % S
        inside = (rows < R)[:, None] & (pairs < half)
        a, b = load_pairs(token_ptrs(x, batch, head, token), first, second, inside)
        da, db = load_pairs(token_ptrs(dy, batch, head, token), first, second, inside)
        cos_sum += da * a + db * b
        sin_sum += db * a - da * b
    if INVERSE:
        sin_sum = -sin_sum
    if dcos is not None:
        tl.store(dcos.ptr + p * dcos.row + pairs, tl.sum(cos_sum, 0)[None, :], mask=pairs < half)
    if dsin is not None:
        tl.store(dsin.ptr + p * dsin.row + pairs, tl.sum(sin_sum, 0)[None, :], mask=pairs < half)


# ---- launchers --------------------------------------------------------------------------------


def turn(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    B, H, S, D = x.shape
    half = cos.shape[1]
    y = torch.empty_like(x)
    written = y if y.stride(-1) == 1 or D == 1 else x.new_empty(x.shape)
    at = None
    if positions is not None:
        positions = positions.contiguous().expand(B, S)
        at = Rows(positions, positions.stride(0))
    rest = triton.next_power_of_2(D - 2 * half) if 2 * half < D else 0
    BLOCK_R, BLOCK_PAIRS, num_warps = tile(half, most_rows=MOST_ROWS)
    rotary_kernel[(triton.cdiv(B * H * S, BLOCK_R),)](
        tokens(written), tokens(x), rows_of(cos), rows_of(sin), at,
        B * H * S, H, S, D, half, inverse, interleaved, BLOCK_R, BLOCK_PAIRS, rest,
        num_warps=num_warps,
    )  # fmt: skip
    return y if written is y else y.copy_(written)


def tokens(x: Tensor) -> Tokens:
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return Tokens(x, *x.stride()[:3])


def held_by(positions: Tensor | None, B: int, P: int) -> Held | None:
    """The sort is stable, so the order of a row's tokens is that of x."""
    if positions is None:
        return None
    rows, order = positions.expand(B, -1).flatten().sort(stable=True)
    return Held(order, torch.searchsorted(rows, torch.arange(P + 1, device=rows.device)))


def rotary_fwd(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> Tensor:
    return turn(x, cos, sin, positions, interleaved, inverse)


def rotary_bwd(
    dy: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> Tensor:
    return turn(dy, cos, sin, positions, interleaved, not inverse)


rotary_tables_fwd = rotary_fwd  # only their backwards differ


def rotary_tables_bwd(
    dy: Tensor,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = turn(dy, cos, sin, positions, interleaved, not inverse) if needs & 1 else x.new_empty(0)
    dcos, dsin = Gradient(cos, needs & 2, x), Gradient(sin, needs & 4, x)
    (B, H, S, _), (P, half) = x.shape, cos.shape
    if needs & 6 and cos.numel():
        BLOCK_R, BLOCK_PAIRS, num_warps = tile(half, most_rows=MOST_ROWS)
        rotary_tables_kernel[(P,)](
            dcos.rows, dsin.rows, tokens(dy), tokens(x), held_by(positions, B, P), B, H, S, half,
            inverse, interleaved, BLOCK_R, BLOCK_PAIRS, num_warps=num_warps,
        )  # fmt: skip
    return dx, dcos.finish(), dsin.finish()
