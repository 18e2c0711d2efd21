"""Two forms of cross-entropy that any backend with the kernels of cross_entropy has as well."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from .. import registry
from ..kernels import chunked
from . import cross_entropy, linear_cross_entropy

# the schema of cross_entropy_bwd_
IN_PLACE = (
    f"(Tensor dloss, Tensor(a!) logits, Tensor target, Tensor lse, {cross_entropy.SCALARS}) -> ()"
)


def bind(backend: str, devices: Sequence[str]) -> None:
    """Gives `backend` both; its cross_entropy_bwd_ it implements itself."""
    bind_in_place(backend)
    bind_chunked(backend, devices)


def bind_in_place(backend: str) -> None:
    """cross_entropy whose gradient takes the logits' memory: no schema of its own but the backward."""
    namespace = f"fastattn_{backend}"
    torch.library.define(f"{namespace}::cross_entropy_bwd_", IN_PLACE)
    torch.library.register_fake(f"{namespace}::cross_entropy_bwd_", lambda *arguments: None)
    ops = getattr(torch.ops, namespace)
    forward = functools.partial(cross_entropy.InPlace.apply, ops)
    registry.register("cross_entropy_inplace", backend, registry.Kernel(forward, frozenset()))


def bind_chunked(backend: str, devices: Sequence[str]) -> None:
    """linear_cross_entropy: Python over torch's products and the cross_entropy kernels."""
    operator = linear_cross_entropy.OPERATOR
    primitive = operator.bind(backend)
    ops = getattr(torch.ops, f"fastattn_{backend}")
    for way, function in (("fwd", chunked.forward), ("bwd", chunked.backward)):
        torch.library.impl(
            f"fastattn_{backend}::linear_cross_entropy_{way}",
            devices,
            functools.partial(function, ops),
        )
    registry.register(
        operator.name, backend, registry.Kernel(primitive, linear_cross_entropy.FEATURES)
    )
