"""Triton's interpreter with what it lacks: exact bf16 and fp8, and a check of everything a kernel touches.

The builder computes in fp32 and rounds once, follows every pointer back to the argument that it came
from, fills lanes that a GPU leaves undefined with poison, and finds overflows, programs that race and
launches that CUDA would refuse. It also runs several times faster than the stock one.

It cannot see races through shared memory inside a program, layouts, asynchronous copies, the order in
which tensor cores accumulate, flushed subnormals, or that exp2 and division are approximate on a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import os
import threading
import traceback
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as stock
from torch import Tensor
from triton._utils import validate_block_shape
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import TensorHandle as Handle
from triton.tools.tensor_descriptor import TensorDescriptor

from . import Options

Array = np.ndarray[Any, Any]


class OutOfBounds(IndexError):
    """An access outside the view that was passed to the kernel, or through another argument's pointer."""


class Overflow(OverflowError):
    """A signed integer left its type. Unsigned ones wrap, as Philox wants them to."""


class DeviceAssert(AssertionError):
    """A tl.device_assert or tl.assume that does not hold."""


class Race(RuntimeError):
    """Two programs touch the same memory and one of them writes, or one store has two values for it."""


_options: Options | None = None
_calling = threading.RLock()
_launching = threading.RLock()


@contextlib.contextmanager
def hardened(options: Options) -> Iterator[None]:
    """Inside the block kernels run under these options, and torch.empty gives NaN or the largest integer."""
    global _options
    with _calling, poisoned_allocations():
        install()
        before, _options = _options, options
        try:
            yield
        finally:
            _options = before


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


@functools.cache
def install() -> None:
    """Once a process, which from then on interprets with the classes above."""
    builder = stock.interpreter_builder
    builder.__class__ = stock.InterpreterBuilder = Builder
    builder.options = stock.InterpreterOptions(debug=True, sanitize_overflow=False)
    builder.codegen_fns["min_dot_size"] = min_dot_size
    stock.interpreter_semantic.__class__ = stock.TritonSemantic = Semantic
    stock.ReduceOps, stock.ScanOps, stock.GridExecutor = Reduce, Scan, Executor
    stock.InterpretedFunction.run, stock.InterpretedFunction.__call__ = launch_kernel, call_helper
    stock._get_np_dtype = np_dtype
    tl.block_type.__init__, tl.tensor.__init__, tl.dtype.__eq__ = type_init, tensor_init, type_eq
    for holder in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        for name, member in inspect.getmembers(holder, tl.core.is_builtin):
            bind(holder, name, member)
    stock._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    tl.tensor.T = property(lambda self: stock.interpreter_semantic.permute(self, (1, 0)))


def min_dot_size(lhs: Any, rhs: Any) -> tuple[int, int, int]:
    """M, N, K that tensor cores multiply without padding."""
    return 16, 16, 32 if lhs.scalar.primitive_bitwidth == 8 else 16


# ------------------------------------------------------------------------- bf16 and fp8, kept as bits

LOW = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
ON_BITS = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}


@functools.cache
def fp8_table(name: str) -> Array:
    return torch.arange(256, dtype=torch.uint8).view(LOW[name]).float().numpy()


