"""`fastattn verify`: the numbers of every operator and of whole models, proved on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .. import __version__, registry
from ..kernels import native
from .cases import CASES, Case
from .judge import DTYPES, Verdict, judge
from .models import ModelReport, check_models, read_text

# backends whose kernels are for GPUs: on the CPU the same kernels run in emulation, slowly
EMULATED = ("triton", "cuda")
Progress = Callable[[str, float], None]


@dataclass
class Report:
    """Everything that one run found."""

    device: str = "cpu"
    verdicts: list[Verdict] = field(default_factory=list)
    models: list[ModelReport] = field(default_factory=list)
    seconds: float = 0.0
    unreached: int = 0  # when the time was over
    lost: str | None = None  # why the device answers no more

    @property
    def counts(self) -> dict[str, int]:
        checks = [ok for model in self.models for ok in model.checks.values()]
        return {
            "passed": sum(v.passed for v in self.verdicts) + sum(checks),
            "failed": sum(v.failed for v in self.verdicts)
            + len(checks)
            - sum(checks)
            + bool(self.lost),
            "declined": sum(v.declined is not None for v in self.verdicts),
        }

    @property
    def failures(self) -> list[str]:
        """A sentence for everything that is wrong."""
        wrong = [v.explain() for v in self.verdicts if v.failed]
        wrong += [
            f"{m.name}: {name}" for m in self.models for name, ok in m.checks.items() if not ok
        ]
        return wrong + ([self.lost] if self.lost else [])

    def rows(self) -> dict[tuple[str, str, str], dict[torch.dtype, tuple[float, float]]]:
        """(operator, feature, backend) -> dtype -> the worst error over allowance, outputs and gradients."""
        table: dict[tuple[str, str, str], dict[torch.dtype, tuple[float, float]]] = {}
        for v in self.verdicts:
            if v.declined is None and v.raised is None:
                row = table.setdefault((v.case.operator, v.case.feature, v.backend), {})
                out, grad = row.get(v.dtype, (0.0, 0.0))
                row[v.dtype] = (max(out, v.worst(False)), max(grad, v.worst(True)))
        return table

    def as_json(self) -> dict[str, Any]:
        return {
            "fastattn": __version__,
            "torch": torch.__version__,
            "instruction_set": native.isa() if registry.usable()["cpu"] is None else None,
            "threads": torch.get_num_threads(),
            "device": self.device,
            **self.counts,
            "seconds": self.seconds,
            "not_reached": self.unreached,
            "operators": [
                {
                    "case": v.case.id, "operator": v.case.operator, "feature": v.case.feature,
                    "dtype": str(v.dtype).removeprefix("torch."), "backend": v.backend,
                    "passed": v.passed, "declined": v.declined, "raised": v.raised,
                    "error_over_allowance": finite(dict(v.errors)),
                }
                for v in self.verdicts
            ],
            "models": [finite(asdict(m)) | {"checks": m.checks} for m in self.models],
            "failures": self.failures,
        }  # fmt: skip


def finite(x: Any) -> Any:
    """NaN and infinities as None: JSON has no word for them."""
    if isinstance(x, dict):
        return {name: finite(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def run_verify(
    *,
    operators: Sequence[str] = (),
    backends: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = DTYPES,
    quick: bool = False,
    text: str | None = None,
    device: str = "cpu",
    seconds: float | None = None,
    progress: Progress = lambda what, share: None,
) -> Report:
    """All cases of these operators on these backends, then the models unless only some operators or only
    emulated backends are asked for. quick: every fourth case, and no models. By default all backends
    that are usable on the device; one that the CPU only emulates then runs a sample, a case for each
    operator and dtype. seconds: when to end, before the models; cases then come in an order of which every
    beginning is a sample of all.
    """
    start = time.perf_counter()
    report = Report(device)
    cases = selected(operators, quick)
    if seconds is not None:
        cases = [cases[at] for at in spread(len(cases))]
    names = list(backends) or serving(device)
    # a model on an interpreter would take hours
    with_models = not operators and not quick and not set(names) <= set(EMULATED)
    with_models = with_models and seconds is None
    if with_models:
        read_text(text)  # what is wrong with it is better said before the cases
    checks = [
        (case, dtype, name)
        for case in cases
        for at_dtype, dtype in enumerate(dtypes)
        for name in names
        if backends or device != "cpu" or name not in EMULATED or in_sample(case, at_dtype)
    ]
    for at, (case, dtype, name) in enumerate(checks):
        over = seconds is not None and time.perf_counter() - start >= seconds
        if over or report.lost:
            report.unreached = len(checks) - at
            break
        progress(f"{case.operator}: {case.feature}", at / len(checks))
        report.verdicts.append(attempted(case, dtype, name, device))
        if report.verdicts[-1].raised:
            report.lost = lost(device)
    if with_models:
        report.models = check_models(text, progress)
    report.seconds = time.perf_counter() - start
    return report


def attempted(case: Case, dtype: torch.dtype, backend: str, device: str) -> Verdict:
    """Judged; what raises is wrong, and the cases after it go on."""
    try:
        return judge(case, dtype, backend, device)
    except Exception as error:  # a kernel's and its compiler's are of every type
        line = (str(error).strip().splitlines() or [""])[0]
        return Verdict(case, dtype, backend, device, raised=f"{type(error).__name__}: {line}")


def lost(device: str) -> str | None:
    """Why a GPU answers no more: after a wrong address it runs nothing of this process again."""
    kind = torch.device(device).type
    if kind == "cpu":
        return None
    try:
        torch.get_device_module(kind).synchronize()
    except RuntimeError as error:
        return f"{device} answers no more: {str(error).strip().splitlines()[0]}"
    return None


def spread(count: int) -> list[int]:
    """0 .. count - 1 in the golden ratio's order: every beginning of it lies evenly over all."""
    return sorted(range(count), key=lambda at: at * 0.6180339887498949 % 1)


def serving(device: str) -> list[str]:
    """The backends that have kernels for tensors of this device."""
    usable = [name for name, reason in registry.usable().items() if reason is None]
    if torch.device(device).type == "cpu":
        return usable
    return [name for name in usable if name != "cpu"]


def in_sample(case: Case, at_dtype: int) -> bool:
    """One case of each operator in each dtype, another for every dtype; of attention, the one with all
    features as well."""
    own = [c for c in CASES if c.operator == case.operator]
    return case is own[at_dtype % len(own)] or case.name == "everything"


def selected(operators: Sequence[str], quick: bool) -> list[Case]:
    known = sorted({case.operator for case in CASES})
    for name in operators:
        if name not in known:
            raise ValueError(f"verify: operator must be one of {', '.join(known)}, got {name!r}")
    cases = [case for case in CASES if not operators or case.operator in operators]
    return cases[::4] if quick else cases
