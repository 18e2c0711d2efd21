"""Small kernels with their launchers, right ones and wrong ones, that test_interpreter.py has interpreted."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class Rows(NamedTuple):
    ptr: Any
    stride: Any


def rows(x: Tensor) -> Rows:
    return Rows(x, x.stride(0))


# ---------------------------------------------------------------------------------------- arithmetic


@triton.jit
def elementwise_kernel(out_ptr, x_ptr, y_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "less":
        z = x < y
    elif OP == "equal":
        z = x == y
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "minimum":
        z = tl.minimum(x, y)
    elif OP == "where":
        z = tl.where(x < y, x, y)
    elif OP == "neg":
        z = -x
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "fma":
        z = tl.fma(x, y, tl.load(out_ptr + i).to(x.dtype))
    elif OP == "erf":
        z = tl.math.erf(x)
    elif OP == "clamp":
        z = tl.clamp(x, -y, y)
    elif OP == "cast":
        z = x
    elif OP == "sum of three":
        z = x + y + x
    tl.store(out_ptr + i, z.to(out_ptr.dtype.element_ty))


def elementwise(op: str, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.zeros(x.shape, dtype=dtype)
    elementwise_kernel[(1,)](out, x, y, OP=op, N=x.numel())
    return out


def fma(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    out = z.clone()
    elementwise_kernel[(1,)](out, x, y, OP="fma", N=x.numel())
    return out


@triton.jit
def dot_kernel(out_ptr, x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(x_ptr + m[:, None] * K + k[None, :])
    y = tl.load(y_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(x, y))


def dot(x: Tensor, y: Tensor) -> Tensor:
    out = torch.empty(
        x.shape[0], y.shape[1], dtype=torch.float32 if x.is_floating_point() else torch.int32
    )
    dot_kernel[(1,)](out, x, y, M=x.shape[0], N=y.shape[1], K=x.shape[1])
    return out


@triton.jit
def compose(a_scale, a_shift, b_scale, b_shift):
    """x -> scale x + shift, first a and then b: associative and not commutative."""
    return a_scale * b_scale, a_shift * b_scale + b_shift


@triton.jit
def reduce_kernel(out_ptr, x_ptr, y_ptr, OP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    if OP == "sum":
        z = tl.sum(x, 1)
    elif OP == "max":
        z = tl.max(x, 1)
    elif OP == "min":
        z = tl.min(x, 1)
    elif OP == "argmax":
        z = tl.argmax(x, 1)
    elif OP == "cumsum":
        z = tl.sum(tl.cumsum(x, 1), 1)
    elif OP == "compose":
        _, z = tl.reduce((x, y), 1, compose)
    elif OP == "scan":
        _, z = tl.associative_scan((x, y), 1, compose)
        z = tl.sum(z, 1)
    elif OP == "masked max":
        z = tl.max(tl.load(x_ptr + at, mask=at % N < N // 2), 1)
    tl.store(out_ptr + tl.arange(0, M), z.to(out_ptr.dtype.element_ty))


def reduce(op: str, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape[0], dtype=dtype)
    reduce_kernel[(1,)](out, x, y, OP=op, M=x.shape[0], N=x.shape[1])
    return out


# ----------------------------------------------------------------------------------------- addresses


@triton.jit
def copy_kernel(y, x, n_load, n_store, C, BLOCK: tl.constexpr):
    """A row a program, of columns up to n_load and n_store, which should both be C."""
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    values = tl.load(x.ptr + row * x.stride + i, mask=i < n_load)
    tl.store(y.ptr + row * y.stride + i, values, mask=i < n_store)


def copy(x: Tensor, more_loaded: int = 0, more_stored: int = 0) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    C = x.shape[1]
    block = triton.next_power_of_2(C + 1)
    copy_kernel[(len(x),)](rows(y), rows(x), C + more_loaded, C + more_stored, C, BLOCK=block)
    return y


def copy_too_many_rows(x: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    copy_kernel[(len(x) + 1,)](rows(y), rows(x), x.shape[1], x.shape[1], x.shape[1], BLOCK=32)
    return y


@triton.jit
def unmasked_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


def unmasked(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    unmasked_kernel[(triton.cdiv(x.numel(), 32),)](y, x, BLOCK=32)
    return y


@triton.jit
def through_other_kernel(y_ptr, x_ptr, other_ptr, N: tl.constexpr):
    """Reads x's memory, by a pointer to other and the distance between the two."""
    distance = (x_ptr.to(tl.int64) - other_ptr.to(tl.int64)) // 4
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(other_ptr + distance + i))


