"""A run as data: what was measured, on what machine, with which versions; and two runs compared."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import torch

from .. import __version__, registry
from ..kernels import native
from .harness import Absent, Row
from .workload import OURS

FORMAT = 1
PACKAGES = (
    "torch", "triton", "transformers", "onnxruntime", "flash-attn", "xformers", "liger-kernel",
)  # fmt: skip
# A change may be more than noise where the quartiles of the two runs do not meet and it is larger than this.
NOISE = 0.05


@dataclass
class Results:
    """ceilings: by dtype, what ceiling.py found."""

    rows: list[Row] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    ceilings: dict[str, dict[str, Any]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    # of targets.py, where they were asked for
    targets: list[dict[str, Any]] = field(default_factory=list)

    @property
    def wrong(self) -> list[Absent]:
        return [a for a in self.absent if a.wrong]

    def percent(self, row: Row) -> float:
        """Of the ceiling of this run, in what the work is measured in."""
        ceiling = self.ceilings[row.dtype]
        return 100 * rate(row) / float(ceiling[row.bound])

    def growth(self) -> list[Growth]:
        """How time and memory of one sequence grow with S, where there are several S."""
        series: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            if "S" in row.sizes:
                others = tuple((n, s) for n, s in row.sizes.items() if n not in ("B", "S"))
                key = (row.family, row.case, others, row.dtype, row.direction, row.contestant)
                series.setdefault(key, []).append(row)
        return [
            Growth(family, case, dict(sizes), dtype, direction, contestant,
                   exponent(rows, "seconds"), exponent(rows, "bytes"))
            for (family, case, sizes, dtype, direction, contestant), rows in series.items()
            if family != "models" and len({row.sizes["S"] for row in rows}) > 1
        ]  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        rows = [
            {**asdict(row), "rate": rate(row), "percent_of_ceiling": self.percent(row)}
            for row in self.rows
        ]
        return {
            "format": FORMAT, **self.about, "ceilings": self.ceilings, "rows": rows,
            "absent": [asdict(a) for a in self.absent],
            "growth": [g._asdict() for g in self.growth()], "targets": self.targets,
        }  # fmt: skip


class Growth(NamedTuple):
    """Exponents p of S^p; None where memory is too little to tell."""

    family: str
    case: str
    sizes: dict[str, int]
    dtype: str
    direction: str
    contestant: str
    time: float | None
    memory: float | None


def rate(row: Row) -> float:
    """Operations or bytes a second."""
    return (row.flops if row.bound == "flops" else row.moved) / row.seconds


def exponent(rows: Sequence[Row], what: str) -> float | None:
    """The slope of log(what / B) over log(S), by least squares."""
    x = [math.log(row.sizes["S"]) for row in rows]
    amounts = [getattr(row, what) or 0 for row in rows]
    # below a megabyte it is the noise of pages that one would see
    if min(amounts) < (1e6 if what == "bytes" else 1e-12):
        return None
    y = [math.log(a / row.sizes.get("B", 1)) for a, row in zip(amounts, rows, strict=True)]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


# ---- on file ------------------------------------------------------------------------------------


def read(path: Path) -> Results:
    data = read_json(path)
    if not is_run(data):
        raise ValueError(f"{path} does not hold results of fastattn bench, format {FORMAT}")
    names = set(Row.__dataclass_fields__)
    rows = [Row(**{n: v for n, v in row.items() if n in names}) for row in data["rows"]]
    absent = [Absent(**{**a, "directions": tuple(a["directions"])}) for a in data["absent"]]
    apart = ("format", "ceilings", "rows", "absent", "growth", "targets")
    about = {n: v for n, v in data.items() if n not in apart}
    return Results(rows, absent, data["ceilings"], about, data.get("targets", []))


def is_run(data: Any) -> bool:
    return isinstance(data, dict) and data.get("format") == FORMAT and "ceilings" in data


def holds_run(path: Path) -> bool:
    return is_run(read_json(path))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


class Check(NamedTuple):
    """One case of fastattn verify. worst: its largest error over the allowance; None where that is
    infinite, or where the backend declined."""

    operator: str
    feature: str
    dtype: str
    backend: str
    worst: float | None
    passed: bool
    declined: str | None


class Checks(NamedTuple):
    cases: list[Check]
    about: dict[str, Any]


def read_checks(path: Path) -> Checks | None:
    """What fastattn verify --json printed; None where the file holds something else."""
    data = read_json(path)
    if not isinstance(data, dict) or "operators" not in data:
        return None
    about = {n: v for n, v in data.items() if n not in ("operators", "models", "failures")}
    return Checks([check(found) for found in data["operators"]], about)


def check(found: dict[str, Any]) -> Check:
    errors = list(found["error_over_allowance"].values())
    worst = None if not errors or None in errors else max(errors)
    same = ("operator", "feature", "dtype", "backend", "passed", "declined")
    return Check(**{name: found[name] for name in same}, worst=worst)


def about(device: str, quick: bool) -> dict[str, Any]:
    """Where and with what this run was made."""
    return {
        "fastattn": __version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "device": device_name(device),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "instruction_set": native.isa() if registry.usable()["cpu"] is None else None,
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    kind = torch.device(device).type
    return device if kind == "cpu" else torch.get_device_module(kind).get_device_name(device)


def machine() -> dict[str, Any]:
    """Linux tells the processor and what it can; elsewhere what Python knows."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "processor": platform.processor() or None,
        "flags": [],
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        pairs = {name.strip(): value.strip() for name, value in lines}
        found["processor"] = pairs.get("model name", found["processor"])
        flags = pairs.get("flags", pairs.get("Features", "")).split()
        found["flags"] = sorted(flag for flag in flags if flag.startswith(VECTOR_FLAGS))
    return found


