"""What the interpreter adds to Triton's: exact low precision, and every seeded bug is found and explained."""

from __future__ import annotations

import os
import pickle
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import InterpreterError

from fastattn import emulate
from fastattn.emulate.interpreter import DeviceAssert, OutOfBounds, Overflow, Race, fused

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LOW = (torch.bfloat16, *FP8)


def call(name: str, *arguments: Any) -> Any:
    return emulate.call(f"tests.emulate.kernels:{name}", *arguments)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for what NaN looks like."""
    assert a.dtype == b.dtype and a.shape == b.shape
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    both = a.float().isnan() & b.float().isnan()
    return bool((both | (a.view(bits) == b.view(bits))).all())


def hard_numbers(n: int, seed: int = 0) -> Tensor:
    """fp32 of every exponent, halfway cases of bf16, infinities, NaN, both zeros, subnormals."""
    torch.manual_seed(seed)
    any_bits = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int64).to(torch.int32)
    halfway = (any_bits & ~0xFFFF) | 0x8000
    usual = torch.randn(n)
    inf = float("inf")
    special = torch.tensor(
        [0.0, -0.0, inf, -inf, float("nan"), 1e-45, -1e-40, 65519.0, 65520.0, 448.0, 464.0, 465.0]
    )
    x = torch.cat(
        [any_bits.view(torch.float32), halfway.view(torch.float32), usual, special.repeat(n // 12)]
    )
    return x[torch.randperm(len(x))[:n]]


# --------------------------------------------------------------------------------- low precision


@pytest.mark.parametrize("dtype", (torch.float16, *LOW))
def test_fp32_is_cast_to_nearest_even(dtype: torch.dtype) -> None:
    x = hard_numbers(4096)
    clamped = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max) if dtype in FP8 else x
    assert same(call("elementwise", "cast", x, x, dtype), clamped.to(dtype))


@pytest.mark.parametrize("dtype", (torch.float16, *LOW))
def test_every_number_is_cast_to_fp32_exactly(dtype: torch.dtype) -> None:
    bits = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int32)
    x = bits.to(torch.uint8).view(dtype) if dtype in FP8 else bits.to(torch.int16).view(dtype)
    assert same(call("elementwise", "cast", x, x, torch.float32), x.float())


@pytest.mark.parametrize("source", (torch.float16, torch.bfloat16, torch.float8_e5m2))
@pytest.mark.parametrize("to", (torch.float16, torch.bfloat16, torch.float8_e4m3fn))
def test_low_precision_is_cast_to_low_precision(source: torch.dtype, to: torch.dtype) -> None:
    x = hard_numbers(1024).clamp(-400, 400).to(source)
    assert same(call("elementwise", "cast", x, x, to), x.to(to))


@pytest.mark.parametrize(
    "op", ("add", "sub", "mul", "maximum", "minimum", "where", "neg", "abs", "sum of three")
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_an_operation_rounds_once(op: str, dtype: torch.dtype) -> None:
    x, y = (hard_numbers(2048, seed).to(dtype) for seed in (1, 2))
    if op in ("maximum", "minimum", "where"):
        x, y = (
            torch.where(t == 0, 1, t.nan_to_num()) for t in (x, y)
        )  # not of which zero is larger
    if op == "neg":
        x = torch.where(x == 0, 1, x)  # Triton computes 0 - x
    expected = {
        "add": lambda: x + y,
        "sub": lambda: x - y,
        "mul": lambda: x * y,
        "maximum": lambda: torch.maximum(x, y),
        "minimum": lambda: torch.minimum(x, y),
        "where": lambda: torch.where(x < y, x, y),
        "neg": lambda: -x,
        "abs": lambda: x.abs(),
        "sum of three": lambda: (x + y) + x,
    }[op]()
    assert same(call("elementwise", op, x, y, dtype), expected)


@pytest.mark.parametrize("op", ("less", "equal"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, *FP8))
def test_comparisons_compare_numbers(op: str, dtype: torch.dtype) -> None:
    x, y = (
        torch.randint(-3, 4, (512,), generator=torch.Generator().manual_seed(s)).to(dtype)
        for s in (1, 2)
    )
    expected = x.float() < y.float() if op == "less" else x.float() == y.float()
    assert torch.equal(call("elementwise", op, x, y, torch.int32), expected.int())


@pytest.mark.parametrize("op", ("add", "mul", "maximum", "where"))
@pytest.mark.parametrize("dtype", FP8)
def test_an_operation_of_fp8_rounds_once(op: str, dtype: torch.dtype) -> None:
    x, y = (torch.randn(1024, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (1, 2))
    a, b = x.float(), y.float()
    expected = {"add": a + b, "mul": a * b, "maximum": a.maximum(b), "where": a.minimum(b)}[op]
    assert same(call("elementwise", op, x, y, dtype), expected.to(dtype))


def test_fma_rounds_once() -> None:
    e = 2.0**-23
    x = torch.tensor([e / 2 * (1 + e), 3.0, 1e30, float("inf")])
    y = torch.tensor([1 - e, 1 / 3, 1e30, 1.0])
    z = torch.tensor([1 + e, -1.0, float("-inf"), 1.0])
    expected = torch.tensor([1 + e, (3.0 * y[1].double() - 1).float(), float("-inf"), float("inf")])
    assert same(call("fma", x, y, z), expected)
    assert (x.double() * y.double() + z.double()).float()[0] == 1 + 2 * e  # which rounds twice


def test_fused_agrees_with_exact_sums() -> None:
    torch.manual_seed(0)
    x, y, z = (torch.rand(4096) + 0.5 for _ in range(3))
    assert torch.equal(
        torch.from_numpy(fused(x.numpy(), y.numpy(), z.numpy())).float(),
        (x.double() * y.double() + z.double()).float(),
    )


def test_erf() -> None:
    x = torch.linspace(-6, 6, 1024)
    assert torch.equal(call("elementwise", "erf", x, x, torch.float32), x.double().erf().float())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, *LOW))
def test_dot_accumulates_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 128).to(dtype), torch.randn(128, 32).to(dtype)
    expected = x.double() @ y.double()
    assert (call("dot", x, y) - expected).abs().max() < 1e-4


def test_dot_of_integers() -> None:
    x, y = (torch.randint(-128, 128, (32, 32), dtype=torch.int8) for _ in range(2))
    assert torch.equal(call("dot", x, y), x.int() @ y.int())


def test_tf32_rounds_the_inputs_of_a_dot() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(16, 32), torch.randn(32, 16)

    def rounded(t: Tensor) -> Tensor:
        return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    with emulate.options(tf32=True):
        assert (call("dot", x, y) - rounded(x).double() @ rounded(y).double()).abs().max() < 1e-5
    assert (call("dot", x, y) - x.double() @ y.double()).abs().max() < 1e-5


@pytest.mark.parametrize("op", ("sum", "max", "min", "argmax", "cumsum"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int32))
def test_reductions(op: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(8, 64) * 100).to(dtype)
    out = torch.int32 if op == "argmax" or dtype == torch.int32 else torch.float32
    expected = {
        "sum": lambda: x.double().sum(1),
        "max": lambda: x.double().amax(1),
        "min": lambda: x.double().amin(1),
        "argmax": lambda: x.double().argmax(1),
        "cumsum": lambda: x.double().cumsum(1).sum(1),
    }[op]()
    tolerance = 4e-3 * 64**0.5 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        call("reduce", op, x, x, out).double(), expected.double(), rtol=tolerance, atol=0.5
    )


@pytest.mark.parametrize("op", ("compose", "scan"))
def test_a_reduction_of_ones_own_keeps_the_order(op: str) -> None:
    torch.manual_seed(0)
    scale, shift = torch.rand(4, 32) + 0.5, torch.randn(4, 32)
    value, total = torch.zeros(4), torch.zeros(4)
    for i in range(32):
        value = value * scale[:, i] + shift[:, i]
        total = total + value
    torch.testing.assert_close(
        call("reduce", op, scale, shift, torch.float32), value if op == "compose" else total
    )


# ------------------------------------------------------------------------------------- addresses


def strided() -> Tensor:
    return torch.arange(2 * 6 * 20.0).reshape(2, 6, 20)[:, 1:5, :10][1]


@pytest.mark.parametrize(
    "x", (torch.randn(4, 30), strided(), torch.randn(3, 7).bfloat16(), torch.randn(0, 5)), ids=str
)
def test_a_right_kernel_runs(x: Tensor) -> None:
    assert torch.equal(call("copy", x), x)


def test_one_element_too_many_loaded() -> None:
    x = torch.randn(4, 30)
    what = r"copy_kernel, program \(3, 0, 0\): load outside x\.ptr \(4, 30\): 1 of 31 lanes, the first at element 120"
    with pytest.raises(OutOfBounds, match=what + r", of 0 to 119, at .*kernels\.py:\d+"):
        call("copy", x, 1)


def test_one_element_too_many_stored() -> None:
    with pytest.raises(
        OutOfBounds, match=r"program \(3, 0, 0\): store outside y\.ptr \(4, 30\): 1 of 31 lanes"
    ):
        call("copy", torch.randn(4, 30), 0, 1)


def test_an_atomic_outside() -> None:
    what = (
        r"program \(3, 0, 0\): atomic outside y_ptr \(64,\): 3 of 16 lanes, the first at element 64"
    )
    with pytest.raises(OutOfBounds, match=what):
        call("scatter", torch.randn(4, 16), 17, "atomic")


def test_one_program_too_many() -> None:
    with pytest.raises(OutOfBounds, match=r"program \(4, 0, 0\): load outside"):
        call("copy_too_many_rows", torch.randn(4, 30))


def test_no_mask() -> None:
    assert torch.equal(call("unmasked", x := torch.randn(64)), x)
    with pytest.raises(
        OutOfBounds, match=r"program \(1, 0, 0\): load outside x_ptr \(40,\): 24 of 32 lanes"
    ):
        call("unmasked", torch.randn(40))


def test_the_view_counts_and_not_its_storage() -> None:
    with pytest.raises(OutOfBounds, match=r"x_ptr \(40,\)"):
        call("unmasked", torch.randn(64)[:40])
    with pytest.raises(OutOfBounds, match="first at element -"):
        call("far_row", torch.randn(64)[8:], -1, 1, True)


def test_a_tensor_of_nothing_has_no_address() -> None:
    with pytest.raises(OutOfBounds, match=r"x_ptr \(0,\): 1 of 1 lanes"):
        call("far_row", torch.empty(0), 0, 1, True)


def test_a_pointer_reaches_its_own_argument_only() -> None:
    with pytest.raises(
        OutOfBounds, match=r"load outside other_ptr \(32,\): 32 of 32 lanes.*inside x_ptr"
    ):
        call("through_other", torch.randn(32), torch.randn(32))


@pytest.mark.parametrize("shaped", (False, True))
def test_pointers_keep_what_they_point_into(shaped: bool) -> None:
    a, b = torch.randn(32), torch.randn(32)
    assert torch.equal(call("chosen", a, b, shaped), torch.where(torch.arange(32) % 2 == 1, b, a))
    with pytest.raises(OutOfBounds, match=r"b_ptr \(31,\)"):
        call("chosen", a, b[:31], shaped)


@pytest.mark.parametrize("on_device", (False, True))
def test_descriptors(on_device: bool) -> None:
    x = torch.randn(20, 32)
    y = call("described", x, 0, on_device)
    assert torch.equal(y[:20], x) and not y[20:].any()
    with pytest.raises(
        OutOfBounds, match=r"load outside x_\w+(\.base)? \(20, 32\): 32 of 672 lanes"
    ):
        call("described", x, 1, on_device)


# ---------------------------------------------------------------------------------------- poison


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
def test_lanes_that_no_mask_lets_through_are_undefined(dtype: torch.dtype) -> None:
    x = torch.ones(32, dtype=dtype)
    assert call("masked_sum", x, 20, True) == 20
    assert call("masked_sum", x, 20, False).isnan()
    assert call("masked_sum", x, 32, False) == 32


def test_undefined_integers_are_large() -> None:
    x = torch.ones(32, dtype=torch.int32)
    assert call("masked_sum", x, 31, True) == 31
    assert call("masked_sum", x, 31, False) == 31 + 0x5A5A5A5A


def test_max_passes_over_nan_and_not_over_undefined_lanes() -> None:
    x = torch.randn(4, 32)
    x[:, 3] = float("nan")
    assert torch.equal(call("reduce", "max", x, x, torch.float32), x.nan_to_num(nan=-99).amax(1))
    assert call("reduce", "masked max", x, x, torch.float32).isnan().all()


@pytest.mark.parametrize("way", ("empty", "empty_like", "new_empty", "empty_strided"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, *LOW))
def test_what_is_never_stored_is_nan(dtype: torch.dtype, way: str) -> None:
    y = call("forgotten", dtype, way)
    assert (y[:3].float() == 1).all() and y[3].float().isnan().all()


def test_integers_that_are_never_stored_are_large() -> None:
    assert (call("forgotten", torch.int32, "empty")[3] == 2**31 - 1).all()


# -------------------------------------------------------------------------------- races and order


@pytest.mark.parametrize(
    "stride, add, message",
    [
        (16, "store", None),
        (16, "atomic", None),
        (8, "atomic", None),
        (
            8,
            "store",
            r"scatter_kernel: store by program \(0, 0, 0\) and store by program \(1, 0, 0\) of element 8",
        ),
        (
            8,
            "mixed",
            r"store by program \(0, 0, 0\) and atomic by program \(1, 0, 0\) of element 8 of y_ptr",
        ),
    ],
)
def test_programs_that_write_the_same_memory(stride: int, add: str, message: str | None) -> None:
    x = torch.randn(4, 16)
    with emulate.options(races=True):
        if message is None:
            y = call("scatter", x, stride, add)
            assert stride < 16 or torch.equal(y, x.flatten())
        else:
            with pytest.raises(Race, match=message):
                call("scatter", x, stride, add)


def test_a_program_that_reads_what_another_writes() -> None:
    with emulate.options(races=True):
        call("shift", 1)
        with pytest.raises(
            Race, match=r"of element 16 of y_ptr \(5, 16\), in no order; 48 addresses"
        ):
            call("shift", 4)


def test_one_store_with_two_values_for_an_address() -> None:
    with emulate.options(races=True):
        assert (call("duplicates", True)[:8] == 1).all()
        with pytest.raises(Race, match="one store has two values for the same address"):
            call("duplicates", False)


def test_no_race_in_attention() -> None:
    q, k, v = qkv(torch.float32, (1, 2, 40, 16), (1, 1, 40, 16))
    with emulate.options(races=True):
        call("attention", q, k, v, True, 16)


def test_a_kernel_that_depends_on_the_order_differs() -> None:
    results = {}
    for order in ("forward", "reverse", 2):
        with emulate.options(order=order):
            results[order] = call("last", 16).item()
    assert results["forward"] == 15 and results["reverse"] == 0 and 0 < results[2] < 15


@pytest.mark.parametrize("order", ("forward", "reverse", 3))
def test_every_program_runs_once(order: str | int) -> None:
    with emulate.options(order=order):
        when = call("visits", (3, 4, 5)).flatten()
    assert torch.equal(when.sort().values, torch.arange(60, dtype=torch.int32))
    forward = torch.arange(60, dtype=torch.int32)
    assert torch.equal(when, forward) == (order == "forward")
    assert torch.equal(when.flip(0), forward) == (order == "reverse")


# ------------------------------------------------------------------- integers, grids, dots, launches


def test_an_offset_that_leaves_int32() -> None:
    x = torch.randn(4)
    what = r"offset_kernel, program \(0, 0, 0\): int32 overflows in multiply of 65536 and 65536"
    with pytest.raises(Overflow, match=what):
        call("far_row", x, 65536, 65536, False)
    with pytest.raises(OutOfBounds, match=f"first at element {2**32}"):
        call("far_row", x, 65536, 65536, True)


@pytest.mark.parametrize(
    "factor, fine", [(1, True), (2, False), (-1, True), (-2, False), (0, True)]
)
def test_signed_integers_overflow(factor: int, fine: bool) -> None:
    x = torch.tensor([2**30, -(2**30), 5, 0], dtype=torch.int32)
    if fine:
        assert torch.equal(call("multiply", x, factor), x * factor)
    else:
        with pytest.raises(Overflow):
            call("multiply", x, factor)


def test_int64_overflows() -> None:
    x = torch.tensor([2**40, 1], dtype=torch.int64)
    assert torch.equal(call("multiply", x, 2**22), x * 2**22)
    with pytest.raises(Overflow, match="int64"):
        call("multiply", x, 2**23)


def test_unsigned_integers_wrap() -> None:
    x = torch.tensor([2**31 + 5, 3], dtype=torch.int64).to(torch.uint32)
    assert call("multiply", x, 3).long().tolist() == [(2**31 + 5) * 3 % 2**32, 9]
    random = call("random", 7, 1024)
    assert random.min() >= 0 and random.max() < 1 and abs(random.mean() - 0.5) < 0.05


def test_device_assert() -> None:
    call("asserted", torch.ones(16))
    with pytest.raises(
        DeviceAssert, match=r"assert_kernel, program \(0, 0, 0\): x must be positive"
    ):
        call("asserted", torch.zeros(16))


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536), (2**31,), (-1,), (1.0,), (1, 1, 1, 1)])
def test_a_grid_that_cuda_refuses(grid: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"last_kernel: .*grid"):
        call("grid_of", *grid)


def test_a_grid_of_nothing() -> None:
    call("grid_of", 0)


@pytest.mark.parametrize("m, n, k", [(8, 16, 16), (16, 8, 16), (16, 16, 8)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_dot_too_small_for_tensor_cores(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    what = r"dot_kernel, program \(0, 0, 0\): .*M >= 16, N >= 16 and K >= 16"
    with pytest.raises(InterpreterError, match=what):
        call("dot", torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype))


def test_a_one_is_a_constant_to_the_compiler() -> None:
    assert call("widen", 2, "special") == 2 and call("widen", 1, "free") == 1
    with pytest.raises(InterpreterError, match="'int' object has no attribute 'to'"):
        call("widen", 1, "special")


def test_an_error_in_a_kernel_says_where() -> None:
    what = r"unknown_kernel, program \(0, 0, 0\): NameError: .*undefined_name.*kernels\.py:\d+$"
    with pytest.raises(InterpreterError, match=what):
        call("unknown")


# ------------------------------------------------------------------------------ the worker, threads


def test_only_a_name_with_an_underscore_may_write() -> None:
    x = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"write: wrote to its arguments \[0\]"):
        call("write", x)
    assert not x.any()
    call("write_", x[1:])
    assert x.tolist() == [0, 1, 1, 1]


def test_a_worker_that_dies_is_replaced() -> None:
    before = call("process")
    assert before == call("process") and before != os.getpid()
    with pytest.raises(RuntimeError, match="die: the emulating process died, exit code 3"):
        call("die")
    assert call("process") != before


def test_what_cannot_be_sent() -> None:
    with pytest.raises(RuntimeError, match="Unpicklable: 1 and 2"):
        call("unpicklable", True)
    with pytest.raises(RuntimeError, match="its result cannot be sent"):
        call("unpicklable", False)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        call("write", lambda: None)
    assert call("process") != os.getpid()


def test_an_error_carries_the_workers_traceback() -> None:
    with pytest.raises(InterpreterError) as raised:
        call("unknown")
    assert "undefined_name" in "".join(raised.value.__notes__)


@pytest.mark.parametrize("error", (OutOfBounds, Overflow, Race, DeviceAssert))
def test_errors_survive_pickling(error: type[Exception]) -> None:
    copy = pickle.loads(pickle.dumps(error("kernel: what")))
    assert type(copy) is error and str(copy) == "kernel: what"


def test_threads_in_the_worker() -> None:
    x = torch.randint(0, 9, (5, 20)).float()
    for y in call("threaded", x, 4):
        assert torch.equal(y, x)


def test_threads_that_call() -> None:
    results: dict[int, Tensor] = {}

    def work(at: int) -> None:
        results[at] = call("copy", torch.full((3, 5), float(at)))

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((results[at] == at).all() for at in range(4))


# ------------------------------------------------------------------------------ a flash attention


def qkv(
    dtype: torch.dtype, q: tuple[int, ...], kv: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of larger tensors, with a few large logits."""
    torch.manual_seed(0)
    return tuple(
        (torch.randn(b, s, h, d + 16)[..., 8 : d + 8] * 1.5).to(dtype).transpose(1, 2)
        for b, h, s, d in (q, kv, kv)
    )  # type: ignore[return-value]


