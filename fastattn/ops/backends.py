"""What can run here: every backend with its version, or the reason why it cannot."""

from __future__ import annotations

from importlib import metadata
from typing import NamedTuple

import torch

from .. import registry
from ..kernels import native


class Backend(NamedTuple):
    name: str
    usable: bool
    detail: str  # versions, or the reason why it is not usable


def backends() -> list[Backend]:
    """Every backend of the library: usable here or not, with versions or the reason."""
    return [
        Backend(name, reason is None, reason or version(name))
        for name, reason in registry.usable().items()
    ]


def version(name: str) -> str:
    if name == "cpu":
        return f"C++ kernels for {native.isa()}, {torch.get_num_threads()} threads"
    if name == "triton":
        where = (
            "" if torch.cuda.is_available() or torch.xpu.is_available() else ", emulated on the CPU"
        )
        return f"Triton {metadata.version('triton')}{where}"
    if name == "cuda":
        built = native.cuda_architectures()
        machines = ", ".join(f"sm_{a}" for a in built)
        on_gpu = f"compiled for {machines}" if built else "not in this build for a GPU"
        return f"CUDA C++ kernels, {on_gpu}; on a CPU's tensors run by a model of a GPU"
    return f"PyTorch {torch.__version__}"
