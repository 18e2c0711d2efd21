"""Joins attentions over parts of the keys into the attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks


def merge(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """(out, lse) over the union of keys from each part's out (B, Hq, Sq, Dv) and lse (B, Hq, Sq).

    Differentiable in both; order does not matter but to rounding. Packed parts, (total, Hq, Dv) and
    (Hq, total), merge likewise. A part that a row saw nothing of has lse -inf and counts for nothing.
    Rabe and Staats 2021, arXiv:2112.05682, section 3; ring attention, cascades and split-KV use it.
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        check_parts(name, parts)
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"merge: outs and lses must be as many and at least one, got {len(outs)} and {len(lses)}"
        )
    checks.same_device("merge", outs=outs[0], lses=lses[0])
    checks.has_dims("merge", "outs", outs[0], 3, 4, layout="(B, Hq, Sq, Dv) or (total, Hq, Dv)")
    packed = outs[0].dim() == 3
    rows = (outs[0].shape[1], outs[0].shape[0]) if packed else outs[0].shape[:-1]
    checks.has_shape(
        "merge", "lses", lses[0], rows, layout="(Hq, total)" if packed else "outs' shape without Dv"
    )
    weights = torch.stack(tuple(lses))
    largest = weights.detach().amax(0)
    largest = torch.where(largest == -torch.inf, 0.0, largest)  # a row that saw nothing
    weights = torch.exp(weights - largest)
    total = weights.sum(0)
    seen = total > 0
    safe = torch.where(seen, total, 1.0)
    lse = torch.where(seen, largest + torch.log(safe), -torch.inf)
    weights = weights / safe
    if packed:
        weights = weights.transpose(1, 2)
    out = sum(w[..., None] * o.to(w.dtype) for w, o in zip(weights, outs, strict=True))
    return out.to(outs[0].dtype), lse


def check_parts(name: str, parts: Any) -> None:
    """Floating tensors of one shape, dtype and device."""
    if not isinstance(parts, (list, tuple, Tensor)) or (
        isinstance(parts, Tensor) and not parts.dim()
    ):
        raise TypeError(f"merge: {name} must be a sequence of tensors, got {checks.shown(parts)}")
    named = {f"{name}[{i}]": x for i, x in enumerate(parts)}
    for check in (checks.is_tensor, checks.is_float, checks.same_dtype, checks.same_device):
        check("merge", **named)
    if len({x.shape for x in parts}) > 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in parts)
        raise ValueError(f"merge: {name} must have one shape, got {shapes}")
