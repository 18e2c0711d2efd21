"""softmax(scale * x) over the last dimension's kept entries; 0 in a row that keeps none.

    y = exp(scale * x - max) / sum        dx = scale * y * (dy - sum(dy * y))
A row lies whole in registers up to MOST columns; longer ones are read twice, a block at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import Gradient, load_rows, row_count, rows_of, store_rows, tile

MOST = 16384
BLOCK_LONG = 4096


class Mask(NamedTuple):
    """A bool mask in x's shape: three leading dimensions of any strides, and the columns.

    The rows number (row // (middle * inner), row // inner % middle, row % inner).
    """

    ptr: Any
    middle: Any
    inner: Any
    outer_stride: Any
    middle_stride: Any
    inner_stride: Any
    column: Any


@triton.jit
def logits(x, mask, rows, columns, R, C, Sq, scale):
    """scale * x of a tile, -inf where nothing is kept. Sq: rows of a causal matrix, else None."""
    keep = (rows < R)[:, None] & (columns < C)[None, :]
    if Sq is not None:
        keep &= columns[None, :] <= (rows % Sq)[:, None] + (C - Sq)
    if mask is not None:
        outer, middle = rows // (mask.middle * mask.inner), rows // mask.inner % mask.middle
        at = outer * mask.outer_stride + middle * mask.middle_stride
        at += rows % mask.inner * mask.inner_stride
        at = mask.ptr + at[:, None] + columns[None, :].to(tl.int64) * mask.column
        keep &= tl.load(at, mask=keep, other=0) != 0
    return tl.where(keep, load_rows(x, rows, columns, keep) * scale, float("-inf"))


@triton.jit
def finite(row_max):
    """What to subtract: 0 in a row that keeps nothing, where -inf - -inf would be NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def inverse(row_sum):
    return tl.where(row_sum == 0, 0.0, 1 / tl.where(row_sum == 0, 1.0, row_sum))


@triton.jit(do_not_specialize=["R"])
def softmax_fwd_kernel(y, x, mask, R, C, Sq, scale, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    inside = (rows < R)[:, None] & (columns < C)[None, :]
    z = logits(x, mask, rows, columns, R, C, Sq, scale)
    weights = tl.exp(z - finite(tl.max(z, 1))[:, None])
    row_sum = tl.sum(weights, 1)
    store_rows(y, rows, columns, inside, weights * inverse(row_sum)[:, None])


@triton.jit(do_not_specialize=["R"])
def softmax_fwd_long_kernel(y, x, mask, R, C, Sq, scale, BLOCK_C: tl.constexpr):
    """One row, online: the sum is rescaled where a block raises the maximum."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    row_max = tl.full((1,), float("-inf"), tl.float32)
    row_sum = tl.zeros((1,), tl.float32)
    for start in range(0, C, BLOCK_C):
        z = logits(x, mask, rows, start + tl.arange(0, BLOCK_C), R, C, Sq, scale)
        higher = tl.maximum(row_max, tl.max(z, 1))
        row_sum *= tl.exp(row_max - finite(higher))
        row_sum += tl.sum(tl.exp(z - finite(higher)[:, None]), 1)
        row_max = higher
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        z = logits(x, mask, rows, columns, R, C, Sq, scale)
        weights = tl.exp(z - finite(row_max)[:, None])
        value = weights * inverse(row_sum)[:, None]
        store_rows(y, rows, columns, (columns < C)[None, :], value)


@triton.jit(do_not_specialize=["R"])
def softmax_bwd_kernel(dx, dy, y, R, C, scale, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    inside = (rows < R)[:, None] & (columns < C)[None, :]
    p = load_rows(y, rows, columns, inside)
    dp = load_rows(dy, rows, columns, inside)
    dot = tl.sum(p * dp, 1)
    store_rows(dx, rows, columns, inside, scale * p * (dp - dot[:, None]))


@triton.jit
def softmax_bwd_long_kernel(dx, dy, y, C, scale, BLOCK_C: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    products = tl.zeros((1, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        inside = (columns < C)[None, :]
        products += load_rows(y, rows, columns, inside) * load_rows(dy, rows, columns, inside)
    dot = tl.sum(products, 1)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        inside = (columns < C)[None, :]
        p, dp = load_rows(y, rows, columns, inside), load_rows(dy, rows, columns, inside)
        store_rows(dx, rows, columns, inside, scale * p * (dp - dot[:, None]))


# ---- launchers --------------------------------------------------------------------------------


def softmax_fwd(x: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    R, C = row_count(x), x.shape[-1]
    Sq = (x.shape[-2] if x.dim() > 1 else 1) if causal else None
    arguments = (rows_of(y), rows_of(x), mask_of(mask), R, C, Sq, scale)
    if C > MOST:
        softmax_fwd_long_kernel[(R,)](*arguments, BLOCK_LONG, num_warps=8)
    else:
        BLOCK_R, BLOCK_C, num_warps = tile(C, MOST)
        grid = (triton.cdiv(R, BLOCK_R),)
        softmax_fwd_kernel[grid](*arguments, BLOCK_R, BLOCK_C, num_warps=num_warps)
    return y


def softmax_bwd(dy: Tensor, y: Tensor, causal: bool, scale: float) -> Tensor:
    dx = Gradient(y, True, y)
    R, C = row_count(y), y.shape[-1]
    tensors = (dx.rows, rows_of(dy), rows_of(y))
    if C > MOST:
        softmax_bwd_long_kernel[(R,)](*tensors, C, scale, BLOCK_LONG, num_warps=8)
    else:
        BLOCK_R, BLOCK_C, num_warps = tile(C, MOST)
        grid = (triton.cdiv(R, BLOCK_R),)
        softmax_bwd_kernel[grid](*tensors, R, C, scale, BLOCK_R, BLOCK_C, num_warps=num_warps)
    return dx.finish()


def mask_of(mask: Tensor | None) -> Mask | None:
    """The mask where it lies, for it is often one row expanded; copied beyond three dimensions."""
    if mask is None:
        return None
    sizes, strides = merged(mask)
    if len(sizes) > 3:
        mask = mask.contiguous()
        sizes, strides = merged(mask)
    _, middle, inner = [1] * (3 - len(sizes)) + sizes
    outer_stride, middle_stride, inner_stride = [0] * (3 - len(strides)) + strides
    return Mask(
        mask.view(torch.uint8), middle, inner, outer_stride, middle_stride, inner_stride, mask.stride(-1)
    )  # fmt: skip


def merged(x: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides of the leading dimensions, neighbours joined where one stride serves both."""
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if strides and strides[-1] == size * stride:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    return sizes, strides
