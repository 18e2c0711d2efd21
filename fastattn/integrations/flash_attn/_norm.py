"""What all of flash-attn's normalisations are: norms of one sum, over fastattn's norm operator.

z = dropout(x * rowscale * layerscale) + dropout(x1) + residual;   y = norm(z) weight + bias;   y1 likewise
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.reference.philox import keep_mask, keep_scale
from ...ops import checks, dispatch
from ...ops.norm import NormSpec, run


class Inputs(NamedTuple):
    """x, x1, residual (..., C); weights and biases (C,); rowscale x's shape without C; layerscale (C,)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    x1: Tensor | None = None
    weight1: Tensor | None = None
    bias1: Tensor | None = None
    rowscale: Tensor | None = None
    layerscale: Tensor | None = None


class Settings(NamedTuple):
    """out_dtype None is x's; residual_dtype None is the residual's, or x's where there is none."""

    eps: float
    dropout_p: float = 0.0
    rms: bool = False
    zero_centered: bool = False
    out_dtype: torch.dtype | None = None
    residual_dtype: torch.dtype | None = None
    return_sum: bool = False


class Results(NamedTuple):
    """y1 with weight1, z if asked for; kept and kept1, bool, are what dropout kept, with dropout."""

    y: Tensor
    y1: Any
    z: Any
    kept: Tensor | None
    kept1: Tensor | None


def normalised(name: str, inputs: Inputs, settings: Settings) -> Results:
    """Every number is rounded once: z to the residual's dtype, y to x's. In float32 where more than x and a
    residual of its dtype meet; else the operator rounds."""
    i, s = inputs, settings
    check(name, inputs)
    like = i.x if i.residual is None else i.residual
    out_dtype, sum_dtype = s.out_dtype or i.x.dtype, s.residual_dtype or like.dtype
    drawn, drawn1 = (dispatch.draw_philox(i.x, None) if s.dropout_p > 0 else None for _ in range(2))
    kept, kept1 = kept_of(i.x, drawn, s.dropout_p), kept_of(i.x1, drawn1, s.dropout_p)
    x, residual = i.x, i.residual
    extras = (i.x1, i.weight1, i.rowscale, i.layerscale)
    wide = out_dtype != x.dtype or sum_dtype != like.dtype or any(e is not None for e in extras)
    if wide:
        x, residual = widened(inputs, s.dropout_p, kept1)
    spec = NormSpec(
        s.rms, s.eps, float(s.zero_centered), s.dropout_p, s.return_sum or i.weight1 is not None
    )
    found = run(name, x, residual, i.weight, i.bias, spec, None, None, drawn)
    both: tuple[Any, Any] = found if spec.return_residual else (found, None)
    y, z = both
    y1 = None
    if i.weight1 is not None:
        again = spec._replace(dropout_p=0.0, return_residual=False)
        y1 = run(name, z, None, i.weight1, i.bias1, again, None, None).to(out_dtype)
    z = z.to(sum_dtype) if s.return_sum else None
    return Results(y.to(out_dtype), y1, z, kept, kept1)


def check(name: str, inputs: Inputs) -> None:
    x = inputs.x
    checks.is_tensor(
        name, **{n: t for n, t in inputs._asdict().items() if t is not None or n == "x"}
    )
    if inputs.x1 is not None:
        checks.has_shape(name, "x1", inputs.x1, x.shape, layout="x's shape")
    if inputs.rowscale is not None and inputs.rowscale.numel() != x.shape[:-1].numel():
        raise ValueError(
            f"{name}: rowscale must have a number for each row, got "
            f"{checks.described(rowscale=inputs.rowscale, x=x)}"
        )
    if inputs.layerscale is not None:
        checks.has_shape(name, "layerscale", inputs.layerscale, x.shape[-1:], layout="(C,)")


def widened(inputs: Inputs, p: float, kept1: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x, scaled, and the residual with x1, in float32 (float64 of float64)."""
    x, residual, x1 = inputs.x, inputs.residual, inputs.x1
    precise = torch.promote_types(x.dtype, torch.float32)
    x = x.to(precise)
    if inputs.rowscale is not None:
        x = x * inputs.rowscale.reshape(x.shape[:-1])[..., None]
    if inputs.layerscale is not None:
        x = x * inputs.layerscale
    residual = None if residual is None else residual.to(precise)
    if x1 is not None:
        x1 = x1.to(precise)
        x1 = x1 if kept1 is None else torch.where(kept1, x1 * keep_scale(p), 0.0)
        residual = x1 if residual is None else residual + x1
    return x, residual


def kept_of(x: Tensor | None, drawn: Tensor | None, p: float) -> Tensor | None:
    """What the operator's dropout keeps of x: bool, x's shape."""
    if x is None or drawn is None:
        return None
    rows = torch.arange(x.shape[:-1].numel(), device=x.device)
    return keep_mask(rows, torch.zeros_like(rows), x.shape[-1], drawn, p).reshape(x.shape)