def naive(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Of fp64 the truth. Of the inputs themselves the error that is allowed: theirs are the products
    that tensor cores take, and sums are at least fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).to(wide) for x in (k, v))
    scores = (q.to(wide) @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if causal:
        Sq, Sk = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(Sq, Sk).triu(Sk - Sq + 1).bool(), float("-inf"))
    p = scores.softmax(-1).nan_to_num().to(q.dtype)
    return (p.to(wide) @ v).to(q.dtype), scores.logsumexp(-1)


CASES = [
    (torch.float32, (2, 4, 50, 16), (2, 2, 70, 16), True, 32),
    (torch.float32, (1, 2, 40, 32), (1, 1, 20, 32), True, 16),  # 20 rows see no key
    (torch.float32, (1, 2, 33, 16), (1, 2, 50, 16), False, 32),
    (torch.bfloat16, (1, 2, 33, 32), (1, 2, 90, 32), False, 32),
    (
        torch.bfloat16,
        (1, 1, 16, 16),
        (1, 1, 2048, 16),
        False,
        16,
    ),  # 128 additions to an accumulator
]


def error_of(run: Any) -> str | None:
    """What tells run, which is a kernel's attention, from the right one."""
    for dtype, q_shape, kv_shape, causal, block in CASES:
        q, k, v = qkv(dtype, q_shape, kv_shape)
        exact = naive(q.double(), k.double(), v.double(), causal)
        allowed = naive(q, k, v, causal)
        try:
            results = run(q, k, v, causal, block)
        except (OutOfBounds, Overflow, InterpreterError) as error:
            return f"{type(error).__name__}: {error}"
        for name, ours, theirs, truth in zip(("out", "lse"), results, allowed, exact, strict=True):
            finite = truth.isfinite()
            if not torch.equal(ours[~finite].double(), truth[~finite]):
                return f"{name}: {ours[~finite].flatten()[:3].tolist()} where no key is seen"
            worst, limit = ((x.double() - truth)[finite].abs().max() for x in (ours, theirs))
            if not worst <= 2 * limit + 1e-6:
                return f"{name}: off by {worst:.1e}, and {dtype} attention by {limit:.1e}"
    return None


