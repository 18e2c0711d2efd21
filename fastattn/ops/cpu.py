"""What the C++ CPU kernels honour, operator by operator; anything else they decline."""

from __future__ import annotations

import torch

from .. import registry
from ..kernels import native
from . import inference, linear, losses
from .catalogue import KERNELS

MATMULS = {
    "matmul": "(Tensor a, Tensor b, Tensor? bias) -> Tensor",
    "matmul_add_": "(Tensor(a!) out, Tensor a, Tensor b) -> ()",
}


def bind() -> None:
    missing = native.load()
    if missing:
        registry.mark_unusable("cpu", missing)
        return
    for operator, features in KERNELS:
        registry.register(operator.name, "cpu", registry.Kernel(operator.bind("cpu"), features))
    for name, schema in MATMULS.items():
        torch.library.define(f"fastattn_cpu::{name}", schema)
    inference.bind()
    linear.bind()
    losses.bind("cpu", ("CPU",))


bind()
