"""layer_norm and rms_norm over the last dimension, with dropout and residual, forward and backward.

    z = dropout(x) + residual;  h = (z - mean) * rstd;  y = h * w + bias,  w = weight + weight_offset
    g = dy * w;  dz = rstd * (g - mean(g) - h * mean(g * h)) + dsummed   (rms: no mean, no mean(g))
    dweight = sum over rows of dy * h;  dbias = sum over rows of dy
A row lies whole in registers up to MOST columns; longer ones are read again for every pass. Sums over
rows are partial sums of a program's rows, then sum_rows. Without a mean_ptr it is rms_norm.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import drop, dropout
from .reduce import sum_rows
from .rows import Gradient, contiguous, load_rows, row_count, rows_of, store_rows, tile

MOST_FWD, MOST_BWD = 16384, 8192
BLOCK_LONG = 4096
ROWS_BWD = 8  # of a tile: the addresses of seven tensors' rows, where not aligned, would spill
COLUMNS_R, COLUMNS_C = 16, 128
PROGRAMS = 512  # that share the rows where sums over rows are wanted: about 4 an SM of an H100


@triton.jit
def norm_input(x, residual, dropout, rows, columns, inside):
    """z of a tile in fp32, 0 outside."""
    z = load_rows(x, rows, columns, inside)
    if dropout is not None:
        z = drop(z, rows[:, None], tl.full((), 0, tl.int32), columns[None, :], dropout)
    if residual is not None:
        z += load_rows(residual, rows, columns, inside)
    return z


@triton.jit
def load_columns(ptr, columns, C):
    return tl.load(ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_output(y, h, weight_ptr, bias_ptr, weight_offset, rows, columns, inside, C):
    if weight_ptr is not None:
        h *= load_columns(weight_ptr, columns, C) + weight_offset
    if bias_ptr is not None:
        h += load_columns(bias_ptr, columns, C)
    store_rows(y, rows, columns, inside, h)


@triton.jit
def inverse_root(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.sqrt_rn(x))


# ---- forward ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R"])
def norm_fwd_kernel(
    y, summed, mean_ptr, rstd_ptr, x, residual, weight_ptr, bias_ptr, dropout, R, C, eps,
    weight_offset, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    inside = (rows < R)[:, None] & (columns < C)[None, :]
    z = norm_input(x, residual, dropout, rows, columns, inside)
    if summed is not None:
        store_rows(summed, rows, columns, inside, z)
    if mean_ptr is not None:
        mean = tl.sum(z, 1) / C
        z = tl.where(inside, z - mean[:, None], 0.0)
        shift = tl.sum(z, 1) / C  # what rounding left in the mean
        z = tl.where(inside, z - shift[:, None], 0.0)
        tl.store(mean_ptr + rows, mean + shift, mask=rows < R)
    rstd = inverse_root(tl.sum(z * z, 1) / C + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < R)
    h = z * rstd[:, None]
    store_output(y, h, weight_ptr, bias_ptr, weight_offset, rows, columns, inside, C)


@triton.jit
def norm_fwd_long_kernel(
    y, summed, mean_ptr, rstd_ptr, x, residual, weight_ptr, bias_ptr, dropout, C, eps,
    weight_offset, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row in three passes: its mean, its variance, the output."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    mean = tl.zeros((1,), tl.float32)
    if mean_ptr is not None:
        total = tl.zeros((1, BLOCK_C), tl.float32)
        for start in range(0, C, BLOCK_C):
            columns = start + tl.arange(0, BLOCK_C)
            inside = (columns < C)[None, :]
            total += norm_input(x, residual, dropout, rows, columns, inside)
        mean = tl.sum(total, 1) / C
    total = tl.zeros((1, BLOCK_C), tl.float32)
    squares = tl.zeros((1, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        inside = (columns < C)[None, :]
        z = norm_input(x, residual, dropout, rows, columns, inside)
        if summed is not None:
            store_rows(summed, rows, columns, inside, z)
        z = tl.where(inside, z - mean[:, None], 0.0)
        total += z
        squares += z * z
    variance = tl.sum(squares, 1) / C
    if mean_ptr is not None:
        shift = tl.sum(total, 1) / C  # what rounding left in the mean
        mean += shift
        variance = tl.maximum(variance - shift * shift, 0.0)
        tl.store(mean_ptr + rows, mean)
    rstd = inverse_root(variance + eps)
    tl.store(rstd_ptr + rows, rstd)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        inside = (columns < C)[None, :]
        z = norm_input(x, residual, dropout, rows, columns, inside)
        h = (z - mean[:, None]) * rstd[:, None]
        store_output(y, h, weight_ptr, bias_ptr, weight_offset, rows, columns, inside, C)


# ---- backward ---------------------------------------------------------------------------------


@triton.jit
def normalised(x, residual, dropout, mean_ptr, rstd, rows, columns, R, inside):
    """h of a tile; outside it is whatever, for it meets only dy = 0 there."""
    z = norm_input(x, residual, dropout, rows, columns, inside)
    if mean_ptr is not None:
        z -= tl.load(mean_ptr + rows, mask=rows < R, other=0.0)[:, None]
    return z * rstd[:, None]


@triton.jit
def load_scaled(dy, weight_ptr, weight_offset, rows, columns, inside, C):
    """g = dy * w of a tile."""
    g = load_rows(dy, rows, columns, inside)
    if weight_ptr is not None:
        g *= load_columns(weight_ptr, columns, C) + weight_offset
    return g


@triton.jit
def store_gradients(dx, dresidual, dsummed, dz, dropout, rows, columns, inside):
    if dsummed is not None:
        dz += load_rows(dsummed, rows, columns, inside)
    if dresidual is not None:
        store_rows(dresidual, rows, columns, inside, dz)
    if dx is not None:
        if dropout is not None:
            dz = drop(dz, rows[:, None], tl.full((), 0, tl.int32), columns[None, :], dropout)
        store_rows(dx, rows, columns, inside, dz)


@triton.jit(do_not_specialize=["R", "steps"])
def norm_bwd_kernel(
    dx, dresidual, dweights_ptr, dbiases_ptr, dy, dsummed, x, residual, weight_ptr, dropout, mean_ptr,
    rstd_ptr, R, C, weight_offset, steps, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`steps` tiles of rows, and their sums over rows into row program_id of dweights and dbiases."""
    columns = tl.arange(0, BLOCK_C)
    dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(steps):
        first = (tl.program_id(0).to(tl.int64) * steps + step) * BLOCK_R
        rows = first + tl.arange(0, BLOCK_R)
        inside = (rows < R)[:, None] & (columns < C)[None, :]
        dz = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        if dy is not None:
            rstd = tl.load(rstd_ptr + rows, mask=rows < R, other=0.0)
            h = normalised(x, residual, dropout, mean_ptr, rstd, rows, columns, R, inside)
            dz = load_rows(dy, rows, columns, inside)
            if dweights_ptr is not None:
                dweight += dz * h
            if dbiases_ptr is not None:
                dbias += dz
            if weight_ptr is not None:
                dz *= load_columns(weight_ptr, columns, C) + weight_offset
            along = tl.sum(dz * h, 1) / C
            if mean_ptr is not None:
                dz -= (tl.sum(dz, 1) / C)[:, None]
            dz = (dz - h * along[:, None]) * rstd[:, None]
        store_gradients(dx, dresidual, dsummed, dz, dropout, rows, columns, inside)
    at = tl.program_id(0).to(tl.int64) * C + columns
    if dweights_ptr is not None:
        tl.store(dweights_ptr + at, tl.sum(dweight, 0), mask=columns < C)
    if dbiases_ptr is not None:
        tl.store(dbiases_ptr + at, tl.sum(dbias, 0), mask=columns < C)


