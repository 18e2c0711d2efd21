"""gelu of a linear layer's output with its bias, and the gated activations. Bytes count."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn as fa

from ..peers import compiled, needing
from ..workload import NAIVE, OURS, Call, Contestant, Cost, Inputs, Setting, Workload, direct


def naive_erf(x: Tensor, bias: Tensor) -> Tensor:
    z = x + bias
    return 0.5 * z * (1 + torch.erf(z * 0.5**0.5))


def naive_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    z = x if bias is None else x + bias
    return 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))


def naive_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def torch_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def torch_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def liger_swiglu(x: Inputs) -> Call:
    """It writes gradients over its inputs, which are then no longer everyone's: copies are its own."""
    from liger_kernel.transformers.functional import liger_swiglu

    return lambda: liger_swiglu(x["gate"].clone(), x["up"].clone())


gelu_tanh = partial(fa.gelu, approximate="tanh")
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "gelu bias": (fa.gelu, naive_erf, partial(torch_gelu, approximate="none")),
    "gelu tanh": (gelu_tanh, naive_tanh, partial(torch_gelu, approximate="tanh")),
    "gelu tanh bias": (gelu_tanh, naive_tanh, partial(torch_gelu, approximate="tanh")),
    "swiglu": (fa.swiglu, naive_swiglu, torch_swiglu),
}


def workloads(setting: Setting) -> Iterator[Workload]:
    for case in CASES:
        for C in setting.pick((1024,), (3072,), (8192,)):
            yield workload(setting, case, setting.pick(512, 2048, 16384), C)


def workload(setting: Setting, case: str, R: int, C: int) -> Workload:
    ours, naive, torchs = CASES[case]
    gated = case == "swiglu"
    shapes: dict[str, tuple[int, ...]]
    shapes = {"gate": (R, C), "up": (R, C)} if gated else {"x": (R, C)}
    if case.endswith("bias"):
        shapes["bias"] = (C,)

    def make() -> Inputs:
        return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}

    contestants = [
        Contestant(OURS, direct(ours)),
        Contestant(NAIVE, direct(naive)),
        Contestant("torch", direct(torchs)),
        compiled(naive, setting),
    ]
    if gated:
        contestants.append(Contestant("liger", needing("liger_kernel", setting, liger_swiglu)))
    tensor = R * C * setting.dtype.itemsize
    return Workload(
        "activation", case, {"R": R, "C": C}, setting.dtype, setting.device,
        Cost(10.0 * R * C, (2 + gated) * tensor, 20.0 * R * C, (3 + 2 * gated) * tensor), "bytes", make,
        tuple(contestants),
    )  # fmt: skip
