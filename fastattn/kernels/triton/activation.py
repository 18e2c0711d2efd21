"""gelu with an optional bias, and the gated activations, forward and backward, elementwise.

    erf:  gelu(x) = x Phi(x);               gelu'(x) = Phi(x) + x phi(x)
    tanh: gelu(x) = x sigmoid(2u),          u = sqrt(2 / pi) (x + 0.044715 x^3)
    silu(x) = x sigmoid(x)
dbias is the sum of dx over rows: partial sums of a program's rows, then sum_rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reduce import sum_rows
from .rows import Gradient, contiguous, load_rows, row_count, rows_of, store_rows, tile

MOST = 1024  # columns of a tile
PROGRAMS = 128  # that share the rows of a block of columns where dbias is wanted


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def curve(x, ACT: tl.constexpr):
    """An activation and its slope; the one that is not used is not computed."""
    if ACT == "erf":
        cumulative = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        value, slope = x * cumulative, cumulative + x * density
    elif ACT == "tanh":
        s = sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))  # 2 sqrt(2 / pi)
        du = 1.5957691216057308 * (1 + 0.134145 * x * x)
        value, slope = x * s, s * (1 + x * (1 - s) * du)
    else:
        s = sigmoid(x)
        value, slope = x * s, s * (1 + x * (1 - s))
    return value, slope


@triton.jit
def block(R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's rows and columns: all blocks of a row are neighbours."""
    blocks = tl.cdiv(C, BLOCK_C)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return rows, columns, (rows < R)[:, None] & (columns < C)[None, :]


@triton.jit
def load_biased(x, bias_ptr, rows, columns, inside, C):
    z = load_rows(x, rows, columns, inside)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit(do_not_specialize=["R"])
def gelu_fwd_kernel(
    y, x, bias_ptr, R, C, ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    rows, columns, inside = block(R, C, BLOCK_R, BLOCK_C)
    value, _ = curve(load_biased(x, bias_ptr, rows, columns, inside, C), ACT)
    store_rows(y, rows, columns, inside, value)


@triton.jit(do_not_specialize=["R", "steps"])
def gelu_bwd_kernel(
    dx, dbiases_ptr, dy, x, bias_ptr, R, C, steps,
    ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`steps` tiles of rows of a block of columns, and their sum over rows."""
    blocks = tl.cdiv(C, BLOCK_C)
    part = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(steps):
        rows = (part * steps + step) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (rows < R)[:, None] & (columns < C)[None, :]
        _, slope = curve(load_biased(x, bias_ptr, rows, columns, inside, C), ACT)
        grad = load_rows(dy, rows, columns, inside) * slope
        if dx is not None:
            store_rows(dx, rows, columns, inside, grad)
        dbias += grad
    if dbiases_ptr is not None:
        tl.store(dbiases_ptr + part * C + columns, tl.sum(dbias, 0), mask=columns < C)


@triton.jit(do_not_specialize=["R"])
def glu_fwd_kernel(
    y, gate, up, R, C, ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    rows, columns, inside = block(R, C, BLOCK_R, BLOCK_C)
    value, _ = curve(load_rows(gate, rows, columns, inside), ACT)
    store_rows(y, rows, columns, inside, value * load_rows(up, rows, columns, inside))


@triton.jit(do_not_specialize=["R"])
def glu_bwd_kernel(
    dgate, dup, dy, gate, up, R, C,
    ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows, columns, inside = block(R, C, BLOCK_R, BLOCK_C)
    value, slope = curve(load_rows(gate, rows, columns, inside), ACT)
    grad = load_rows(dy, rows, columns, inside)
    store_rows(dup, rows, columns, inside, grad * value)
    grad *= load_rows(up, rows, columns, inside)
    store_rows(dgate, rows, columns, inside, grad * slope)


# ---- launchers --------------------------------------------------------------------------------


def activation(gelu: bool, tanh: bool) -> str:
    return "silu" if not gelu else "tanh" if tanh else "erf"


def gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    R, C = row_count(x), x.shape[-1]
    y = x.new_empty(x.shape)
    BLOCK_R, BLOCK_C, num_warps = tile(C, MOST)
    gelu_fwd_kernel[(triton.cdiv(R, BLOCK_R) * triton.cdiv(C, BLOCK_C),)](
        rows_of(y), rows_of(x), contiguous(bias), R, C, activation(True, tanh),
        BLOCK_R, BLOCK_C, num_warps=num_warps,
    )  # fmt: skip
    return y


def gelu_bwd(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, needs: int
) -> tuple[Tensor, Tensor]:
    R, C = row_count(x), x.shape[-1]
    dx = Gradient(x, needs & 1, x)
    BLOCK_R, BLOCK_C, num_warps = tile(C, MOST)
    summing = bias is not None and needs & 2 > 0
    tiles = triton.cdiv(R, BLOCK_R)
    steps = triton.cdiv(tiles, PROGRAMS) if summing else 1
    P = triton.cdiv(tiles, max(steps, 1))
    dbiases = x.new_empty(P, C, dtype=torch.float32) if summing else None
    gelu_bwd_kernel[(P * triton.cdiv(C, BLOCK_C),)](
        dx.rows, dbiases, rows_of(dy), rows_of(x), contiguous(bias), R, C, steps,
        activation(True, tanh), BLOCK_R, BLOCK_C, num_warps=num_warps,
    )  # fmt: skip
    if bias is None or dbiases is None:
        return dx.finish(), x.new_empty(0)
    return dx.finish(), sum_rows(dbiases).to(bias.dtype)


def glu_fwd(gate: Tensor, up: Tensor, gelu: bool, tanh: bool) -> Tensor:
    R, C = row_count(gate), gate.shape[-1]
    y = gate.new_empty(gate.shape)
    BLOCK_R, BLOCK_C, num_warps = tile(C, MOST)
    glu_fwd_kernel[(triton.cdiv(R, BLOCK_R) * triton.cdiv(C, BLOCK_C),)](
        rows_of(y), rows_of(gate), rows_of(up), R, C, activation(gelu, tanh),
        BLOCK_R, BLOCK_C, num_warps=num_warps,
    )  # fmt: skip
    return y


def glu_bwd(dy: Tensor, gate: Tensor, up: Tensor, gelu: bool, tanh: bool) -> tuple[Tensor, Tensor]:
    R, C = row_count(gate), gate.shape[-1]
    dgate, dup = Gradient(gate, True, gate), Gradient(up, True, gate)
    BLOCK_R, BLOCK_C, num_warps = tile(C, MOST)
    glu_bwd_kernel[(triton.cdiv(R, BLOCK_R) * triton.cdiv(C, BLOCK_C),)](
        dgate.rows, dup.rows, rows_of(dy), rows_of(gate), rows_of(up), R, C,
        activation(gelu, tanh), BLOCK_R, BLOCK_C, num_warps=num_warps,
    )  # fmt: skip
    return dgate.finish(), dup.finish()
