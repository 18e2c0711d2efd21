"""Cross-entropy of rows of logits with class targets, and its gradient, in place if asked.

    loss = (1 - smoothing) (lse - x[target]) + smoothing (lse - mean(x)) + z_loss lse^2
    dx = dloss ((1 + 2 z_loss lse) softmax(x) - smoothing / V - (1 - smoothing) [target])
The forward reads a row once, maximum and sum of exponentials online. Targets are not checked here;
one outside [0, V) reads nothing and its loss is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import Gradient, Rows, load_rows, rows_of, store_rows, tile

BLOCK_FWD, BLOCK_BWD = 8192, 2048


@triton.jit
def finite(row_max):
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit(do_not_specialize=["R", "ignore_index"])
def cross_entropy_fwd_kernel(
    loss_ptr, lse_ptr, logits, target_ptr, R, V, ignore_index, smoothing, z_loss,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_max = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_R,), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, V, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        inside = (rows < R)[:, None] & (columns < V)[None, :]
        x = load_rows(logits, rows, columns, inside)
        if smoothing is not None:
            total += tl.sum(x, 1)
        x = tl.where(inside, x, float("-inf"))
        higher = tl.maximum(row_max, tl.max(x, 1))
        row_sum *= tl.exp(row_max - finite(higher))
        row_sum += tl.sum(tl.exp(x - finite(higher)[:, None]), 1)
        row_max = higher

    target = tl.load(target_ptr + rows, mask=rows < R, other=0)
    kept = (rows < R) & (target != ignore_index)
    in_range = kept & (target >= 0) & (target < V)
    at = logits.ptr + rows * logits.row + target
    chosen = tl.load(at, mask=in_range, other=float("nan")).to(tl.float32)
    log_sum = tl.log(row_sum)
    lse = finite(row_max) + log_sum
    loss = (finite(row_max) - chosen) + log_sum  # what cancels first: lse would be rounded
    if smoothing is not None:
        even = (finite(row_max) - total / V) + log_sum
        loss = (1 - smoothing) * loss + smoothing * even
    if z_loss is not None:
        loss += z_loss * lse * lse
    tl.store(lse_ptr + rows, lse, mask=rows < R)
    tl.store(loss_ptr + rows, tl.where(kept, loss, 0.0), mask=rows < R)


@triton.jit(do_not_specialize=["R", "ignore_index"])
def cross_entropy_bwd_kernel(
    dlogits, dloss, logits, target_ptr, lse_ptr, R, V, ignore_index, smoothing, z_loss,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each entry is read and written by one thread, so dlogits may be logits."""
    blocks = tl.cdiv(V, BLOCK_C)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < R)[:, None] & (columns < V)[None, :]
    target = tl.load(target_ptr + rows, mask=rows < R, other=0)
    lse = tl.load(lse_ptr + rows, mask=rows < R, other=0.0)
    scale = tl.load(dloss.ptr + rows * dloss.row, mask=rows < R, other=0.0)

    p = tl.exp(load_rows(logits, rows, columns, inside) - lse[:, None])
    if z_loss is not None:
        p *= (1 + 2 * z_loss * lse)[:, None]
    one_hot = tl.where(columns[None, :] == target[:, None], 1.0, 0.0)
    if smoothing is not None:
        one_hot = (1 - smoothing) * one_hot + smoothing / V
    kept = (target != ignore_index)[:, None]
    store_rows(dlogits, rows, columns, inside, tl.where(kept, scale[:, None] * (p - one_hot), 0.0))


# ---- launchers --------------------------------------------------------------------------------


def cross_entropy_fwd(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    R, V = logits.shape
    loss, lse = (logits.new_empty(R, dtype=torch.float32) for _ in range(2))
    BLOCK_R, BLOCK_C, num_warps = tile(V, BLOCK_FWD)
    cross_entropy_fwd_kernel[(triton.cdiv(R, BLOCK_R),)](
        loss, lse, rows_of(logits), target.contiguous(), R, V, ignore_index,
        label_smoothing or None, z_loss or None, BLOCK_R, BLOCK_C, num_warps=num_warps,
    )  # fmt: skip
    return loss, lse


def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, *scalars: Any
) -> Tensor:
    dlogits = Gradient(logits, True, logits)
    write_gradient(dlogits.rows, dloss, logits, target, lse, *scalars)
    return dlogits.finish()


def cross_entropy_bwd_(
    dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, *scalars: Any
) -> None:
    """The gradient over the logits (R, V), whose columns are neighbours."""
    write_gradient(Rows(logits, logits.stride(0)), dloss, logits, target, lse, *scalars)


def write_gradient(
    dlogits: Rows | None,
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    """dloss (R,) of any stride."""
    R, V = logits.shape
    BLOCK_R, BLOCK_C, num_warps = tile(V, BLOCK_BWD)
    grid = (triton.cdiv(R, BLOCK_R) * triton.cdiv(V, BLOCK_C),)
    cross_entropy_bwd_kernel[grid](
        dlogits, Rows(dloss, dloss.stride(0)), rows_of(logits),
        target.contiguous(), lse.contiguous(), R, V, ignore_index,
        label_smoothing or None, z_loss or None, BLOCK_R, BLOCK_C, num_warps=num_warps,
    )  # fmt: skip
