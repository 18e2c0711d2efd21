"""Rotary embedding: (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (d, d + half), or
(2d, 2d + 1) when interleaved. The backward is the rotation by the opposite angle.

A row is one token of one head: row = (b * H + h) * S + s. Channels from 2 * half on are copied.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import Rows, rows_of, tile

MOST_ROWS = 16  # of a program: the addresses of more rows of six tensors spill


class Tokens(NamedTuple):
    """(B, H, S, D) with contiguous channels, by strides."""

    ptr: Any
    batch: Any
    head: Any
    token: Any


@triton.jit
def token_ptrs(x, rows, H, S):
    batch, head, token = rows // S // H, rows // S % H, rows % S
    at = batch.to(tl.int64) * x.batch + head.to(tl.int64) * x.head + token.to(tl.int64) * x.token
    return x.ptr + at[:, None]


@triton.jit(do_not_specialize=["R"])
def rotary_kernel(
    y, x, cos, sin, positions, R, H, S, D, half, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_rows = (rows < R)[:, None]
    from_x, to_y = token_ptrs(x, rows, H, S), token_ptrs(y, rows, H, S)
    at = (rows % S).to(tl.int64)
    if positions is not None:
        batch = (rows // S // H).to(tl.int64)
        at = tl.load(positions.ptr + batch * positions.row + at, mask=rows < R, other=0)

    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    inside = in_rows & (pairs < half)
    c = tl.load(cos.ptr + at[:, None] * cos.row + pairs, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin.ptr + at[:, None] * sin.row + pairs, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    first, second = pairs, pairs + half
    if INTERLEAVED:
        first, second = 2 * pairs, 2 * pairs + 1
    a = tl.load(from_x + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(from_x + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(to_y + first, a * c - b * s, mask=inside)
    tl.store(to_y + second, b * c + a * s, mask=inside)

    if BLOCK_REST > 0:
        rest = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
        inside = in_rows & (rest < D)
        tl.store(to_y + rest, tl.load(from_x + rest, mask=inside, other=0.0), mask=inside)


# ---- launchers --------------------------------------------------------------------------------


def turn(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> Tensor:
    B, H, S, D = x.shape
    half = cos.shape[1]
    y = torch.empty_like(x)
    written = y if y.stride(-1) == 1 or D == 1 else x.new_empty(x.shape)
    x = x if x.stride(-1) == 1 or D == 1 else x.contiguous()
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
    return Tokens(x, *x.stride()[:3])


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
