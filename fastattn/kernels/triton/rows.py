"""What the row kernels share: tensors (..., C) as R rows of C columns, and tiles of a width.

A tile is BLOCK_R rows by BLOCK_C columns, chosen by C alone: a row's bits depend neither on the other
rows nor on their number. R is not specialised on, for the same reason.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # entries of a tile of several rows: 16 a thread with 4 warps


class Rows(NamedTuple):
    """R rows whose columns are neighbours in memory; row: the stride from one to the next."""

    ptr: Any
    row: Any


@triton.jit
def load_rows(x, rows, columns, inside):
    """(BLOCK_R, BLOCK_C) in fp32, 0 outside."""
    at = x.ptr + rows[:, None] * x.row + columns[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, rows, columns, inside, value):
    tl.store(x.ptr + rows[:, None] * x.row + columns[None, :], value, mask=inside)


# ---- on the host ------------------------------------------------------------------------------


def row_count(x: Tensor) -> int:
    """The leading dimensions counted as one."""
    return math.prod(x.shape[:-1])


def rows_of(x: Tensor | None) -> Rows | None:
    """x (..., C) as rows: x itself, or a copy where its strides allow no such view."""
    if x is None:
        return None
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    x = x.reshape(row_count(x), x.shape[-1])
    return Rows(x, x.stride(0))


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


class Gradient:
    """A gradient: empty_like its input, of no elements where there is none or nobody needs it.

    A kernel writes `rows`, which are copied at the end where the input's layout is another.
    """

    def __init__(self, like: Tensor | None, needed: int, anchor: Tensor) -> None:
        self.rows: Rows | None = None
        self.value = anchor.new_empty(0)
        if like is not None and needed:
            self.value = torch.empty_like(like)
            self.buffer = self.value if self.value.is_contiguous() else like.new_empty(like.shape)
            self.rows = rows_of(self.buffer)

    def finish(self) -> Tensor:
        if self.rows is not None and self.buffer is not self.value:
            self.value.copy_(self.buffer)
        return self.value


class Tile(NamedTuple):
    BLOCK_R: int
    BLOCK_C: int
    num_warps: int


def tile(C: int, most: int = 1 << 20, most_rows: int = TILE) -> Tile:
    """Whole rows up to `most` columns, and several of them where they are short; powers of 2."""
    columns = min(triton.next_power_of_2(max(C, 1)), most)
    rows = min(max(TILE // columns, 1), most_rows)
    return Tile(rows, columns, warps(rows * columns))


def warps(entries: int) -> int:
    """Of a program: 16 to 32 fp32 entries of a tile a thread."""
    return 4 if entries <= 2048 else 8 if entries <= 8192 else 16