def test_attention_is_right() -> None:
    assert error_of(lambda *arguments: call("attention", *arguments)) is None


MUTANTS = {
    "causal off by one": ("offs_n[None, :] <= offs_m", "offs_n[None, :] < offs_m"),
    "causal from the top left": ("offs_m[:, None] + Sk - Sq)", "offs_m[:, None])"),
    "no mask of keys": ("keep = in_n[None, :]", "keep = in_n[None, :] | (offs_n[None, :] >= 0)"),
    "keys loaded past the end": (
        "offs_n, D), mask=in_n[:, None], other=0.0)\n        v =",
        "offs_n, D))\n        v =",
    ),
    "values undefined past the end": (
        "v = tl.load(tile_ptrs(value, b, h // GROUP, offs_n, D), mask=in_n[:, None], other=0.0)",
        "v = tl.load(tile_ptrs(value, b, h // GROUP, offs_n, D), mask=in_n[:, None])",
    ),
    "accumulator not rescaled": ("acc * alpha[:, None]", "acc"),
    "sum not rescaled": ("row_sum * alpha +", "row_sum +"),
    "output stored without a mask": (
        "o.to(out.ptr.dtype.element_ty), mask=in_m[:, None])",
        "o.to(out.ptr.dtype.element_ty))",
    ),
    "lse stored without a mask": ("lse, mask=in_m)", "lse)"),
    "another group's key": ("tile_ptrs(key, b, h // GROUP", "tile_ptrs(key, b, h % (Hq // GROUP)"),
    "exp for exp2": ("p = tl.math.exp2(scores", "p = tl.exp(scores"),
    "rows without a key divide by zero": ("tl.where(row_sum == 0.0, 1.0, row_sum)", "row_sum"),
    "rows without a key subtract infinity": (
        'tl.where(new_max == float("-inf"), 0.0, new_max)',
        "new_max",
    ),
    "last block of keys left out": ("last = Sk\n", "last = Sk // BLOCK_N * BLOCK_N\n"),
    "diagonal cut short": ("BLOCK_M + BLOCK_M + Sk - Sq)", "BLOCK_M + Sk - Sq)"),
    "head's stride for the batch's": ("b.to(tl.int64) * x.batch", "b.to(tl.int64) * x.head"),
    "half a tile of the output": ("acc = tl.zeros((BLOCK_M, D)", "acc = tl.zeros((D, BLOCK_M)"),
    "probabilities in bf16": (
        "acc = tl.dot(p.to(v.dtype), v,",
        "acc = tl.dot(p.to(tl.bfloat16).to(v.dtype), v,",
    ),
    "accumulator in bf16": (
        "acc * alpha[:, None], input_precision",
        "(acc * alpha[:, None]).to(tl.bfloat16).to(tl.float32), input_precision",
    ),
    "accumulator in the dtype of values": (
        "acc * alpha[:, None], input_precision",
        "(acc * alpha[:, None]).to(v.dtype).to(tl.float32), input_precision",
    ),
    "a program too few": ("grid = (triton.cdiv(Sq, block)", "grid = (max(Sq // block, 1)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, tmp_path: Path) -> None:
    source = (Path(__file__).parent / "kernels.py").read_text()
    before, after = MUTANTS[name]
    assert before in source
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(before, after))
    found = error_of(lambda *arguments: call("mutant", str(path), *arguments))
    assert found is not None
    assert not re.search("SyntaxError|NameError", found)
