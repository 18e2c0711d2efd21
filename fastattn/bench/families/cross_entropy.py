"""Mean cross-entropy of R rows of V logits. Bytes count: the logits read, and their gradient written."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn as fa

from ..peers import compiled, needing
from ..workload import NAIVE, OURS, Call, Contestant, Cost, Inputs, Setting, Workload, direct


def naive(logits: Tensor, target: Tensor) -> Tensor:
    logits = logits - logits.amax(-1, keepdim=True)
    losses = logits.exp().sum(-1).log() - logits.gather(-1, target[:, None])[:, 0]
    return losses.mean()


def torchs(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


def liger(x: Inputs) -> Call:
    """It writes the gradient over its logits, which are then no longer everyone's: a copy is its own."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda: liger_cross_entropy(x["logits"].clone(), x["target"])


def workloads(setting: Setting) -> Iterator[Workload]:
    for V in setting.pick((50257,), (32000, 50257, 128256), (32000, 50257, 128256)):
        yield workload(setting, setting.pick(128, 1024, 8192), V)


def in_place(x: Inputs) -> Call:
    """The gradient goes over the logits, which are then no longer everyone's: a copy is its own."""
    logits = x["logits"].clone()
    return lambda: fa.cross_entropy(logits, x["target"], inplace_backward=True)


def workload(setting: Setting, R: int, V: int, inplace: bool = False) -> Workload:
    def make(R: int = R) -> Inputs:
        return {
            "logits": torch.randn(R, V, dtype=torch.float64) * 3,
            "target": torch.randint(V, (R,)),
        }

    tensor = R * V * setting.dtype.itemsize
    return Workload(
        "cross_entropy", "in place" if inplace else "mean", {"R": R, "V": V}, setting.dtype, setting.device,
        Cost(4.0 * R * V, tensor, 4.0 * R * V, 2 * tensor), "bytes", make,
        (
            Contestant(OURS, in_place if inplace else direct(fa.cross_entropy)),
            Contestant(NAIVE, direct(naive)),
            Contestant("torch", direct(torchs)),
            compiled(naive, setting),
            Contestant("liger", needing("liger_kernel", setting, liger)),
        ),
        make_judged=lambda: make(min(R, 1024)),
    )  # fmt: skip
