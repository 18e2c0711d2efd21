"""Which backend serves a call, and why the others do not: the library's only mutable state.

A backend declares, an operator at a time, the features and dtypes that it honours. Anything outside
them it declines in a sentence, so a new feature is refused everywhere until someone opts in.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .kernels.triton import tune

BACKENDS = ("reference", "cpu", "triton", "cuda")
# Where a tensor lies decides who is asked, in this order. A meta tensor holds no data: any registered
# operator tells the results' shapes.
ORDER = {
    "cpu": ("cpu", "reference"),
    "meta": ("cpu", "triton", "reference"),
}
DEFAULT_ORDER = ("triton", "reference")

# On a CUDA or ROCm device, where cuda and triton both have every operator: this, unless the target's table
# in fastattn/measured or the user's own, from `fastattn autotune`, says who goes first. explain() tells.
GPU_ORDER = ("cuda", "triton")
UNMEASURED = "unmeasured: no GPU of this kind has timed one against the other"

ALL_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
KERNEL_FLOATS = ALL_FLOATS - {torch.float64}


class Kernel(NamedTuple):
    """One backend's implementation of one operator, and what it honours."""

    forward: Callable[..., Any]
    features: frozenset[str]
    dtypes: frozenset[torch.dtype] = KERNEL_FLOATS
    # (tensors, scalars) -> a sentence where it cannot serve, else None
    declines: Callable[..., str | None] = lambda *arguments: None


class Call(NamedTuple):
    """What of a call decides who serves it; `name` is the function that the user called."""

    name: str
    operator: str
    device: str
    dtype: torch.dtype
    features: frozenset[str]
    arguments: tuple[Any, ...]


_kernels: dict[tuple[str, str], Kernel] = {}
_unusable: dict[str, str] = {}
_forced: str | None = None


def register(operator: str, backend: str, implementation: Kernel) -> None:
    _kernels[operator, backend] = implementation


def kernel(operator: str, backend: str) -> Kernel:
    return _kernels[operator, backend]


def mark_unusable(backend: str, reason: str) -> None:
    """Says why a whole backend is missing: not built, not installed."""
    _unusable[backend] = reason


def choose(call: Call, backend: str | None = None) -> Kernel:
    """The kernel that serves this call. Raises ValueError with everyone's reason if none does."""
    names = asked(call, backend)
    for name in names:
        if reason_against(name, call) is None:
            return _kernels[call.operator, name]
    reasons = "; ".join(f"{name}: {reason_against(name, call)}" for name in names)
    who = "no backend" if wanted(backend) is None else f"backend {names[0]!r}"
    raise ValueError(f"{call.name}: {who} cannot take this call on {call.device}. {reasons}")


def wanted(backend: str | None) -> str | None:
    """The backend that a call must run on: its own `backend=`, else use_backend's."""
    return _forced if backend is None else backend


def asked(call: Call, backend: str | None) -> tuple[str, ...]:
    """Who is asked to serve a call, in this order."""
    only = wanted(backend)
    if only is None:
        return order(call)
    check_name(call.name, only)
    return (only,)


def order(call: Call) -> tuple[str, ...]:
    """Who is asked where no backend is named."""
    if call.device == "cuda":
        first = first_on_gpu(row_of(call))
        return (first, *(name for name in GPU_ORDER if name != first), "reference")
    return ORDER.get(call.device, DEFAULT_ORDER)


def row_of(call: Call) -> str:
    """The row of the table that a call belongs to: "attention 16", for elements of 16 bits. Decoding,
    known by a diagonal that follows a cache's lengths, has rows of its own."""
    name = "decode" if "diagonal_at_length" in call.features else call.operator
    return f"{name} {8 * call.dtype.itemsize}"


@torch.compiler.assume_constant_result
def first_on_gpu(row: str) -> str:
    return measured().get(row, GPU_ORDER[0])


@functools.cache
def measured() -> dict[str, str]:
    """Who was the faster on GPUs like the one at hand: "attention 16" -> "triton", and "where"."""
    if "triton" in _unusable or not torch.cuda.is_available():
        return {}
    name = backends_name(gpu_target())
    found = [read_backends(folder / name) for folder in (tune.MEASURED, tune.cache_folder())]
    return found[0] | found[1]


def gpu_target() -> str:
    """sm_90, gfx942: tune.target() without Triton, whose driver needs a C compiler at its first call."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties().gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def backends_name(target: str) -> str:
    return f"backends-{target}.json"


def read_backends(path: Path) -> dict[str, str]:
    """With a warning nothing, where the file is no such table."""
    try:
        rows = tune.read_rows(path)
        wrong = [row for row, name in rows.items() if row != "where" and name not in GPU_ORDER]
        if wrong:
            raise ValueError(f"{wrong[0]!r} must be one of {', '.join(GPU_ORDER)}")
    except (OSError, ValueError) as error:
        warnings.warn(
            f"fastattn: {path} is ignored, it is no table of backends: {error}", stacklevel=2
        )
        return {}
    return rows


def reason_against(name: str, call: Call) -> str | None:
    """None if this backend serves the call, else the sentence that says why not."""
    found = _kernels.get((call.operator, name))
    if found is None:
        return _unusable.get(name, f"{name} has no {call.operator}")
    if call.dtype not in found.dtypes:
        known = ", ".join(sorted(str(d).removeprefix("torch.") for d in found.dtypes))
        return f"{name} computes {known}, not {str(call.dtype).removeprefix('torch.')}"
    missing = sorted(call.features - found.features)
    if missing:
        return f"{name} does not implement {', '.join(missing)}"
    return found.declines(*call.arguments)


def verdicts(call: Call, backend: str | None = None) -> dict[str, str | None]:
    """Who is asked, then everyone else who serves this device -> None or its reason."""
    names = asked(call, backend) + order(call)
    return {name: reason_against(name, call) for name in names}


def usable() -> dict[str, str | None]:
    """Every backend -> None if it has kernels here, else why it has none."""
    present = {backend for _, backend in _kernels}
    return {
        name: None if name in present else _unusable.get(name, "not built") for name in BACKENDS
    }


def operators(backend: str) -> list[str]:
    """What this backend has a kernel for."""
    return sorted(operator for operator, name in _kernels if name == backend)


def check_name(asker: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{asker}: backend must be one of {', '.join(BACKENDS)}, got {name!r}")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Inside the block every operator of this process runs on `name`, or raises saying why not.

    None gives the choice back to the library. An operator's own `backend=` goes before it.
    """
    global _forced
    if name is not None:
        check_name("use_backend", name)
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous
