"""`fastattn bench`: every operator and whole models against everyone who can make the same call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from .ceiling import ceiling, device_clock
from .families import FAMILIES
from .harness import Absent, Row, measure
from .results import Results, about, compare, read
from .workload import OURS, Setting, Workload

__all__ = [
    "FAMILIES", "OURS", "Absent", "Results", "Row", "Setting", "Workload", "compare", "read",
    "run_bench", "workloads",
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
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Results:
    """Measures on torch's current number of threads. progress(what, share done)."""
    settings = [Setting(dtype, device, quick, compile) for dtype in dtypes]
    chosen = workloads(families, settings)
    clock = device_clock(device)
    results = Results(about=about(device, quick))
    results.about["command"] = command(families, settings)
    start = time.monotonic()
    for dtype in dtypes:
        progress("the ceiling of this machine", 0.0)
        results.ceilings[str(dtype).removeprefix("torch.")] = ceiling(device, dtype)
    for at, workload in enumerate(chosen):
        tell = lambda what, at=at, w=workload: progress(  # noqa: E731
            f"{w.name}: {what}", at / len(chosen)
        )
        rows, absent = measure(workload, clock, QUICK_SECONDS if quick else SECONDS, tell)
        results.rows += rows
        results.absent += absent
    results.about["seconds"] = round(time.monotonic() - start)
    return results


def command(families: Sequence[str], settings: Sequence[Setting]) -> str:
    """What one types to make the same run."""
    first = settings[0]
    words = ["fastattn bench", *families]
    words += [f"--dtype {str(setting.dtype).removeprefix('torch.')}" for setting in settings]
    words += ["--quick"] * first.quick + ["--compile"] * first.compile
    where = f"--device {first.device}" if first.on_gpu else f"--threads {torch.get_num_threads()}"
    return " ".join([*words, where])
