"""What the Triton kernels honour, operator by operator. Their launchers are imported at the first call."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import emulate, registry
from ..kernels import triton as kernels
from . import attention, cross_entropy, gpu, losses, rotary
from .catalogue import KERNELS

DEVICES = ("CPU", "CUDA", "XPU")
# of the data in a call's arguments; on a GPU a check would wait for it
CHECKS: dict[str, Callable[..., None]] = {
    "attention_fwd": attention.check_data,
    "cross_entropy_fwd": cross_entropy.check_data,
    "rotary_fwd": rotary.check_data,
    "rotary_tables_fwd": rotary.check_data,
}


def run(name: str, *arguments: Any) -> Any:
    """The launcher, here on a GPU's tensors and in the interpreting process on a CPU's."""
    on_cpu = all(x.device.type == "cpu" for x in arguments if isinstance(x, Tensor))
    if on_cpu:
        if name in CHECKS:
            CHECKS[name](*arguments)
        return emulate.call(f"{kernels.__name__}.{kernels.LAUNCHERS[name]}:{name}", *arguments)
    return kernels.launcher(name)(*arguments)


def bind() -> None:
    if importlib.util.find_spec("triton") is None:
        registry.mark_unusable("triton", "Triton is not installed: pip install 'fastattn[triton]'")
        return
    for operator, features in KERNELS:
        primitive = operator.bind("triton")
        for way in ("fwd", "bwd"):
            name = f"{operator.name}_{way}"
            torch.library.impl(f"fastattn_triton::{name}", DEVICES, functools.partial(run, name))
        kernel = registry.Kernel(primitive, features)
        if operator is attention.OPERATOR:
            kernel = kernel._replace(declines=gpu.attention_declines)
        registry.register(operator.name, "triton", kernel)
    append = gpu.appending(functools.partial(run, "cache_append_"))
    registry.register("cache_append", "triton", registry.Kernel(append, frozenset()))
    losses.bind("triton", DEVICES)
    name = "cross_entropy_bwd_"
    torch.library.impl(f"fastattn_triton::{name}", DEVICES, functools.partial(run, name))


bind()
