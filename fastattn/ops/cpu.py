"""What the C++ CPU kernels honour, operator by operator; anything else they decline."""

from __future__ import annotations

import functools

import torch

from .. import registry
from ..kernels import chunked, native
from . import activation, attention, cross_entropy, linear_cross_entropy, norm, rotary, softmax
from .operator import Operator

KERNELS: list[tuple[Operator, frozenset[str]]] = [
    (attention.OPERATOR, attention.FEATURES),
    (norm.OPERATOR, norm.FEATURES),
    (softmax.OPERATOR, softmax.FEATURES),
    (cross_entropy.OPERATOR, frozenset()),
    (activation.GELU, frozenset({"bias"})),
    (activation.GLU, frozenset()),
    (rotary.OPERATOR, frozenset({"positions"})),
]


def bind() -> None:
    missing = native.load()
    if missing:
        registry.mark_unusable("cpu", missing)
        return
    for operator, features in KERNELS:
        registry.register(operator.name, "cpu", registry.Kernel(operator.bind("cpu"), features))
    bind_in_place()
    bind_chunked()


def bind_in_place() -> None:
    """cross_entropy whose gradient takes the logits' memory: no schema of its own but the backward."""
    torch.library.define(
        "fastattn_cpu::cross_entropy_bwd_",
        f"(Tensor dloss, Tensor(a!) logits, Tensor target, Tensor lse, {cross_entropy.SCALARS}) -> ()",
    )
    torch.library.register_fake("fastattn_cpu::cross_entropy_bwd_", lambda *arguments: None)
    forward = functools.partial(cross_entropy.InPlace.apply, torch.ops.fastattn_cpu)
    registry.register("cross_entropy_inplace", "cpu", registry.Kernel(forward, frozenset()))


def bind_chunked() -> None:
    """linear_cross_entropy: Python over torch's products and the cross_entropy kernel."""
    operator = linear_cross_entropy.OPERATOR
    primitive = operator.bind("cpu")
    torch.library.impl("fastattn_cpu::linear_cross_entropy_fwd", ("CPU",), chunked.forward)
    torch.library.impl("fastattn_cpu::linear_cross_entropy_bwd", ("CPU",), chunked.backward)
    registry.register(
        operator.name, "cpu", registry.Kernel(primitive, linear_cross_entropy.FEATURES)
    )


bind()
