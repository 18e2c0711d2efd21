"""How many times as long torch's best takes: what this library sets itself on a CPU, and what it gets.

A target is a geometric mean over workloads of the ratio of torch's fastest contestant to fastattn's time;
no single workload may be below 1 either. Two threads are held against one, and time and memory over long
sequences show how they grow. Everyone is judged before being timed, as ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch

from ..ops.checks import dtype_name
from .ceiling import Clock, ceiling, device_clock
from .families import (
    activation,
    attention,
    decode,
    generation,
    inference,
    linear_cross_entropy,
    norm,
    softmax,
)
from .families import attention_features as features
from .families import cross_entropy as losses
from .harness import Judged, measure
from .results import Results, about
from .workload import NAIVE, OURS, Setting, Workload

# (B, H, S, D, causal)
SHAPES = (
    (8, 12, 128, 64, False), (4, 12, 512, 64, False), (1, 12, 1024, 64, True), (1, 12, 2048, 64, True),
    (2, 16, 512, 128, False), (1, 8, 4096, 128, True),
)  # fmt: skip
FEATURE_SHAPES = ((4, 12, 512), (1, 12, 1024))  # (B, H, S), D 64
TORCHS = (NAIVE, "torch", "sdpa", "sdpa flash", "sdpa math", "sdpa padded")
ONE_THREAD = "one thread"
SLOW, SHORT = 5.0, 0.5  # times the fastest rival, seconds: who took longer when judged is not timed
FP32, HALVES = (torch.float32,), (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """workloads: of a setting; `least` is the mean ratio that is asked for, over the fastest of rivals.
    threads: without so many it means nothing."""

    work: str
    least: float
    direction: str
    workloads: Callable[[Setting], Iterable[Workload]] = field(repr=False)
    dtypes: tuple[torch.dtype, ...] = FP32
    threads: int = 1
    rivals: tuple[str, ...] = TORCHS


def dense(setting: Setting) -> Iterable[Workload]:
    return (attention.workload(setting, *shape) for shape in SHAPES)


def featured(case: str, Dv: int = 64, D: int = 64) -> Callable[[Setting], Iterable[Workload]]:
    return lambda s: (features.workload(s, case, *shape, D, Dv) for shape in FEATURE_SHAPES)


def one(make: Callable[..., Workload], *arguments: Any) -> Callable[[Setting], Iterable[Workload]]:
    return lambda setting: (make(setting, *arguments),)


def decoding(*shapes: tuple[int, ...]) -> Callable[[Setting], Iterable[Workload]]:
    return lambda setting: (decode.workload(setting, *shape) for shape in shapes)


def whole(work: str, least: float, make: Callable[..., Workload], *arguments: Any) -> Target:
    """A model in inference, against transformers'."""
    return Target(work, least, "forward", one(make, *arguments), rivals=(inference.RIVAL,))


def over_one_thread(setting: Setting) -> Iterator[Workload]:
    """fastattn against itself on one thread."""
    for workload in dense(setting):
        ours = next(c for c in workload.contestants if c.name == OURS)
        alone = replace(ours, name=ONE_THREAD, context=one_thread)
        yield replace(workload, contestants=(*workload.contestants, alone))


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def long(setting: Setting) -> Iterator[Workload]:
    """One head, whose growth with S is seen."""
    for S in LENGTHS:
        yield attention.workload(setting, 1, 1, S, 64, True)
    for S in WINDOW_LENGTHS:
        yield features.long_window(setting, S, 64)


LENGTHS = tuple(2**k for k in range(10, 17))
WINDOW_LENGTHS = tuple(2**k for k in (16, 18, 20))
LONG = ((1, 16, 16, 4096, 128), (4, 32, 8, 4096, 128), (1, 12, 12, 1024, 64))
EIGHT_TO_ONE = (1, 32, 4, 4096, 128)
TARGETS = (
    Target("attention", 1.6, "forward", dense),
    Target("attention", 1.9, "both", dense),
    Target("attention", 1.8, "forward", dense, HALVES),
    Target("attention", 11, "both", dense, HALVES),
    Target("with a mask", 2, "both", featured("mask")),
    Target("with a bias", 2, "both", featured("bias")),
    Target("with dropout", 4, "both", featured("dropout")),
    Target("value narrower than key", 3, "both", featured("narrow values", Dv=128, D=192)),
    Target("window of 256", 6, "both", one(features.workload, "window", 1, 12, 4096, 64, 64)),
    Target("packed, over padded", 3, "both", one(features.packed, 12, 512, 64)),
    Target("few heads", 1.8, "both", one(attention.workload, 1, 2, 4096, 64, False), threads=2),
    Target("decode", 1.8, "forward", decoding(*LONG)),
    Target("decode", 9, "forward", decoding(*LONG, EIGHT_TO_ONE), (torch.bfloat16,)),
    Target("layer_norm", 1.15, "forward", one(norm.workload, "layer_norm", 4096, 768)),
    Target("layer_norm", 1.4, "both", one(norm.workload, "layer_norm", 4096, 768)),
    Target("add and layer_norm", 1.4, "forward", one(norm.workload, "layer_norm residual", 4096, 768)),
    Target("rms_norm", 3, "forward", one(norm.workload, "rms_norm", 4096, 768)),
    Target("rms_norm", 3, "both", one(norm.workload, "rms_norm", 4096, 768)),
    Target("softmax", 2.2, "forward", one(softmax.workload, (4096, 1000), False)),
    Target("causal scaled softmax", 5, "forward", one(softmax.workload, (12, 512, 512), True)),
    Target("cross_entropy", 4, "both", one(losses.workload, 512, 50257)),
    Target("cross_entropy in place", 12, "both", one(losses.workload, 512, 50257, True)),
    Target("linear_cross_entropy", 1.5, "both", one(linear_cross_entropy.workload, 1024, 768, 50257)),
    Target("gelu tanh", 5, "forward", one(activation.workload, "gelu tanh", 2048, 3072)),
    Target("bias and gelu tanh", 5, "forward", one(activation.workload, "gelu tanh bias", 2048, 3072)),
    Target("swiglu", 3, "forward", one(activation.workload, "swiglu", 2048, 3072)),
    Target("a tiny call", 1, "forward", one(attention.workload, 1, 12, 16, 64, False)),
    Target("two threads over one", 1.85, "both", over_one_thread, threads=2, rivals=(ONE_THREAD,)),
    whole("GPT-2, a token", 1.3, generation.workload, 1, 512),
    whole("GPT-2, a prompt", 1.15, inference.workload, "GPT-2 prefill", 1, 512),
    whole("BERT", 1.05, inference.workload, "BERT", 8, 128),
    whole("BERT, padded", 2, inference.workload, "BERT padded", 16, 256),
)  # fmt: skip
GROWTH = "growth"  # of time and memory over S, a word like those of the targets