def through_other(x: Tensor, other: Tensor) -> Tensor:
    y = torch.empty_like(x)
    through_other_kernel[(1,)](y, x, other, N=x.numel())
    return y


@triton.jit
def chosen_kernel(y_ptr, a_ptr, b_ptr, N: tl.constexpr, SHAPED: tl.constexpr):
    """b's elements where i is odd, a's elsewhere, through pointers that have been everywhere."""
    i = tl.arange(0, N)
    at = tl.where(i % 2 == 1, b_ptr + i, a_ptr + i)
    if SHAPED:
        at = tl.trans(tl.reshape(at, (2, N // 2)))
        at = tl.reshape(tl.trans(at)[:, :, None], (N,))
    tl.store(y_ptr + i, tl.load(at))


def chosen(a: Tensor, b: Tensor, shaped: bool) -> Tensor:
    y = torch.empty_like(a)
    chosen_kernel[(1,)](y, a, b, N=a.numel(), SHAPED=shaped)
    return y


@triton.jit
def described_kernel(
    y_desc, x_desc, x_ptr, R, C, ON_DEVICE: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    if ON_DEVICE:
        x_desc = tl.make_tensor_descriptor(x_ptr, [R, C], [C, 1], [M, N])
    y_desc.store([0, 0], x_desc.load([0, 0]))


def described(x: Tensor, extra_rows: int, on_device: bool) -> Tensor:
    y = torch.empty(32, 32)
    shape = [x.shape[0] + extra_rows, x.shape[1]]
    desc = TensorDescriptor(x, shape, list(x.stride()), [32, 32])
    out = TensorDescriptor.from_tensor(y, [32, 32])
    described_kernel[(1,)](out, desc, x, *shape, ON_DEVICE=on_device, M=32, N=32)
    return y


@triton.jit
def masked_kernel(y_ptr, x_ptr, n, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0) if OTHER else tl.load(x_ptr + i, mask=i < n)
    tl.store(y_ptr, tl.sum(x, 0))


def masked_sum(x: Tensor, n: int, other: bool) -> Tensor:
    y = torch.empty(1, dtype=x.dtype)
    masked_kernel[(1,)](y, x, n, OTHER=other, BLOCK=x.numel())
    return y


def forgotten(dtype: torch.dtype, way: str) -> Tensor:
    """The last row is never stored."""
    x = torch.ones(4, 16).to(dtype)
    y = {
        "empty": lambda: torch.empty(4, 16, dtype=dtype),
        "empty_like": lambda: torch.empty_like(x),
        "new_empty": lambda: x.new_empty(4, 16),
        "empty_strided": lambda: torch.empty_strided((4, 16), (16, 1), dtype=dtype),
    }[way]()
    copy_kernel[(3,)](rows(y), rows(x), 16, 16, 16, BLOCK=16)
    return y


# ------------------------------------------------------------------------------------ races and order


@triton.jit
def scatter_kernel(y_ptr, x_ptr, stride, ADD: tl.constexpr, N: tl.constexpr):
    """Each program owns y[pid * stride:][:N]: they overlap where stride < N."""
    i = tl.program_id(0) * stride + tl.arange(0, N)
    x = tl.load(x_ptr + tl.program_id(0) * N + tl.arange(0, N))
    if ADD == "atomic" or (ADD == "mixed" and tl.program_id(0) > 0):
        tl.atomic_add(y_ptr + i, x)
    else:
        tl.store(y_ptr + i, x)


def scatter(x: Tensor, stride: int, add: str) -> Tensor:
    y = torch.zeros(x.numel())
    scatter_kernel[(len(x),)](y, x, stride, ADD=add, N=x.shape[1])
    return y


@triton.jit
def shift_kernel(y_ptr, N: tl.constexpr):
    """Reads what the next program writes."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(y_ptr + i + N) + 1)


def shift(programs: int) -> Tensor:
    y = torch.zeros(programs + 1, 16)
    shift_kernel[(programs,)](y, N=16)
    return y


@triton.jit
def duplicate_kernel(y_ptr, SAME: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i // 2, tl.where(i >= 0, 1, 1) if SAME else i)


def duplicates(same: bool) -> Tensor:
    y = torch.zeros(16, dtype=torch.int32)
    duplicate_kernel[(1,)](y, SAME=same, N=16)
    return y


@triton.jit
def last_kernel(y_ptr):
    tl.store(y_ptr, tl.program_id(0))


def last(programs: int) -> Tensor:
    y = torch.zeros(1, dtype=torch.int32)
    last_kernel[(programs,)](y)
    return y


@triton.jit
def visit_kernel(count_ptr, y_ptr, Y, Z):
    at = (tl.program_id(0) * Y + tl.program_id(1)) * Z + tl.program_id(2)
    tl.store(y_ptr + at, tl.atomic_add(count_ptr, 1))


def visits(grid: tuple[int, int, int]) -> Tensor:
    """When each program ran."""
    count, y = torch.zeros(1, dtype=torch.int32), torch.full(grid, -1, dtype=torch.int32)
    visit_kernel[grid](count, y, grid[1], grid[2])
    return y


# ------------------------------------------------------------------------------------ what CUDA refuses


@triton.jit
def multiply_kernel(y_ptr, x_ptr, factor, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i) * factor)


def multiply(x: Tensor, factor: int) -> Tensor:
    y = torch.empty_like(x)
    multiply_kernel[(1,)](y, x, factor, N=x.numel())
    return y


@triton.jit
def offset_kernel(y_ptr, x_ptr, row, stride, WIDE: tl.constexpr):
    if WIDE:
        row = tl.cast(row, tl.int64)
    tl.store(y_ptr, tl.load(x_ptr + row * stride))


def far_row(x: Tensor, row: int, stride: int, wide: bool) -> Tensor:
    y = torch.empty_like(x)
    offset_kernel[(1,)](y, x, row, stride, WIDE=wide)
    return y


@triton.jit(do_not_specialize=["free"])
def widen_kernel(y_ptr, special, free, WHICH: tl.constexpr):
    tl.store(y_ptr, special.to(tl.int64) if WHICH == "special" else free.to(tl.int64))


def widen(number: int, which: str) -> Tensor:
    y = torch.empty(1, dtype=torch.int64)
    widen_kernel[(1,)](y, number, number, WHICH=which)
    return y


@triton.jit
def random_kernel(y_ptr, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.rand(seed, i))


def random(seed: int, n: int) -> Tensor:
    y = torch.empty(n)
    random_kernel[(1,)](y, seed, N=n)
    return y


@triton.jit
def assert_kernel(x_ptr, N: tl.constexpr):
    tl.device_assert(tl.load(x_ptr + tl.arange(0, N)) > 0, "x must be positive")


def asserted(x: Tensor) -> None:
    assert_kernel[(1,)](x, N=x.numel())


def grid_of(*grid: Any) -> None:
    last_kernel[grid](torch.zeros(1, dtype=torch.int32))


@triton.jit
def unknown_kernel(x_ptr):
    tl.store(x_ptr, undefined_name)  # noqa: F821


def unknown() -> None:
    unknown_kernel[(1,)](torch.zeros(1))


# ------------------------------------------------------------------------------------ worker and threads


def write(x: Tensor) -> None:
    x.add_(1)


def write_(x: Tensor) -> None:
    x.add_(1)


def die() -> None:
    os._exit(3)


def process() -> int:
    return os.getpid()


class Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def unpicklable(raises: bool) -> Any:
    if raises:
        raise Unpicklable(1, 2)
    return lambda: None


def threaded(x: Tensor, threads: int) -> Tensor:
    """copy of x by each of several threads at the same time."""
    results: list[Any] = [None] * threads

    def work(at: int) -> None:
        for _ in range(3):
            results[at] = copy(x + at) - at
            time.sleep(0)

    workers = [threading.Thread(target=work, args=(at,)) for at in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return torch.stack(results)


# ------------------------------------------------------------------------------------------- attention


class Heads(NamedTuple):
    """A tensor (B, H, S, D) and its strides but the last, which is 1."""

    ptr: Any
    batch: Any
    head: Any
    row: Any


def heads(x: Tensor) -> Heads:
    return Heads(x, *x.stride()[:3])


@triton.jit
def tile_ptrs(x, b, h, offs, D: tl.constexpr):
    start = x.ptr + b.to(tl.int64) * x.batch + h.to(tl.int64) * x.head
    return start + offs[:, None].to(tl.int64) * x.row + tl.arange(0, D)[None, :]


@triton.jit
def attention_kernel(
    out, query, key, value, lse_ptr, Hq, GROUP, Sq, Sk, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(1) // Hq, tl.program_id(1) % Hq
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = offs_m < Sq
    q = tl.load(tile_ptrs(query, b, h, offs_m, D), mask=in_m[:, None], other=0.0)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    last = Sk
    if CAUSAL:
        last = tl.minimum(Sk, tl.program_id(0) * BLOCK_M + BLOCK_M + Sk - Sq)
    for start in range(0, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        in_n = offs_n < Sk
        k = tl.load(tile_ptrs(key, b, h // GROUP, offs_n, D), mask=in_n[:, None], other=0.0)
        v = tl.load(tile_ptrs(value, b, h // GROUP, offs_n, D), mask=in_n[:, None], other=0.0)
        keep = in_n[None, :]
        if CAUSAL:
            keep = keep & (offs_n[None, :] <= offs_m[:, None] + Sk - Sq)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
        scores = tl.where(keep, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.math.exp2(row_max - safe_max)
        p = tl.math.exp2(scores - safe_max[:, None])
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        row_max = new_max
    safe_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    o = acc / safe_sum[:, None]
    lse = tl.where(
        row_sum == 0.0, float("-inf"), (row_max + tl.math.log2(safe_sum)) * 0.6931471805599453
    )
    tl.store(tile_ptrs(out, b, h, offs_m, D), o.to(out.ptr.dtype.element_ty), mask=in_m[:, None])
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * Sq + offs_m, lse, mask=in_m)


def attention(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, block: int
) -> tuple[Tensor, Tensor]:
    B, Hq, Sq, D = query.shape
    Hkv, Sk = key.shape[1:3]
    out = torch.empty(B, Hq, Sq, D, dtype=query.dtype)
    lse = torch.empty(B, Hq, Sq)
    grid = (triton.cdiv(Sq, block), B * Hq)
    attention_kernel[grid](
        heads(out), heads(query), heads(key), heads(value), lse, Hq, Hq // Hkv, Sq, Sk, D**-0.5,
        CAUSAL=causal, D=D, BLOCK_M=block, BLOCK_N=block,
    )  # fmt: skip
    return out, lse


def mutant(path: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    """attention of a file like this one."""
    spec = importlib.util.spec_from_file_location("mutant", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.attention(*arguments)
