"""layer_norm and rms_norm over the last dimension, with residual and dropout, as one operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import reference
from . import checks, dispatch, inference
from .operator import Operator

INPUTS = "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? philox"
SCALARS = "bool rms, float eps, float weight_offset, float dropout_p, bool return_residual"


class NormSpec(NamedTuple):
    rms: bool
    eps: float
    weight_offset: float = 0.0
    dropout_p: float = 0.0
    return_residual: bool = False


def fake(
    x: Tensor, residual: Tensor | None, weight: Any, bias: Any, philox: Any, *scalars: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec = NormSpec(*scalars)
    summed = x.new_empty(0)
    if spec.return_residual:
        summed = x.new_empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)
    mean = x.new_empty(0 if spec.rms else x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), summed, mean, x.new_empty(x.shape[:-1], dtype=torch.float32)


OPERATOR = Operator(
    "norm",
    f"({INPUTS}, {SCALARS}) -> (Tensor y, Tensor summed, Tensor mean, Tensor rstd)",
    f"(Tensor? dy, Tensor? dsummed, {INPUTS}, Tensor mean, Tensor rstd, {SCALARS}, int needs) -> "
    "(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    differentiable=["x", "residual", "weight", "bias"],
    outputs=2,
    define=reference.norm,
    fake=fake,
)
FEATURES = frozenset({"residual", "dropout", "weight_offset", "rms"})
dispatch.register_definition(OPERATOR, FEATURES)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    return_residual: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Any:
    """(z - mean(z)) / sqrt(var(z) + eps) * weight + bias, for z = dropout(x) + residual.

    x: (..., C), normalised over C; weight, bias: (C,), which may be float32 beside a 16-bit x and
    are applied before the cast; residual: x's shape, float32 or x's dtype. The sum and the statistics
    are kept in float32. dropout_p: of x, always applied, drawn from generator.
    Returns y of x's shape and dtype, or (y, z) with z in residual's dtype when return_residual.
    Without options it equals torch.nn.functional.layer_norm(x, (C,), weight, bias, eps).
    """
    spec = NormSpec(False, eps, 0.0, dropout_p, return_residual)
    return run("layer_norm", x, residual, weight, bias, spec, generator, backend)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    return_residual: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Any:
    """z / sqrt(mean(z^2) + eps) * (weight + weight_offset), for z = dropout(x) + residual.

    weight_offset: 1 for Gemma, whose weights are stored around 0. eps None is x's machine epsilon, as
    in torch.nn.functional.rms_norm, which this equals without options. Otherwise as layer_norm.
    Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if eps is None:
        checks.is_tensor("rms_norm", x=x)
        checks.is_float("rms_norm", x=x)
        eps = torch.finfo(x.dtype).eps
    spec = NormSpec(True, eps, weight_offset, dropout_p, return_residual)
    return run("rms_norm", x, residual, weight, None, spec, generator, backend)


def is_plain(spec: NormSpec) -> bool:
    """Nothing but a norm, said in the types that a kernel takes."""
    types = tuple(map(type, spec))
    return types == (bool, float, float, float, bool) and spec == NormSpec(spec.rms, spec.eps)


def run(
    name: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    spec: NormSpec,
    generator: torch.Generator | None,
    backend: str | None,
    philox: Tensor | None = None,
) -> Any:
    """philox: (seed, offset) of the dropout, for who wants to know them; None: drawn from generator."""
    if backend is None and generator is None and is_plain(spec):
        y = inference.normalise(x, residual, weight, bias, spec.rms, spec.eps)
        if y is not None:
            return y
    check(name, x, residual, weight, bias, spec, generator)
    rms, eps, offset, dropout_p, return_residual = spec
    spec = NormSpec(rms, float(eps), float(offset), float(dropout_p), return_residual)
    if spec.dropout_p == 0:
        philox = None
    elif philox is None:
        philox = dispatch.draw_philox(x, generator)
    features = {
        "residual": residual is not None,
        "dropout": spec.dropout_p > 0,
        "weight_offset": spec.weight_offset != 0,
        "rms": spec.rms,
    }
    call = dispatch.request(
        "norm",
        x,
        (n for n, used in features.items() if used),
        (x, residual, weight, bias, philox, *spec),
        name,
    )
    y, summed, _, _ = dispatch.run(call, backend)
    return (y, summed) if spec.return_residual else y


def check(
    name: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    spec: NormSpec,
    generator: torch.Generator | None,
) -> None:
    optional = {"residual": residual, "weight": weight, "bias": bias}
    given = {"x": x, **{n: t for n, t in optional.items() if t is not None}}
    checks.is_tensor(name, **given)
    checks.is_float(name, **given)
    checks.same_device(name, **given)
    if x.dim() == 0:
        raise ValueError(f"{name}: x must be (..., C), got {checks.described(x=x)}")
    for n in ("weight", "bias"):
        if n in given:
            checks.has_shape(name, n, given[n], x.shape[-1:], layout="(C,)")
    if residual is not None:
        checks.has_shape(name, "residual", residual, x.shape, layout="x's shape")
    checks.in_range(name, "eps", spec.eps, 0)
    checks.in_range(name, "dropout_p", spec.dropout_p, 0, 1)
    checks.is_finite(name, "weight_offset", spec.weight_offset)
    checks.is_flag(name, return_residual=spec.return_residual)
    checks.is_generator(name, generator, x)