VECTOR_FLAGS = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "sve", "bf16", "i8mm")


def commit() -> str | None:
    """Of the working tree that this package lies in, if it does; `+` where it was changed."""
    asked = ["git", "-C", str(Path(__file__).parent)]
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            [*asked, *words], capture_output=True, text=True, check=True
        ).stdout.strip()
        inside = Path(run("rev-parse", "--show-toplevel")) == Path(__file__).parents[2]
        head = run("rev-parse", "--short=12", "HEAD")
        changed = run("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return (head + "+" * bool(changed)) if inside else None


# ---- two runs -----------------------------------------------------------------------------------


class Change(NamedTuple):
    """factor: how many times as long the second run took; relative: the same of the times over those of
    who took turns with it, their geometric mean, None where nobody did. A machine that is busy or slow
    changes the first and not the second.

    beyond_noise: fastattn against every one of the others; one of the others by itself and against
    fastattn."""

    row: Row
    before: Row
    factor: float
    relative: float | None
    beyond_noise: bool


def compare(first: Results, second: Results) -> list[Change]:
    """Every row that both runs have, the largest change first."""
    before = {identity(row): row for row in first.rows}
    pairs = [(before[identity(row)], row) for row in second.rows if identity(row) in before]
    changes = [change(a, b) for a, b in pairs]
    return sorted(changes, key=lambda c: -abs(math.log(c.factor)))


def identity(row: Row) -> tuple[Any, ...]:
    sizes = tuple(row.sizes.items())
    return row.family, row.case, sizes, row.dtype, row.direction, row.contestant


def change(a: Row, b: Row) -> Change:
    factor = b.seconds / a.seconds
    alone = direction((a.low, a.high), (b.low, b.high), factor)
    others = a.spreads.keys() & b.spreads.keys()
    factors = {name: a.ratios[name] / b.ratios[name] for name in others}
    # a ratio is the other's time over one's own: it falls where one's own time rises
    against = {direction(b.spreads[name], a.spreads[name], factors[name]) for name in others}
    if b.contestant != OURS or not others:
        against.add(alone)
    relative = geometric_mean(factors.values()) if factors else None
    return Change(b, a, factor, relative, against in ({-1}, {1}))


def direction(before: Sequence[float], after: Sequence[float], factor: float) -> int:
    """1 where it is more, -1 where less, 0 where the quartiles meet or it is too little to tell."""
    apart = before[1] < after[0] or after[1] < before[0]
    large = not 1 / (1 + NOISE) <= factor <= 1 + NOISE
    return (1 if factor > 1 else -1) if apart and large else 0
