"""Runs a workload: everyone is judged, those that are right are timed in turns, then weighed.

Right means the error rule of verify/judge.py; who is wrong is never timed. In a round everyone is run
once, in an order drawn for it, so that what disturbs one disturbs all, and a ratio
is the median over rounds of the two times of a round.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.checks import dtype_name
from ..verify.cases import Case
from ..verify.judge import ratio, run
from ..verify.models import resident_bytes
from .ceiling import Clock
from .energy import Meter
from .peers import first_line
from .workload import DIRECTIONS, NAIVE, OURS, Call, Contestant, Inputs, Workload

MIN_ROUNDS, MAX_ROUNDS = 5, 100
LONG, LONG_ROUNDS = 20.0, 2  # where a round takes so many seconds, two must do
SAMPLE = 2e-3  # seconds: shorter calls are repeated within a round until they take so long
REFUSALS = Exception  # a library that cannot make a call, or a compiler behind it, raises anything


@dataclass
class Row:
    """One contestant's result. Seconds are of one call: the median and the quartiles over rounds. bytes:
    memory at its peak over what was there before, results included; None where
    that cannot be seen. error: over the allowance, at most
    1. ratios: how many times as long each other contestant took; spreads: their quartiles. joules: of one
    call, where the machine tells them (energy.py)."""

    family: str
    case: str
    sizes: dict[str, int]
    dtype: str
    direction: str
    contestant: str
    seconds: float
    low: float
    high: float
    rounds: int
    flops: float
    moved: float
    bound: str
    bytes: int | None
    error: float
    ratios: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, list[float]] = field(default_factory=dict)
    joules: float | None = None


@dataclass
class Absent:
    """Who was not timed, and why; `wrong` where the reason is its result, or fastattn has an error."""

    family: str
    case: str
    sizes: dict[str, int]
    dtype: str
    contestant: str
    reason: str
    wrong: bool = False
    directions: tuple[str, ...] = DIRECTIONS


@dataclass
class Entrant:
    """A contestant that is ready to run in one direction."""

    contestant: Contestant
    call: Call
    direction: str
    leaves: list[Tensor]
    clock: Clock
    dout: Tensor | None = None
    repeats: int = 1

    def once(self) -> float:
        """Seconds of one call, the part that is not asked for left out."""
        if self.direction == "forward":
            with torch.no_grad():
                start = self.clock()
                self.call()
                return self.clock() - start
        start = self.clock()
        out = self.call()
        if self.direction == "backward":
            start = self.clock()
        torch.autograd.grad(out, self.leaves, self.weight(out), allow_unused=True)
        return self.clock() - start

    def weight(self, out: Tensor) -> Tensor:
        """The gradient that the output is given, made once."""
        if self.dout is None:
            self.dout = torch.ones_like(out)
        return self.dout

    def sample(self) -> float:
        with self.contestant.context():
            return sum(self.once() for _ in range(self.repeats)) / self.repeats

    def peak(self, device: str) -> int:
        with self.contestant.context(), torch.set_grad_enabled(self.direction != "forward"):
            out = self.call() if self.direction == "backward" else None
            start = memory(device, reset=True)
            if out is None:
                out = self.call()
            if self.direction != "forward":
                kept = torch.autograd.grad(out, self.leaves, self.weight(out), allow_unused=True)
                del kept
            return max(memory(device, peak=True) - start, 0)

    def joules(self, meter: Meter) -> float | None:
        """Of one call, over a block of them."""
        if self.direction == "backward":
            return None
        calls, end = 0, self.clock() + meter.seconds
        with self.contestant.context():
            meter.start()
            while calls == 0 or self.clock() < end:
                for _ in range(self.repeats):
                    self.once()
                calls += self.repeats
            found = meter.stop()
        return None if found is None else found / calls


def memory(device: str, peak: bool = False, reset: bool = False) -> int:
    """Bytes in use, now or at the peak since the last reset."""
    if torch.device(device).type != "cpu":
        module = torch.get_device_module(torch.device(device).type)
        if reset:
            module.reset_peak_memory_stats(device)
        return int(module.max_memory_allocated(device) if peak else module.memory_allocated(device))
    if reset:
        gc.collect(1)  # what calls left; a full collection is 0.1 s, a third of a quick run in all
        give_back_freed_memory()
    return resident_bytes(peak, reset)


def give_back_freed_memory() -> None:
    """Memory that was freed and kept would be used again unseen. glibc's; others have no such word."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


# ---- right or wrong -----------------------------------------------------------------------------


class Judged(NamedTuple):
    """error: over the allowance, or the reason for not taking part. seconds: of the call that was judged."""

    contestant: Contestant
    error: float | str
    seconds: float


def judged(workload: Workload) -> Iterator[Judged]:
    inputs = workload.inputs(judged=True)
    truth, naive = (outcome(workload, naive_of(workload), inputs, exact) for exact in (True, False))
    for contestant in workload.contestants:
        start = time.perf_counter()
        try:
            found = outcome(workload, contestant, inputs)
        except REFUSALS as reason:
            yield Judged(contestant, first_line(reason), 0.0)
            continue
        seconds = time.perf_counter() - start
        worst = max(ratio(found[n], truth[n], naive[n], workload.dtype) for n in found)
        yield Judged(contestant, worst, seconds)


def naive_of(workload: Workload) -> Contestant:
    found = next(c for c in workload.contestants if c.name == NAIVE)
    in_parts = workload.judged_naive
    return Contestant(NAIVE, lambda x: lambda: in_parts(x)) if in_parts else found


