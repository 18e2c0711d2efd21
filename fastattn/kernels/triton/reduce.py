"""Sums over the rows of a matrix, in an order that its shape alone decides: no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_P, BLOCK_C = 32, 64


@triton.jit(do_not_specialize=["P"])
def sum_rows_kernel(sums_ptr, partials_ptr, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P).to(tl.int64)
        inside = (rows < P)[:, None] & (columns < C)[None, :]
        at = partials_ptr + rows[:, None] * C + columns[None, :]
        acc += tl.load(at, mask=inside, other=0.0)
    tl.store(sums_ptr + columns, tl.sum(acc, 0), mask=columns < C)


def sum_rows(partials: Tensor) -> Tensor:
    """partials (P, C) in fp32, contiguous -> (C,) in fp32."""
    P, C = partials.shape
    sums = partials.new_empty(C, dtype=torch.float32)
    sum_rows_kernel[(triton.cdiv(C, BLOCK_C),)](sums, partials, P, C, BLOCK_P, BLOCK_C)
    return sums