def decode(handle: Handle) -> Array:
    """The handle's numbers: fp32 where it keeps bf16 or fp8, its own data otherwise."""
    name = handle.dtype.scalar.name
    if name == "bf16":
        return (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return fp8_table(name)[handle.data] if name in LOW else handle.data


def encode(values: Array, dtype: tl.dtype) -> Array:
    """Rounded to nearest even. What fp8 cannot hold saturates, as cvt.rn.satfinite does."""
    to = LOW[dtype.name]
    x = torch.from_numpy(np.array(values, np.float32, order="C"))
    if dtype.name == "bf16":
        return x.to(to).view(torch.int16).numpy().view(np.uint16)
    limit = torch.finfo(to).max
    return x.clamp_(-limit, limit).to(to).view(torch.uint8).numpy()


def extremes(x: Array) -> tuple[int, int]:
    return (x.item(), x.item()) if x.size == 1 else (int(x.min()), int(x.max()))


def rounded(values: Array, dtype: tl.dtype) -> Handle:
    """A handle of this dtype from what was computed in a wider one."""
    if dtype.name in LOW:
        return Handle(encode(values, dtype), dtype)
    return Handle(values.astype(np_dtype(dtype), copy=False), dtype)


TF32 = stock._ir.INPUT_PRECISION.TF32


def to_tf32(x: Array) -> Array:
    """To 10 bits of mantissa, halves away from zero, as cvt.rna.tf32 rounds."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return np.where(np.isfinite(x), (bits + 0x1000) & 0xFFFFE000, bits).view(np.float32)


def fused(x: Array, y: Array, z: Array) -> Array:
    """x·y + z of numbers of at most 24 bits, in fp64 and rounded to odd, so that rounding again is exact."""
    product, z = np.multiply(x, y, dtype=np.float64), z.astype(np.float64)
    total = product + z
    bump = total - product
    lost = (product - (total - bump)) + (z - bump)
    inexact = np.isfinite(total) & (lost != 0) & (total.view(np.int64) & 1 == 0)
    return np.where(inexact, np.nextafter(total, np.copysign(np.inf, lost)), total)


# --------------------------------------------------------------------------------------------- poison

POISON = {"bf16": 0x7FDA, "fp16": 0x7F5A, "fp32": 0x7FDA5A5A, "fp64": 0x7FFB4B4B4B4B4B4B}
POISON |= {"fp8e4nv": 0x7F, "fp8e5": 0x7F}  # the only NaN, or a NaN like any other


@functools.cache
def poison(dtype: tl.dtype) -> Array:
    """What a lane of a load holds that no mask lets through: a NaN that is told from others, or 0x5a5a…"""
    kind = np_dtype(dtype)
    bits = np.array(POISON.get(dtype.name, 0x5A5A5A5A5A5A5A5A) & (1 << 8 * kind.itemsize) - 1)
    return bits.astype(f"u{kind.itemsize}").view(kind)


def poisoned_like(x: Array) -> Array:
    return poison({2: tl.float16, 4: tl.float32, 8: tl.float64}[x.itemsize])


def is_poison(x: Array) -> Array:
    """NaNs with a payload. Arithmetic passes it on, and 0/0 or inf - inf make one without."""
    payload = {2: 0x1FF, 4: 0x3FFFFF, 8: (1 << 51) - 1}[x.itemsize]
    bits = np.ascontiguousarray(x).view(f"u{x.itemsize}")
    return np.isnan(x) & (bits & np.array(payload, bits.dtype) != 0)


def ignoring_nan(op: np.ufunc, ignoring: np.ufunc) -> Callable[[Array, Array], Array]:
    """Triton's max and min pass over NaN: so does this, except over poison, which would hide a bug."""

    def number_op(x: Array, y: Array) -> Array:
        result = op(x, y)
        if result.dtype.kind != "f" or not np.isnan(result).any():
            return result
        return np.where(is_poison(x) | is_poison(y), poisoned_like(result), ignoring(x, y))

    return number_op


def reduce_ignoring_nan(op: np.ufunc, ignoring: np.ufunc) -> Callable[..., Array]:
    """The same along an axis."""

    def number_reduce(x: Array, **how: Any) -> Array:
        result = np.asarray(op.reduce(x, **how))
        if result.dtype.kind != "f" or not np.isnan(result).any():
            return result
        bad = np.any(is_poison(x), **how)
        return np.where(bad, poisoned_like(result), ignoring.reduce(x, **how))

    return number_reduce


# ------------------------------------------------------------------------------------------ arguments


@dataclasses.dataclass(frozen=True, eq=False)
class Argument:
    """A tensor of the launch and the bytes that its view spans, from first to last element."""

    name: str
    tensor: Tensor
    itemsize: int
    start: int
    end: int

    def holds(self, first: int, last: int, size: int) -> bool:
        return self.start <= first and last + size <= self.end

    def elements(self) -> int:
        return (self.end - self.start) // self.itemsize

    def element(self, address: int) -> int:
        return (address - self.start) // self.itemsize

    def __str__(self) -> str:
        strides = "" if self.tensor.is_contiguous() else f", strides {tuple(self.tensor.stride())}"
        return f"{self.name} {tuple(self.tensor.shape)}{strides}"


def argument(name: str, tensor: Any) -> Argument:
    tensor = stock._unwrap_tensor(tensor)
    span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start, size = tensor.data_ptr(), tensor.element_size()
    return Argument(name, tensor, size, start, start + (span * size if tensor.numel() else 0))


def convert(value: Any, name: str, into: list[Argument], specialize: bool) -> Any:
    """What the kernel sees of a launch's argument. Pointers carry the Argument that they belong to."""
    if isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        parts = [
            convert(x, f"{name}.{i}", into, specialize) for i, x in zip(names, value, strict=True)
        ]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, float):
        return tl.tensor(Handle(np.array([value], np.float32), tl.float32), tl.float32)
    if isinstance(value, int) and not isinstance(value, bool) and value == 1 and specialize:
        return 1  # as it is for the compiler, to which 1.to(tl.int64) is an error
    converted = stock._implicit_cvt(value)
    if isinstance(value, TensorDescriptor):
        into.append(argument(f"{name}.base", value.base))
        converted.handle.base.attr["within"] = (into[-1],)
    elif hasattr(value, "data_ptr"):
        into.append(argument(name, value))
        converted.handle.attr["within"] = (into[-1],)
    return converted


