"""Mean cross-entropy of hidden @ weight^T: 2 R E V operations forward, twice that backward.

fastattn and Liger take the gradients in the forward pass, so `both` is what compares.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn as fa

from ..peers import compiled, needing
from ..workload import NAIVE, OURS, Call, Contestant, Cost, Inputs, Setting, Workload, direct


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.mT, target)


def liger(x: Inputs) -> Call:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda: liger_fused_linear_cross_entropy(x["hidden"], x["weight"], x["target"])


def workloads(setting: Setting) -> Iterator[Workload]:
    E = setting.pick(256, 768, 2048)
    for V in setting.pick((16384,), (50257,), (50257, 128256)):
        yield workload(setting, setting.pick(256, 1024, 8192), E, V)


def workload(setting: Setting, R: int, E: int, V: int) -> Workload:
    def make(R: int = R) -> Inputs:
        return {
            "hidden": torch.randn(R, E, dtype=torch.float64),
            "weight": torch.randn(V, E, dtype=torch.float64) * E**-0.5,
            "target": torch.randint(V, (R,)),
        }

    flops, read = 2.0 * R * E * V, (R + V) * E * setting.dtype.itemsize
    return Workload(
        "linear_cross_entropy", "mean", {"R": R, "E": E, "V": V}, setting.dtype, setting.device,
        Cost(flops, read, 2 * flops, 2 * read), "flops", make,
        (
            Contestant(OURS, direct(fa.linear_cross_entropy)),
            Contestant(NAIVE, direct(naive)),
            compiled(naive, setting),
            Contestant("liger", needing("liger_kernel", setting, liger)),
        ),
        make_judged=lambda: make(min(R, 1024)),
    )  # fmt: skip
