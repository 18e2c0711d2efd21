"""From a checked call to the backend that serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import registry
from . import checks
from .operator import Operator


def register_definition(
    operator: Operator,
    features: Iterable[str] = (),
    *,
    check: Callable[..., None] = lambda *arguments: None,
    declines: Callable[..., str | None] = lambda *arguments: None,
) -> None:
    """The operator's definition as the backend "reference".

    check: of the data in a call's arguments, which kernels make themselves.
    """

    def forward(*arguments: Any) -> Any:
        if checks.can_read(*arguments):
            check(*arguments)
        return operator.define(*arguments)

    kernel = registry.Kernel(forward, frozenset(features), registry.ALL_FLOATS, declines)
    registry.register(operator.name, "reference", kernel)


def request(
    operator: str,
    anchor: Tensor,
    features: Iterable[str],
    arguments: tuple[Any, ...],
    name: str | None = None,
) -> registry.Call:
    """name: the function that the user called, if it is not the operator's."""
    return registry.Call(
        name or operator, operator, anchor.device.type, anchor.dtype, frozenset(features), arguments
    )


def run(call: registry.Call, backend: str | None) -> Any:
    """The outputs of the operator, from the backend asked for or the first that serves the call."""
    kernel = registry.choose(call, backend)
    try:
        if not autocasts(call.device):
            return kernel.forward(*call.arguments)
        # the operator has cast its inputs already; inside, products must keep the accumulation dtype
        with torch.autocast(call.device, enabled=False):
            return kernel.forward(*call.arguments)
    except ValueError as error:  # a kernel's, about data: it knows the operator, not the function
        operator, _, sentence = str(error).partition(": ")
        if operator == call.name or operator not in Operator.names:
            raise
        raise ValueError(f"{call.name}: {sentence}") from None


def autocasts(device: str) -> bool:
    """Is torch.autocast on for this type of device? It raises for meta, which it does not know."""
    return device != "meta" and torch.is_autocast_enabled(device)


def autocast(anchor: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Under torch.autocast, floating tensors in its dtype, as for torch's own matmul and SDPA."""
    device, tensors = anchor.device.type, (anchor, *others)
    if not autocasts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def draw_philox(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """(seed, offset) of one call's dropout, drawn from `generator`: int64 on like's device."""
    return torch.randint(0, 2**31, (2,), dtype=torch.int64, device=like.device, generator=generator)
