"""softmax over the last dimension, plain and as attention has it: scaled, causal. Bytes count."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import fastattn as fa

from ..peers import compiled, needing
from ..workload import NAIVE, OURS, Call, Contestant, Cost, Inputs, Setting, Workload, direct


def naive(x: Tensor, causal: bool, scale: float) -> Tensor:
    x = masked(x * scale, causal)
    weights = (x - x.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def torchs(x: Tensor, causal: bool, scale: float) -> Tensor:
    return masked(x * scale if scale != 1 else x, causal).softmax(-1)


def masked(x: Tensor, causal: bool) -> Tensor:
    if not causal:
        return x
    later = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    return x.masked_fill(later, -torch.inf)


def liger(x: Inputs) -> Call:
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    return lambda: LigerSoftmaxFunction.apply(x["x"])


def workloads(setting: Setting) -> Iterator[Workload]:
    for C in setting.pick((1000,), (128, 1000, 32768), (1000, 4096, 32768)):
        rows = setting.pick(1024, 4096, 16384)
        yield workload(setting, (rows * 1024 // C, C), causal=False)
    for S in setting.pick((512,), (128, 512, 2048), (512, 2048, 8192)):
        heads = max(setting.pick(2**20, 2**23, 2**26) // S**2, 1)
        yield workload(setting, (heads, S, S), causal=True)


def workload(setting: Setting, shape: tuple[int, ...], causal: bool) -> Workload:
    scale = 0.125 if causal else 1.0
    contestants = [
        Contestant(OURS, direct(fa.softmax, causal=causal, scale=scale)),
        Contestant(NAIVE, direct(naive, causal=causal, scale=scale)),
        Contestant("torch", direct(torchs, causal=causal, scale=scale)),
        compiled(naive, setting, causal=causal, scale=scale),
    ]
    if not causal:
        contestants.append(Contestant("liger", needing("liger_kernel", setting, liger)))
    numbers = torch.Size(shape).numel()
    tensor = numbers * setting.dtype.itemsize
    letters = ("H", "S", "C") if causal else ("R", "C")
    return Workload(
        "softmax", "causal" if causal else "plain", dict(zip(letters, shape, strict=True)),
        setting.dtype, setting.device, Cost(5.0 * numbers, 2 * tensor, 4.0 * numbers, 3 * tensor),
        "bytes", lambda: {"x": torch.randn(shape, dtype=torch.float64)}, tuple(contestants),
    )  # fmt: skip