def within(handles: Sequence[Any]) -> tuple[Argument, ...]:
    """The arguments that these handles point into."""
    found: tuple[Argument, ...] = ()
    for handle in handles:
        if isinstance(handle, Handle) and handle.attr:
            found += tuple(x for x in handle.attr.get("within", ()) if x not in found)
    return found


def passing_on(name: str) -> Callable[..., Any]:
    """The stock builder's method, whose results point into what its operands point into."""
    method = getattr(stock.InterpreterBuilder, name)

    @functools.wraps(method)
    def wrapper(self: Builder, *operands: Any) -> Any:
        result = method(self, *operands)
        if found := within(operands):
            for handle in result if isinstance(result, tuple) else (result,):
                handle.attr["within"] = found
        return result

    return wrapper


# ---------------------------------------------------------------------------------------- the builder


class Descriptor(stock.TensorDescHandle):
    def materialize_pointers(self, *how: Any) -> Any:
        pointers, mask = super().materialize_pointers(*how)
        pointers.attr.update(self.base.attr)
        return pointers, mask


class Builder(stock.InterpreterBuilder):
    """Executes the operations of a kernel. launch is the Launch it is running, None outside of one."""

    launch: Launch | None = None

    # casts and arithmetic

    def cast_impl(self, src: Handle, dst_type: Any) -> Handle:
        if src.dtype.scalar.name in LOW or dst_type.scalar.name in LOW:
            return rounded(decode(src), dst_type.scalar)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Handle, dst_type: Any, rounding_mode: Any) -> Handle:
        if rounding_mode == stock._ir.ROUNDING_MODE.RTZ:
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        return self.cast_impl(src, dst_type)

    def binary_op(self, lhs: Handle, rhs: Handle, op: Callable[..., Array]) -> Handle:
        dtype = lhs.dtype.scalar
        if dtype.name not in LOW or op in ON_BITS:
            return super().binary_op(lhs, rhs, op)
        result = op(decode(lhs), decode(rhs))
        return Handle(result, tl.int1) if op in COMPARISONS else rounded(result, dtype)

    def unary_op(self, arg: Handle, op: Callable[..., Array]) -> Handle:
        if arg.dtype.scalar.name in LOW:
            return rounded(op(decode(arg)), arg.dtype.scalar)
        return super().unary_op(arg, op)

    def create_clampf(self, arg: Handle, lo: Handle, hi: Handle, propagate_nans: Any) -> Handle:
        if arg.dtype.scalar.name not in LOW:
            return super().create_clampf(arg, lo, hi, propagate_nans)
        wide = [Handle(decode(x), tl.float32) for x in (arg, lo, hi)]
        return rounded(super().create_clampf(*wide, propagate_nans).data, arg.dtype.scalar)

    def create_fma(self, x: Handle, y: Handle, z: Handle) -> Handle:
        if z.dtype.scalar == tl.float64:
            return super().create_fma(x, y, z)
        return rounded(fused(decode(x), decode(y), decode(z)), z.dtype.scalar)

    def create_maxnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, ignoring_nan(np.maximum, np.fmax))

    def create_minnumf(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.binary_op(lhs, rhs, ignoring_nan(np.minimum, np.fmin))

    def create_dot(
        self, a: Handle, b: Handle, d: Handle, input_precision: Any, *rest: Any
    ) -> Handle:
        if not d.dtype.scalar.is_floating() or a.dtype.scalar == tl.float64:
            return super().create_dot(a, b, d, input_precision, *rest)
        x, y = (decode(side).astype(np.float32, copy=False) for side in (a, b))
        as_tf32 = self.launch is not None and self.launch.options.tf32
        if as_tf32 and a.dtype.scalar == tl.float32 and input_precision == TF32:
            x, y = to_tf32(x), to_tf32(y)
        return rounded(np.matmul(x, y) + decode(d), d.dtype.scalar)

    # integers

    def create_add(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.exact(np.add, lhs, rhs, super().create_add(lhs, rhs))

    def create_sub(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.exact(np.subtract, lhs, rhs, super().create_sub(lhs, rhs))

    def create_mul(self, lhs: Handle, rhs: Handle) -> Handle:
        return self.exact(np.multiply, lhs, rhs, super().create_mul(lhs, rhs))

    def exact(self, op: np.ufunc, lhs: Handle, rhs: Handle, result: Handle) -> Handle:
        """result, where it is what op gives of integers without end."""
        x, y, z = lhs.data, rhs.data, result.data
        if z.dtype.kind != "i" or not self.launch or self.cannot_overflow(op, x, y, z.dtype):
            return result
        wrong = op(x.astype(object), y.astype(object)) != z
        defined = (x != poison(lhs.dtype.scalar)) & (y != poison(rhs.dtype.scalar))
        if (wrong & defined).any():
            a, b = (np.broadcast_to(side, z.shape)[wrong & defined][0] for side in (x, y))
            raise Overflow(f"{self.launch}: {z.dtype} overflows in {op.__name__} of {a} and {b}")
        return result

    @staticmethod
    def cannot_overflow(op: np.ufunc, x: Array, y: Array, dtype: Any) -> bool:
        """By the extremes of x and y alone."""
        (a, b), (c, d) = extremes(x), extremes(y)
        if op is np.add:
            low, high = a + c, b + d
        elif op is np.subtract:
            low, high = a - d, b - c
        else:
            corners = (a * c, a * d, b * c, b * d)
            low, high = min(corners), max(corners)
        limits = np.iinfo(dtype)
        return bool(limits.min <= low and high <= limits.max)

    def create_assert(self, condition: Any, message: str) -> None:
        if not condition:
            raise DeviceAssert(f"{self.launch}: {message}")

    def create_assume(self, condition: Any) -> None:
        self.create_assert(condition, "tl.assume does not hold")

    def create_erf(self, arg: Handle) -> Handle:
        wide = torch.from_numpy(np.array(arg.data, np.float64)).erf_().numpy()
        return rounded(wide, arg.dtype.scalar)

    # pointers

    create_splat = passing_on("create_splat")
    create_unsplat = passing_on("create_unsplat")
    create_broadcast = passing_on("create_broadcast")
    create_expand_dims = passing_on("create_expand_dims")
    create_reshape = passing_on("create_reshape")
    create_trans = passing_on("create_trans")
    create_join = passing_on("create_join")
    create_split = passing_on("create_split")
    create_cat = passing_on("create_cat")
    create_gather = passing_on("create_gather")
    create_select = passing_on("create_select")
    create_bitcast = passing_on("create_bitcast")
    create_addptr = passing_on("create_addptr")

    # memory

    def create_masked_load(
        self, ptrs: Handle, mask: Any, other: Handle | None, *how: Any, **named: Any
    ) -> Handle:
        live = np.asarray(mask.data)
        volatile = how[-1] if how else named["is_volatile"]
        self.check("atomic" if volatile else "load", ptrs, live)
        dtype = ptrs.get_element_ty()
        fill = np.full(ptrs.data.shape, poison(dtype)) if other is None else other.data
        kind = np_dtype(dtype)
        return Handle(stock._interpreter.load(ptrs.data, live, fill, kind), dtype)

    def create_masked_store(self, ptrs: Handle, value: Handle, mask: Any, *how: Any) -> None:
        live = np.asarray(mask.data)
        self.check("store", ptrs, live, value.data)
        stock._interpreter.store(ptrs.data, value.data, live)

    def create_atomic_rmw(self, op: Any, ptr: Handle, val: Handle, mask: Any, *how: Any) -> Handle:
        self.check("atomic", ptr, np.asarray(mask.data))
        return super().create_atomic_rmw(op, ptr, val, mask, *how)

    def create_atomic_cas(self, ptr: Handle, *how: Any) -> Handle:
        self.check("atomic", ptr, np.ones(ptr.data.shape, bool))
        return super().create_atomic_cas(ptr, *how)

    def create_make_tensor_descriptor(self, *parts: Any) -> Any:
        descriptor = super().create_make_tensor_descriptor(*parts)
        descriptor.__class__ = Descriptor
        return descriptor

    def create_descriptor_load(self, desc: Any, indices: list[Handle], *how: Any) -> Handle:
        result = super().create_descriptor_load(desc, indices, *how)
        if desc.padding != stock._ir.PADDING_OPTION.PAD_NAN or result.dtype.name not in LOW:
            return result
        _, mask = desc.materialize_pointers(indices)
        return Handle(np.where(mask.data, result.data, poison(result.dtype)), result.dtype)

    def check(self, kind: str, ptrs: Handle, live: Array, values: Array | None = None) -> None:
        """Raises if a live lane points anywhere but into the argument that its pointer came from."""
        if self.launch is None:
            return
        addresses = ptrs.data if live.all() else ptrs.data[live]
        if not addresses.size:
            return
        size = np_dtype(ptrs.get_element_ty()).itemsize
        owners = ptrs.attr.get("within") or tuple(self.launch.arguments)
        first, last = int(addresses.min()), int(addresses.max())
        if not any(owner.holds(first, last, size) for owner in owners):
            self.launch.check_each(kind, addresses, size, owners)
        if self.launch.log is not None:
            self.launch.log.add(kind, addresses, size, values, live)


# --------------------------------------------------------------------------------- reductions and scans


class OfLow:
    """bf16 and fp8 are reduced in fp32 and rounded once."""

    def apply_impl(self, inputs: tuple[Any, ...]) -> Any:
        if not any(x.dtype.name in LOW for x in inputs):
            return super().apply_impl(inputs)  # type: ignore[misc]
        wide = tuple(
            block(decode(x.handle), tl.float32) if x.dtype.name in LOW else x for x in inputs
        )
        results = super().apply_impl(wide)  # type: ignore[misc]
        results = results if isinstance(results, (tuple, list)) else (results,)
        return [self.narrow(r, x.dtype) for r, x in zip(results, inputs, strict=False)]

    def narrow(self, result: tl.tensor, dtype: tl.dtype) -> tl.tensor:
        if dtype.name not in LOW:
            return result
        kind = dtype if not result.type.is_block() else tl.block_type(dtype, result.type.shape)
        return tl.tensor(rounded(result.handle.data, dtype), kind)


def block(data: Array, dtype: tl.dtype) -> tl.tensor:
    return tl.tensor(Handle(data, dtype), tl.block_type(dtype, list(data.shape)))


class Reduce(OfLow, stock.ReduceOps):
    def min_max(self, inputs: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        if idx_reduce_op is None:
            largest = self.combine_fn is tl.standard._elementwise_max
            whole, numbers = (np.maximum, np.fmax) if largest else (np.minimum, np.fmin)
            val_reduce_op = reduce_ignoring_nan(whole, numbers)
        return super().min_max(inputs, val_reduce_op, idx_reduce_op)

    def generic_reduce(self, inputs: tuple[tl.tensor, ...]) -> list[tl.tensor]:
        """Halves the axis until one is left: log2 of it calls of combine_fn, on whole slices."""
        parts = [
            x.handle.data if self.axis is not None else x.handle.data.reshape(-1) for x in inputs
        ]
        axis = self.axis or 0
        parts = [np.moveaxis(p, axis, -1) for p in parts]
        while parts[0].shape[-1] > 1:
            even, odd = ([p[..., i::2] for p in parts] for i in (0, 1))
            parts = combined(self.combine_fn, inputs, even, odd)
        if self.axis is None:
            last = [p.reshape((1,) * len(inputs[0].shape) if self.keep_dims else ()) for p in parts]
        else:
            last = [np.moveaxis(p, -1, axis) if self.keep_dims else p[..., 0] for p in parts]
        return [self.to_tensor(p, x.dtype) for p, x in zip(last, inputs, strict=True)]


class Scan(OfLow, stock.ScanOps):
    def generic_scan(self, inputs: tuple[tl.tensor, ...]) -> list[tl.tensor]:
        """One call of combine_fn a step along the axis."""
        parts = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
        steps = [[p[:1] for p in parts]]
        for i in range(1, len(parts[0])):
            steps.append(
                combined(self.combine_fn, inputs, steps[-1], [p[i : i + 1] for p in parts])
            )
        joined = [np.concatenate(column) for column in zip(*steps, strict=True)]
        return [
            self.to_tensor(np.moveaxis(p, 0, self.axis), x.dtype)
            for p, x in zip(joined, inputs, strict=True)
        ]


def combined(
    combine_fn: Any, inputs: tuple[tl.tensor, ...], left: list[Array], right: list[Array]
) -> list[Array]:
    """combine_fn of two lists of arrays, each in the dtype of its input."""
    sides = [block(p, x.dtype) for side in (left, right) for p, x in zip(side, inputs, strict=True)]
    results = combine_fn(*sides)
    results = results if isinstance(results, tuple) else (results,)
    semantic = stock.interpreter_semantic
    return [
        np.broadcast_to(semantic.cast(semantic.to_tensor(r), x.dtype).handle.data, p.shape)
        for r, x, p in zip(results, inputs, left, strict=True)
    ]


# ------------------------------------------------------------------------------------------- launching


class Launch:
    """One launch: its name and options, its tensors, the program that runs, the log of its accesses."""

    def __init__(self, kernel: str, options: Options) -> None:
        self.kernel, self.options = kernel, options
        self.arguments: list[Argument] = []
        self.program = (0, 0, 0)
        self.log = Log(self) if options.races else None

    def __str__(self) -> str:
        return f"{self.kernel}, program {self.program}"

    def check_each(
        self, kind: str, addresses: Array, size: int, owners: Sequence[Argument]
    ) -> None:
        """Lane by lane: a pointer chosen by tl.where may point into either side."""
        good = np.zeros(addresses.shape, bool)
        for x in owners:
            good |= (addresses >= x.start) & (addresses < x.end) & (addresses + size <= x.end)
        if not good.all():
            where = self.explain(int(addresses[~good][0]), owners)
            lanes = f"{np.count_nonzero(~good)} of {good.size} lanes"
            raise OutOfBounds(f"{self}: {kind} outside {where[0]}: {lanes}, the first {where[1]}")

    def explain(self, address: int, owners: Sequence[Argument]) -> tuple[str, str]:
        """What the address should have been in, and where it is."""
        inside = [f", inside {x.name}" for x in self.arguments if x.holds(address, address, 1)]
        if len(owners) > 1 or not owners:
            return " and ".join(
                map(str, owners)
            ) or "any argument", f"at {address:#x}{''.join(inside)}"
        own = f"of 0 to {owners[0].elements() - 1}" if owners[0].elements() else "of none"
        return str(owners[0]), f"at element {owners[0].element(address)}, {own}{''.join(inside)}"


class Log:
    """Every access of a launch, to be searched for conflicts when it is over."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.entries: list[tuple[str, int, Array, int]] = []
        self.programs: dict[tuple[int, int, int], int] = {}

    def add(
        self, kind: str, addresses: Array, size: int, values: Array | None, live: Array
    ) -> None:
        addresses = np.array(addresses).reshape(-1)
        if values is not None:
            self.check_duplicates(addresses, np.broadcast_to(values, live.shape)[live])
        program = self.programs.setdefault(self.launch.program, len(self.programs))
        self.entries.append((kind, program, addresses, size))

    def check_duplicates(self, addresses: Array, values: Array) -> None:
        order = np.argsort(addresses, kind="stable")
        bits = np.ascontiguousarray(values).view(f"u{values.itemsize}")[order]
        if ((np.diff(addresses[order]) == 0) & (np.diff(bits) != 0)).any():
            raise Race(f"{self.launch}: one store has two values for the same address")

    def search(self) -> None:
        """Sorts all that was touched by address. Each stretch of one address is then judged at once."""
        if not self.entries:
            return
        addresses, kinds, programs = self.touched()
        order = np.lexsort((kinds, addresses))
        addresses, kinds, programs = addresses[order], kinds[order], programs[order]
        starts = np.flatnonzero(np.diff(addresses, prepend=addresses[0] - np.uint64(1)))
        several = np.minimum.reduceat(programs, starts) != np.maximum.reduceat(programs, starts)
        last, first = (op.reduceat(kinds, starts) for op in (np.maximum, np.minimum))
        conflicts = several & ((first != last) | (first == KINDS.index("store")))
        if conflicts.any():
            at = starts[np.argmax(conflicts)]
            stretch = addresses == addresses[at]
            self.report(int(addresses[at]), kinds[stretch], programs[stretch], int(conflicts.sum()))

    def touched(self) -> tuple[Array, Array, Array]:
        """Address, kind and program of every access, in pieces as small as the smallest one."""
        piece = min(size for *_, size in self.entries)
        columns: list[list[Array]] = [[], [], []]
        for kind, program, addresses, size in self.entries:
            pieces = (addresses[:, None] + np.arange(0, size, piece, dtype=np.uint64)).reshape(-1)
            columns[0].append(pieces)
            columns[1].append(np.full(pieces.shape, KINDS.index(kind)))
            columns[2].append(np.full(pieces.shape, program))
        return np.concatenate(columns[0]), np.concatenate(columns[1]), np.concatenate(columns[2])

    def report(self, address: int, kinds: Array, programs: Array, count: int) -> None:
        ids = list(self.programs)
        other = np.flatnonzero(programs != programs[0])[0]
        what = [f"{KINDS[kinds[i]]} by program {ids[programs[i]]}" for i in (0, other)]
        owner = next(x for x in self.launch.arguments if x.holds(address, address, 1))
        raise Race(
            f"{self.launch.kernel}: {what[0]} and {what[1]} of element {owner.element(address)} "
            f"of {owner}, in no order; {count} addresses in all"
        )


KINDS = ("store", "load", "atomic")  # a volatile load is an atomic one: it polls
GRID_LIMITS = (2**31 - 1, 65535, 65535)


class Executor(stock.GridExecutor):
    """Runs a launch's programs one after the other, on the caller's own tensors."""

    generic: Collection[str | int] = ()  # parameters that the compiler does not specialize

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if _options is None:
            return super().__call__(*args, **kwargs)
        signature = parameters(self.fn)
        known = {k: v for k, v in kwargs.items() if k in signature.parameters}
        bound = signature.bind(*args, **known)
        bound.apply_defaults()
        for hook in self.pre_run_hooks:
            hook(*args, **known)
        grid = checked_grid(self.fn.__name__, self.grid, bound.arguments)
        launch = Launch(self.fn.__name__, _options)
        with _launching, np.errstate(all="ignore"):
            self.run(launch, grid, bound.arguments)
            if launch.log is not None:
                launch.log.search()

    def run(self, launch: Launch, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        builder = stock.interpreter_builder
        builder.set_grid_dim(*grid)
        builder.launch = launch
        try:
            values = self.converted(launch, arguments)
            for program in programs(grid, launch.options.order):
                launch.program = program
                builder.set_grid_idx(*program)
                self.fn(**values)
        except (OutOfBounds, Overflow, Race, DeviceAssert) as error:
            error.args = (f"{error}{place(error)}",)
            raise
        except Exception as error:
            message = f"{launch}: {type(error).__name__}: {error}{place(error)}"
            raise stock.InterpreterError(message) from error
        finally:
            builder.launch = None

    def converted(self, launch: Launch, arguments: dict[str, Any]) -> dict[str, Any]:
        values = dict(arguments)
        for at, (name, x) in enumerate(arguments.items()):
            if name not in self.constexprs:
                generic = name in self.generic or at in self.generic
                values[name] = convert(x, name, launch.arguments, not generic)
        return values


NOT_KERNELS = (__file__, *(os.path.dirname(str(x.__file__)) for x in (triton, np)))


def place(error: Exception) -> str:
    """The line of a kernel, or of a helper that it calls, that raised error."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(NOT_KERNELS):
            return f", at {frame.filename}:{frame.lineno}"
    return ""


@functools.cache
def parameters(fn: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(fn)


def checked_grid(kernel: str, grid: Any, arguments: dict[str, Any]) -> tuple[int, int, int]:
    sizes = tuple(grid(arguments)) if callable(grid) else tuple(grid)
    if not 1 <= len(sizes) <= 3 or not all(isinstance(n, int) for n in sizes):
        raise ValueError(f"{kernel}: a grid is one to three integers, not {sizes}")
    sizes += (1,) * (3 - len(sizes))
    if any(not 0 <= n <= limit for n, limit in zip(sizes, GRID_LIMITS, strict=True)):
        raise ValueError(f"{kernel}: grid {sizes} is over CUDA's limits {GRID_LIMITS}")
    return sizes


def programs(grid: tuple[int, int, int], order: str | int) -> Iterator[tuple[int, int, int]]:
    ids: Any = range(grid[0] * grid[1] * grid[2])
    if order == "reverse":
        ids = reversed(ids)
    elif order != "forward":
        ids = np.random.default_rng(int(order)).permutation(len(ids)).tolist()
    for i in ids:
        yield i // (grid[1] * grid[2]), i // grid[2] % grid[1], i % grid[2]


def launch_kernel(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """kernel[grid](...)."""
    if warmup:
        return
    executor = Executor(self.rewrite(), self.arg_names, grid, self.pre_run_hooks)
    executor.generic = self.kwargs.get("do_not_specialize") or ()
    executor(*args, **kwargs)


def call_helper(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A @triton.jit function called by another: nothing to patch and no error to wrap."""
    return self.rewrite()(*args, **kwargs)


# ---------------------------------------------------------------------------------------------- speed
# Most of an interpreted operation is Triton's own bookkeeping of types, done once here and kept.


NP_DTYPES: dict[str, np.dtype[Any]] = {}


def np_dtype(dtype: tl.dtype, find: Callable[..., Any] = stock._get_np_dtype) -> np.dtype[Any]:
    """What the interpreter keeps this dtype in, looked up once: bf16 as uint16, pointers as uint64."""
    scalar = dtype.scalar
    if scalar.name not in NP_DTYPES:
        NP_DTYPES[scalar.name] = find(scalar)
    return NP_DTYPES[scalar.name]


class Semantic(TritonSemantic):
    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> Any:
        if lhs.shape is rhs.shape:
            return lhs, rhs
        sizes = common_shape(sizes_of(lhs.type), sizes_of(rhs.type))
        return self.stretched(lhs, sizes), self.stretched(rhs, sizes)

    def stretched(self, x: Any, sizes: tuple[int, ...]) -> Any:
        if sizes_of(x.type) == sizes:
            return x
        kind = tl.block_type(x.dtype, sizes)
        return tl.tensor(self.builder.create_broadcast(x.handle, sizes), kind)


def sizes_of(kind: Any) -> tuple[int, ...]:
    return kind.sizes if kind.is_block() else ()


@functools.cache
def common_shape(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    return np.broadcast_shapes(left, right)


@functools.cache
def block_shape(sizes: tuple[int, ...]) -> tuple[Any, int, str]:
    return tl.core.tuple(sizes), validate_block_shape(sizes), str(sizes)


@functools.cache
def tensor_shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    return tl.core.tuple([tl.constexpr(n) for n in sizes]), tl.constexpr(math.prod(sizes))


def type_init(self: Any, element_ty: tl.dtype, shape: Any) -> None:
    """tl.block_type.__init__, which makes a shape once."""
    sizes = tuple([n if isinstance(n, int) else tl.core._unwrap_if_constexpr(n) for n in shape])
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.element_ty, self.sizes = element_ty, sizes
    self.shape, self.numel, text = block_shape(sizes)
    self.name = f"<{text}, {element_ty.name}>"


def tensor_init(self: Any, handle: Handle, type: Any) -> None:
    """tl.tensor.__init__, which makes a shape once."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = tensor_shape(sizes_of(type))


def type_eq(self: Any, other: Any, eq: Callable[[Any, Any], bool] = tl.dtype.__eq__) -> bool:
    return self is other or eq(self, other)


BUILTIN = tl.core.builtin(lambda: None).__code__


def bind(holder: Any, name: str, member: Any) -> None:
    """Has a builtin find the interpreter's semantic as a default, instead of through two wrappers."""
    inner = getattr(member, "__wrapped__", None)
    if member.__code__ is not BUILTIN or inner is None:
        return
    code, defaults = inner.__code__, inner.__defaults__ or ()
    positional = code.co_varnames[: code.co_argcount]
    if "_semantic" in (inner.__kwdefaults__ or {}):
        inner.__kwdefaults__["_semantic"] = stock.interpreter_semantic
    elif "_semantic" in positional:
        at = positional.index("_semantic") - len(positional)
        inner.__defaults__ = (
            *defaults[:at],
            stock.interpreter_semantic,
            *defaults[len(defaults) + at + 1 :],
        )
    else:
        return
    setattr(holder, name, inner)
