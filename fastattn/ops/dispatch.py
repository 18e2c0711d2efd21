"""From a checked call to the backend that serves it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import registry


def request(
    operator: str, anchor: Tensor, features: Iterable[str], arguments: tuple[Any, ...]
) -> registry.Call:
    return registry.Call(operator, anchor.device.type, anchor.dtype, frozenset(features), arguments)


def run(call: registry.Call, backend: str | None) -> Any:
    """The outputs of the operator, from the backend asked for or the first that serves the call."""
    kernel = registry.choose(call, backend)
    if not torch.is_autocast_enabled(call.device):
        return kernel.forward(*call.arguments)
    # the operator has cast its inputs already; inside, products must keep the accumulation dtype
    with torch.autocast(call.device, enabled=False):
        return kernel.forward(*call.arguments)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Under torch.autocast, floating tensors in its dtype, as for torch's own matmul and SDPA."""
    device = next(x for x in tensors if x is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def draw_philox(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """(seed, offset) of one call's dropout, drawn from `generator`: int64 on like's device."""
    return torch.randint(0, 2**31, (2,), dtype=torch.int64, device=like.device, generator=generator)
