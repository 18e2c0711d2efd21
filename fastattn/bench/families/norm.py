"""layer_norm and rms_norm over the last dimension, alone and with a residual added in the same pass.

Bytes count: x read, y written; backward dy and x read, dx written; a residual is one more of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn as fa

from ..peers import compiled, needing
from ..workload import NAIVE, OURS, Call, Contestant, Cost, Inputs, Setting, Workload, direct


def naive_layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    z = x if residual is None else x + residual
    centred = z - z.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight + bias


def naive_rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def torch_layer(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    z = x if residual is None else x + residual
    return F.layer_norm(z, weight.shape, weight, bias, 1e-5)


def torch_rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def liger_layer(x: Inputs) -> Call:
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda: liger_layer_norm(x["x"], x["weight"], x["bias"], 1e-5)


def liger_rms(x: Inputs) -> Call:
    from liger_kernel.transformers.functional import liger_rms_norm

    # in place it would write over the gradient that it is given, which is everyone's
    return lambda: liger_rms_norm(x["x"], x["weight"], 1e-6, in_place=False)


Forms = tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]
LAYER: Forms = (fa.layer_norm, naive_layer, torch_layer)
CASES: dict[str, tuple[Forms, tuple[str, ...], Callable[[Inputs], Call] | None]] = {
    "layer_norm": (LAYER, ("weight", "bias"), liger_layer),
    "layer_norm residual": (LAYER, ("weight", "bias", "residual"), None),
    "rms_norm": ((fa.rms_norm, naive_rms, torch_rms), ("weight",), liger_rms),
}


def workloads(setting: Setting) -> Iterator[Workload]:
    for case in CASES:
        for C in setting.pick((768,), (768, 4096), (2048, 4096, 8192)):
            yield workload(setting, case, setting.pick(1024, 4096, 16384), C)


def workload(setting: Setting, case: str, R: int, C: int) -> Workload:
    (ours, naive, torchs), names, liger = CASES[case]

    def make() -> Inputs:
        x = {"x": torch.randn(R, C, dtype=torch.float64)}
        shapes = {"weight": (C,), "bias": (C,), "residual": (R, C)}
        return x | {n: torch.randn(shapes[n], dtype=torch.float64) for n in names}

    contestants = [
        Contestant(OURS, direct(ours)),
        Contestant(NAIVE, direct(naive)),
        Contestant("torch", direct(torchs)),
        compiled(naive, setting),
    ]
    if liger:
        contestants.append(Contestant("liger", needing("liger_kernel", setting, liger)))
    tensor, more = R * C * setting.dtype.itemsize, "residual" in names
    return Workload(
        "norm", case, {"R": R, "C": C}, setting.dtype, setting.device,
        Cost(8.0 * R * C, (2 + more) * tensor, 16.0 * R * C, (3 + 2 * more) * tensor), "bytes", make,
        tuple(contestants),
    )  # fmt: skip
