"""The most that this machine does, measured in the run that is held against it.

flops: on a CPU nothing but multiply-adds in registers, on every thread (csrc/cpu/fma_loop-inl.h); on a
GPU a product of two matrices in the dtype. bytes: a copy, its reads and writes both counted. read: a sum.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .. import registry
from ..kernels import native
from ..ops.checks import dtype_name

COPY_BYTES = 256 << 20  # beyond any cache
Clock = Callable[[], float]


def fastest(run: Callable[[], object], clock: Clock, rounds: int = 5) -> float:
    """Seconds of the best of some rounds: a ceiling is what was reached once."""
    best = float("inf")
    for _ in range(rounds):
        start = clock()
        run()
        best = min(best, clock() - start)
    return best


def device_clock(device: str) -> Clock:
    """Seconds, once the device has done what it was told."""
    kind = torch.device(device).type
    if kind == "cpu":
        return time.perf_counter
    module = torch.get_device_module(kind)

    def now() -> float:
        module.synchronize(device)
        return time.perf_counter()

    return now


def ceiling(device: str, dtype: torch.dtype, clock: Clock | None = None) -> dict[str, Any]:
    """flops, bytes and bytes read a second, and what was run to find the first."""
    clock = clock or device_clock(device)
    source = torch.zeros(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    found = {
        "bytes": 2 * COPY_BYTES / fastest(lambda: target.copy_(source), clock),
        "read": COPY_BYTES / fastest(lambda: source.sum(), clock),
    }
    if torch.device(device).type == "cpu" and registry.usable()["cpu"] is None:
        return found | {"flops": fma_flops(clock), "by": f"FMA loop, {native.isa()}"}
    n = 8192 if torch.device(device).type != "cpu" else 1024
    x = torch.randn(n, n, device=device, dtype=dtype)
    seconds = fastest(lambda: x @ x, clock)
    by = f"product of {n} x {n}, {dtype_name(dtype)}"
    return found | {"flops": 2 * n**3 / seconds, "by": by}


def fma_flops(clock: Clock, steps: int = 1_000_000) -> float:
    """Of all threads together; tasks are several a thread, so that one that is held up does fewer."""
    tasks = 4 * torch.get_num_threads()
    step = native.fma_loop(tasks, 1)  # wakes the threads
    return step * steps / fastest(lambda: native.fma_loop(tasks, steps), clock)
