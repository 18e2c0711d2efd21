"""`fastattn bench`: every operator and whole models against everyone who can make the same call."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..ops.checks import dtype_name
from ..verify import spread
from .ceiling import ceiling, device_clock
from .energy import find_meter
from .families import FAMILIES
from .harness import Absent, Row, measure, missing
from .peers import first_line
from .results import Results, about, compare, read
from .targets import run_targets
from .workload import NAIVE, OURS, Setting, Workload

__all__ = [
    "FAMILIES", "OURS", "Absent", "Results", "Row", "Setting", "Workload", "compare", "read",
    "run_bench", "run_targets", "workloads",
]  # fmt: skip
QUICK_SECONDS, SECONDS = 0.3, 5.0  # of rounds, a workload and direction


def workloads(families: Sequence[str], settings: Sequence[Setting]) -> list[Workload]:
    """Of these families, or of all where none is named, in every setting."""
    for name in families:
        if name not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {name!r}")
    wanted = [name for name in FAMILIES if name in families or not families]
    return [w for name in wanted for setting in settings for w in FAMILIES[name](setting)]


def run_bench(
    families: Sequence[str] = (),
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: str = "cpu",
    quick: bool = False,
    compile: bool = False,
    energy: bool = True,
    seconds: float | None = None,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Results:
    """Measures on torch's current number of threads. energy: of a call, where the machine tells it.
    seconds: when to end, between two workloads; families then take turns, and what was not reached stands
    in `about`. progress(what, share done)."""
    start = time.perf_counter()
    settings = [Setting(dtype, device, quick, compile) for dtype in dtypes]
    chosen = workloads(families, settings)
    chosen = chosen if seconds is None else in_turns(chosen)
    clock = device_clock(device)
    results = Results(about=about(device, quick))
    results.about["command"] = command(families, settings, seconds)
    meter = find_meter(device) if energy else "none: it was not asked for"
    results.about["energy"] = meter if isinstance(meter, str) else meter.name
    for dtype in dtypes:
        progress("the ceiling of this machine", 0.0)
        results.ceilings[dtype_name(dtype)] = ceiling(device, dtype)
    for at, workload in enumerate(chosen):
        budget = QUICK_SECONDS if quick else SECONDS
        if seconds is not None:
            left, rest = seconds - (time.perf_counter() - start), len(chosen) - at
            if left <= 0:
                results.about["not_reached"] = [w.name for w in chosen[at:]]
                break
            budget = min(budget, left / rest / 6)  # three directions; as long again for judging
        tell = lambda what, at=at, w=workload: progress(  # noqa: E731
            f"{w.name}: {what}", at / len(chosen)
        )
        rows, absent = measured(
            workload, clock, budget, tell, None if isinstance(meter, str) else meter
        )
        results.rows += rows
        results.absent += absent
    results.about["seconds"] = round(time.perf_counter() - start)
    return results


def command(
    families: Sequence[str], settings: Sequence[Setting], seconds: float | None = None
) -> str:
    """What one types to make the same run."""
    first = settings[0]
    words = ["fastattn bench", *families]
    words += [f"--dtype {dtype_name(setting.dtype)}" for setting in settings]
    words += ["--quick"] * first.quick + ["--compile"] * first.compile
    words += [f"--seconds {seconds:g}"] if seconds is not None else []
    where = f"--device {first.device}" if first.on_gpu else f"--threads {torch.get_num_threads()}"
    return " ".join([*words, where])


def measured(workload: Workload, *arguments: Any) -> tuple[list[Row], list[Absent]]:
    """measure(), where naive itself may not run for want of memory: then nobody is judged."""
    try:
        return measure(workload, *arguments)
    except RuntimeError as error:
        naive = next(c for c in workload.contestants if c.name == NAIVE)
        return [], [
            missing(workload, naive.name, f"nobody is judged: {first_line(error)}", wrong=True)
        ]


def in_turns(chosen: Sequence[Workload]) -> list[Workload]:
    """One of each family, then the next of each; of every family's, each beginning a sample of all, from two
    thirds on: a short run sees neither the smallest nor the largest alone."""
    groups = [[w for w in chosen if w.family == name] for name in {w.family: 0 for w in chosen}]
    orders = [
        [group[(at + 2 * len(group) // 3) % len(group)] for at in spread(len(group))]
        for group in groups
    ]
    return [w for turn in itertools.zip_longest(*orders) for w in turn if w is not None]