def against_torch(workload: Workload, direction: str, rivals: Sequence[str] = TORCHS) -> Workload:
    """With torch's own ways alone beside fastattn, or other rivals, and naive, by which all are judged."""
    named = tuple(c for c in workload.contestants if c.name in (OURS, NAIVE, *rivals))
    return replace(workload, contestants=named, directions=(direction,))


def far_behind(right: Sequence[Judged], rivals: Sequence[str] = TORCHS) -> dict[str, str]:
    """Who took much longer than another rival already when judged: only the fastest one counts. Naive
    is not always one."""
    seconds = {found.contestant.name: found.seconds for found in right}
    best = min((seconds[name] for name in rivals if name in seconds), default=0.0)
    behind = {
        name: f"judged, it took {seconds[name] / best:.0f} times as long as the best"
        for name in rivals
        if name in seconds and seconds[name] > max(SLOW * best, SHORT)
    }
    if NAIVE in seconds and NAIVE not in rivals:
        behind[NAIVE] = "it is there to judge by"
    return behind


def run_targets(
    words: Sequence[str] = (),
    *,
    seconds: float = 2.0,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Results:
    """Those whose work and dtype ("decode, float32") have one of these words in them, or all; GROWTH too.
    seconds: of rounds, a workload."""
    start = time.perf_counter()
    chosen = [
        (target, dtype) for target in TARGETS for dtype in target.dtypes
        if (not words and target.threads <= torch.get_num_threads())
        or any(word in f"{target.work}, {dtype_name(dtype)}" for word in words)
    ]  # fmt: skip
    growth = list(long(Setting(torch.float32))) if not words or GROWTH in words else []
    if not chosen and not growth:
        raise ValueError(f"no target has any of these words in it: {'; '.join(words)}")
    clock = device_clock("cpu")
    results = Results(about=about("cpu", quick=False))
    results.about["command"] = command(words)
    dtypes = [dtype for _, dtype in chosen] or [torch.float32]
    results.ceilings = {dtype_name(dtype): ceiling("cpu", dtype) for dtype in dict.fromkeys(dtypes)}
    steps = len(chosen) + len(growth)
    for at, (target, dtype) in enumerate(chosen):
        progress(f"{target.work}, {dtype_name(dtype)}", at / steps)
        results.targets.append(reach(target, dtype, clock, seconds, results))
    for at, workload in enumerate(growth, len(chosen)):
        progress(workload.name, at / steps)
        rows, absent = measure(against_torch(workload, "both"), clock, seconds, unwanted=far_behind)
        results.rows += rows
        results.absent += absent
    results.about["seconds"] = round(time.perf_counter() - start)
    return results


def command(words: Sequence[str]) -> str:
    """What one types to make the same run."""
    quoted = [f'"{word}"' if " " in word else word for word in words]
    return " ".join(["fastattn bench --targets", *quoted, f"--threads {torch.get_num_threads()}"])


def reach(
    target: Target, dtype: torch.dtype, clock: Clock, seconds: float, results: Results
) -> dict[str, Any]:
    """Adds the target's rows to results. mean and least: of fastattn's ratios to torch's best."""
    ratios: list[float] = []
    for workload in target.workloads(Setting(dtype)):
        versus = against_torch(workload, target.direction, target.rivals)
        unwanted = partial(far_behind, rivals=target.rivals)
        rows, absent = measure(versus, clock, seconds, unwanted=unwanted)
        results.rows += rows
        results.absent += absent
        ours = (row.ratios for row in rows if row.contestant == OURS and row.ratios)
        ratios += [min(found.values()) for found in ours]
    mean, least = (geometric_mean(ratios), min(ratios)) if ratios else (0.0, 0.0)
    return {
        "work": target.work, "dtype": dtype_name(dtype), "direction": target.direction,
        "target": target.least, "mean": mean, "least": least,
        "reached": mean >= target.least and least >= 1,
    }  # fmt: skip