def outcome(
    workload: Workload, contestant: Contestant, inputs: Inputs, exact: bool = False
) -> dict[str, Tensor]:
    """Output, and gradients where there are any, of the judged inputs."""
    case = Case(
        workload.family, workload.case, "", lambda: inputs,
        lambda x, backend, generator: ((contestant.judged or contestant.bind)(x)(),), workload.keep,
    )  # fmt: skip
    gradients = contestant.backward and workload.directions != ("forward",)
    with contestant.context():
        return run(case, workload.dtype, "", workload.device, exact, gradients)


# ---- how long, and how much memory --------------------------------------------------------------


def measure(
    workload: Workload, clock: Clock, budget: float, tell: Callable[[str], None] = lambda what: None,
    meter: Meter | None = None, unwanted: Callable[[Sequence[Judged]], dict[str, str]] = lambda right: {},
) -> tuple[list[Row], list[Absent]]:  # fmt: skip
    """Rows and absences of one workload. budget: seconds that each direction's rounds may take. meter: of
    energy. unwanted: of those who are right, who need not be timed, and why."""
    tell("judging")
    absent, right = [], {}
    for found in judged(workload):
        name = found.contestant.name
        if isinstance(found.error, str):
            absent.append(missing(workload, name, found.error, wrong=name == OURS))
        elif not found.error <= 1:
            reason = f"wrong, and so not timed: {found.error:.3g} times the allowed error"
            absent.append(missing(workload, name, reason, wrong=True))
        else:
            right[name] = found
    for name, reason in unwanted(list(right.values())).items():
        absent.append(missing(workload, name, reason))
        del right[name]
    inputs = on_device(workload)
    rows = []
    for direction in workload.directions:
        tell(direction)
        contestants = [found.contestant for found in right.values()]
        entrants = ready(workload, direction, contestants, inputs, clock, absent)
        times = take_turns(entrants, budget)
        for name, entrant in entrants.items():
            weighs = entrant.contestant.weighs
            peak = entrant.peak(workload.device) if weighs else None
            row = as_row(workload, direction, name, times, peak, float(right[name].error))
            row.joules = entrant.joules(meter) if meter else None
            rows.append(row)
    return rows, absent


def missing(
    workload: Workload, name: str, reason: str, wrong: bool = False,
    directions: tuple[str, ...] | None = None,
) -> Absent:  # fmt: skip
    return Absent(
        workload.family, workload.case, workload.sizes, dtype_name(workload.dtype), name, reason, wrong,
        directions or workload.directions,
    )  # fmt: skip


def on_device(workload: Workload) -> Inputs:
    inputs = {}
    for name, x in workload.inputs().items():
        if x.is_floating_point():
            dtype = torch.float32 if name in workload.keep else workload.dtype
            x = x.to(workload.device, dtype).requires_grad_()
        inputs[name] = x.to(workload.device)
    return inputs


def ready(
    workload: Workload, direction: str, contestants: list[Contestant], inputs: Inputs, clock: Clock,
    absent: list[Absent],
) -> dict[str, Entrant]:  # fmt: skip
    """Who has made the call once, of the size that is timed; the others join the absent."""
    leaves = [x for x in inputs.values() if x.requires_grad]
    entrants = {}
    for contestant in contestants:
        if direction != "forward" and not contestant.backward:
            absent.append(
                missing(workload, contestant.name, "forward only", directions=(direction,))
            )
            continue
        try:
            entrant = Entrant(contestant, contestant.bind(inputs), direction, leaves, clock)
            entrant.sample()
        except REFUSALS as error:
            wrong = contestant.name == OURS
            reason = first_line(error)
            absent.append(missing(workload, contestant.name, reason, wrong, (direction,)))
            continue
        entrants[contestant.name] = entrant
    return entrants


def take_turns(entrants: dict[str, Entrant], budget: float) -> dict[str, list[float]]:
    """Seconds of everyone in every round. A round before the first tells how long one takes."""
    cost = 0.0
    for entrant in entrants.values():
        seconds = entrant.sample()
        entrant.repeats = max(1, min(1000, math.ceil(SAMPLE / max(seconds, 1e-9))))
        cost += seconds * entrant.repeats
    least = LONG_ROUNDS if cost > LONG else MIN_ROUNDS
    rounds = max(least, min(MAX_ROUNDS, int(budget / max(cost, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in entrants}
    order, shuffle = list(entrants), random.Random(0).shuffle
    for _ in range(rounds):
        # nobody always follows the same other, and finds the memory that it has left
        shuffle(order)
        for name in order:
            times[name].append(entrants[name].sample())
    return times


def as_row(
    workload: Workload, direction: str, name: str, times: dict[str, list[float]], peak: int | None,
    error: float,
) -> Row:  # fmt: skip
    own = times[name]
    low, _, high = quantiles(own, n=4)
    flops, moved = workload.cost.of(direction)
    over_rounds = {
        other: [theirs / mine for theirs, mine in zip(times[other], own, strict=True)]
        for other in times
        if other != name and OURS in (name, other)
    }
    ratios = {other: median(found) for other, found in over_rounds.items()}
    spreads = {other: quantiles(found, n=4)[::2] for other, found in over_rounds.items()}
    return Row(
        workload.family, workload.case, workload.sizes, dtype_name(workload.dtype), direction, name,
        median(own), low, high, len(own), flops, moved, workload.bound, peak, error, ratios,
        spreads,
    )  # fmt: skip
