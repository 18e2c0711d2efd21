"""What the CUDA kernels honour, operator by operator; anything else they decline. On a GPU they are the
extension's; on a CPU the same kernels run on a model of a GPU (emulate/cuda_host.py)."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import registry
from ..emulate import cuda_host
from ..kernels import native
from . import softmax
from .operator import Operator

KERNELS: list[tuple[Operator, frozenset[str]]] = [
    (softmax.OPERATOR, softmax.FEATURES),
]
NOT_BUILT = "this build of fastattn has no CUDA kernels: install it with FASTATTN_BUILD_CUDA=1 where nvcc is"


def declines(*arguments: Any) -> str | None:
    on_gpu = any(isinstance(x, torch.Tensor) and x.device.type == "cuda" for x in arguments)
    return NOT_BUILT if on_gpu and not native.cuda_architectures() else None


def emulate(name: str, schema: str) -> None:
    """Gives fastattn_cuda's operator to the CPU as well: there its kernels run on the model of a GPU."""
    cuda_host.declare(name, schema)
    implementation = functools.partial(cuda_host.call, name)
    torch.library.impl(f"fastattn_cuda::{name}", "CPU", implementation)


def bind() -> None:
    for operator, features in KERNELS:
        kernel = registry.Kernel(operator.bind("cuda"), features, declines=declines)
        emulate(f"{operator.name}_fwd", operator.forward_text)
        emulate(f"{operator.name}_bwd", operator.backward_text)
        registry.register(operator.name, "cuda", kernel)


bind()
