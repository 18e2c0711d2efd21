"""What the CUDA kernels honour, operator by operator; anything else they decline. On a GPU they are the
extension's; on a CPU the same kernels run on a model of a GPU (emulate/cuda_host.py)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..emulate import cuda_host
from ..kernels import native
from . import attention, gpu, losses
from .catalogue import KERNELS

CACHE_APPEND = (
    "(Tensor(a!) key_store, Tensor(b!) value_store, Tensor key, Tensor value, Tensor lengths, "
    "Tensor counts, Tensor? page_table, Tensor? cos, Tensor? sin, bool interleaved) -> ()"
)
BUILT = bool(native.cuda_architectures())  # for a GPU; a constant, for torch.compile
NO_COMPILER = cuda_host.missing_compiler()
NOT_BUILT = "this build of fastattn has no CUDA kernels: install it with FASTATTN_BUILD_CUDA=1 where nvcc is"


def declines(*arguments: Any) -> str | None:
    device = next(x.device.type for x in arguments if isinstance(x, Tensor))
    return NOT_BUILT if device == "cuda" and not BUILT else NO_COMPILER if device == "cpu" else None


def attention_declines(*arguments: Any) -> str | None:
    return gpu.attention_declines(*arguments) or declines(*arguments)


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
        if operator is attention.OPERATOR:
            kernel = kernel._replace(declines=attention_declines)
        registry.register(operator.name, "cuda", kernel)
    losses.bind("cuda", ("CPU", "CUDA"))
    emulate("cross_entropy_bwd_", losses.IN_PLACE)
    torch.library.define("fastattn_cuda::cache_append_", CACHE_APPEND)
    emulate("cache_append_", CACHE_APPEND)
    append = gpu.appending(torch.ops.fastattn_cuda.cache_append_)
    registry.register(
        "cache_append", "cuda", registry.Kernel(append, frozenset(), declines=declines)
    )


bind()
