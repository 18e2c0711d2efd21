"""Who goes first on a GPU, cuda or triton: both on the workloads of the bench, for the registry's table.

A row of it (registry.row_of) is an operator and the bits of an element. Whoever takes less over its
workloads, forward and backward together, goes first, by the geometric mean; whoever is wrong does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import geometric_mean
from typing import NamedTuple

import torch

from .. import registry
from .families import FAMILIES, MODELS
from .harness import Absent, Row
from .workload import NAIVE, OURS, Setting, Workload

Measure = Callable[[Workload, float], tuple[list[Row], list[Absent]]]
# an operator's kernels serve these as well
SAME_KERNELS = {"cross_entropy": "cross_entropy_inplace"}


class Compared(NamedTuple):
    """cuda_over_triton: how many times as long; None where one of them is not right. reasons: why not."""

    row: str
    first: str
    cuda_over_triton: float | None
    workloads: int
    reasons: tuple[str, ...] = ()


def compare_backends(
    chosen: Sequence[Workload],
    measure: Measure,
    seconds: float = float("inf"),
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> list[Compared]:
    """measure(workload, budget): its rows, of contestants named cuda and triton. Ends after `seconds`."""
    start = time.perf_counter()
    rows: dict[str, list[tuple[list[Row], list[Absent]]]] = {}
    for at, workload in enumerate(chosen):
        left = seconds - (time.perf_counter() - start)
        if left <= 0:
            break
        progress(workload.name, at / len(chosen))
        found = measure(on_both(workload), min(1.0, left / (len(chosen) - at) / 6))
        rows.setdefault(row_of(workload), []).append(found)
    table = [decide(row, found) for row, found in rows.items()]
    return [c for c in table if c is not None]


def as_rows(found: Sequence[Compared]) -> dict[str, str]:
    """Of the table on file; one for every operator that the same kernels serve."""
    rows = {c.row: c.first for c in found}
    for row, first in list(rows.items()):
        operator, _, bits = row.partition(" ")
        if operator in SAME_KERNELS:
            rows[f"{SAME_KERNELS[operator]} {bits}"] = first
    return rows


def workloads(device: str, dtypes: Sequence[torch.dtype], quick: bool) -> list[Workload]:
    """Of every operator; models are made of those."""
    settings = [Setting(dtype, device, quick) for dtype in dtypes]
    names = [name for name in FAMILIES if name not in MODELS]
    return [w for name in names for setting in settings for w in FAMILIES[name](setting)]


def on_both(workload: Workload) -> Workload:
    """With the two backends for contestants, and naive to judge them by."""
    ours = next(c for c in workload.contestants if c.name == OURS)
    naive = next(c for c in workload.contestants if c.name == NAIVE)
    both = (
        replace(ours, name=name, context=partial(registry.use_backend, name))
        for name in registry.GPU_ORDER
    )
    return replace(workload, contestants=(*both, naive))


def row_of(workload: Workload) -> str:
    operator = workload.family.removesuffix("_features")
    if operator == "activation":
        operator = "glu" if workload.case == "swiglu" else "gelu"
    return f"{operator} {8 * workload.dtype.itemsize}"


def decide(row: str, found: Sequence[tuple[list[Row], list[Absent]]]) -> Compared | None:
    """None where neither of them is right."""
    cuda, triton = registry.GPU_ORDER
    seconds = {
        (at, r.contestant): r.seconds
        for at, (rows, _) in enumerate(found)
        for r in rows  # the last direction of a workload is forward and backward, or all that it has
    }
    absences = [a for _, absent in found for a in absent if a.contestant in registry.GPU_ORDER]
    reasons = tuple(dict.fromkeys(f"{a.contestant}: {a.reason}" for a in absences))
    failed = {a.contestant for a in absences}
    right = [name for name in registry.GPU_ORDER if name not in failed]
    both = [at for at in range(len(found)) if {(at, cuda), (at, triton)} <= seconds.keys()]
    if len(right) < 2 or not both:
        return Compared(row, right[0], None, len(found), reasons) if len(right) == 1 else None
    longer = geometric_mean(seconds[at, cuda] / seconds[at, triton] for at in both)
    return Compared(row, triton if longer > 1 else cuda, longer, len(both))