@triton.jit
def norm_bwd_long_kernel(
    dx, dresidual, dy, dsummed, x, residual, weight_ptr, dropout, mean_ptr, rstd_ptr, R, C,
    weight_offset, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row in two passes: the means of g and g * h, then dz."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    rstd = tl.load(rstd_ptr + rows)
    along = tl.zeros((1, BLOCK_C), tl.float32)
    level = tl.zeros((1, BLOCK_C), tl.float32)
    if dy is not None:
        for start in range(0, C, BLOCK_C):
            columns = start + tl.arange(0, BLOCK_C)
            inside = (columns < C)[None, :]
            h = normalised(x, residual, dropout, mean_ptr, rstd, rows, columns, R, inside)
            g = load_scaled(dy, weight_ptr, weight_offset, rows, columns, inside, C)
            along += g * h
            if mean_ptr is not None:
                level += g
    g_h_mean, g_mean = tl.sum(along, 1) / C, tl.sum(level, 1) / C
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        inside = (columns < C)[None, :]
        dz = tl.zeros((1, BLOCK_C), tl.float32)
        if dy is not None:
            h = normalised(x, residual, dropout, mean_ptr, rstd, rows, columns, R, inside)
            g = load_scaled(dy, weight_ptr, weight_offset, rows, columns, inside, C)
            dz = (g - g_mean[:, None] - h * g_h_mean[:, None]) * rstd[:, None]
        store_gradients(dx, dresidual, dsummed, dz, dropout, rows, columns, inside)


@triton.jit(do_not_specialize=["R", "steps"])
def norm_columns_kernel(
    dweights_ptr, dbiases_ptr, dy, x, residual, dropout, mean_ptr, rstd_ptr, R, C, steps,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sums over rows where a row is long: a block of columns of `steps` tiles of rows."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(steps):
        first = (tl.program_id(1).to(tl.int64) * steps + step) * BLOCK_R
        rows = first + tl.arange(0, BLOCK_R)
        inside = (rows < R)[:, None] & (columns < C)[None, :]
        grad = load_rows(dy, rows, columns, inside)
        if dweights_ptr is not None:
            rstd = tl.load(rstd_ptr + rows, mask=rows < R, other=0.0)
            h = normalised(x, residual, dropout, mean_ptr, rstd, rows, columns, R, inside)
            dweight += grad * h
        dbias += grad
    at = tl.program_id(1).to(tl.int64) * C + columns
    if dweights_ptr is not None:
        tl.store(dweights_ptr + at, tl.sum(dweight, 0), mask=columns < C)
    if dbiases_ptr is not None:
        tl.store(dbiases_ptr + at, tl.sum(dbias, 0), mask=columns < C)


# ---- launchers --------------------------------------------------------------------------------


def norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    philox: Tensor | None,
    rms: bool,
    eps: float,
    weight_offset: float,
    dropout_p: float,
    return_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R, C = row_count(x), x.shape[-1]
    y = x.new_empty(x.shape)
    like = x if residual is None else residual
    summed = x.new_empty(x.shape, dtype=like.dtype) if return_residual else x.new_empty(0)
    mean = x.new_empty(0 if rms else x.shape[:-1], dtype=torch.float32)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    arguments = (
        rows_of(y), rows_of(summed) if return_residual else None, None if rms else mean, rstd,
        rows_of(x), rows_of(residual), contiguous(weight), contiguous(bias), dropout(philox, dropout_p),
    )  # fmt: skip
    if C > MOST_FWD:
        norm_fwd_long_kernel[(R,)](*arguments, C, eps, weight_offset, BLOCK_LONG, num_warps=8)
    else:
        BLOCK_R, BLOCK_C, num_warps = tile(C, MOST_FWD)
        norm_fwd_kernel[(triton.cdiv(R, BLOCK_R),)](
            *arguments, R, C, eps, weight_offset, BLOCK_R, BLOCK_C, num_warps=num_warps
        )
    return y, summed, mean, rstd


def norm_bwd(
    dy: Tensor | None,
    dsummed: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    philox: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
    eps: float,
    weight_offset: float,
    dropout_p: float,
    return_residual: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dresidual = Gradient(x, needs & 1, x), Gradient(residual, needs & 2, x)
    wanted = (weight is not None and needs & 4 > 0, bias is not None and needs & 8 > 0)
    launch = launch_long if x.shape[-1] > MOST_BWD else launch_whole
    partials = launch(
        (dx.rows, dresidual.rows),
        (rows_of(dy), rows_of(dsummed) if return_residual else None),
        (rows_of(x), rows_of(residual), contiguous(weight), dropout(philox, dropout_p)),
        (None if rms else mean.contiguous(), rstd.contiguous()),
        weight_offset,
        wanted,
    )
    dweight, dbias = (
        x.new_empty(0) if p is None or like is None else sum_rows(p).to(like.dtype)
        for p, like in zip(partials, (weight, bias), strict=True)
    )
    return dx.finish(), dresidual.finish(), dweight, dbias


Partials = list[Tensor | None]  # (P, C) of dweight and dbias, where wanted


def launch_whole(
    dz: Any, grads: Any, inputs: Any, stats: Any, weight_offset: float, wanted: tuple[bool, bool]
) -> Partials:
    R, C = inputs[0].ptr.shape
    BLOCK_R, BLOCK_C, num_warps = tile(C, MOST_BWD, ROWS_BWD)
    steps, P = shares(R, BLOCK_R, any(wanted))
    partials = [stats[1].new_empty(P, C) if w else None for w in wanted]
    norm_bwd_kernel[(P,)](
        *dz, *partials, *grads, *inputs, *stats, R, C, weight_offset, steps,
        BLOCK_R, BLOCK_C, num_warps=num_warps,
    )  # fmt: skip
    return partials


def launch_long(
    dz: Any, grads: Any, inputs: Any, stats: Any, weight_offset: float, wanted: tuple[bool, bool]
) -> Partials:
    R, C = inputs[0].ptr.shape
    norm_bwd_long_kernel[(R,)](
        *dz, *grads, *inputs, *stats, R, C, weight_offset, BLOCK_LONG, num_warps=8
    )
    steps, P = shares(R, COLUMNS_R, True)
    partials = [stats[1].new_zeros(P, C) if w else None for w in wanted]
    if grads[0] is not None and any(wanted):
        x, residual, _, dropped = inputs
        norm_columns_kernel[(triton.cdiv(C, COLUMNS_C), P)](
            *partials, grads[0], x, residual, dropped, *stats, R, C, steps, COLUMNS_R, COLUMNS_C
        )
    return partials


def shares(R: int, BLOCK_R: int, summing: bool) -> tuple[int, int]:
    """How many tiles of rows a program takes, and how many programs that makes."""
    tiles = triton.cdiv(R, BLOCK_R)
    steps = triton.cdiv(tiles, PROGRAMS) if summing else 1
    return steps, triton.cdiv(tiles, max(steps, 1))
