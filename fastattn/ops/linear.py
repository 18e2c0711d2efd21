"""A linear layer whose weight is int8 with scales, or bfloat16: read once, it bounds the time of few rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..kernels.reference.linear import dequantized
from ..kernels.reference.linear import linear as definition
from . import checks, dispatch, inference
from .operator import Operator

ARGUMENTS = "Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int group_size"
OPERATOR = Operator(
    "linear",
    f"({ARGUMENTS}) -> Tensor y",
    f"(Tensor dy, {ARGUMENTS}, int needs) -> (Tensor dx, Tensor dbias)",
    differentiable=["x", "bias"],
    define=definition,
    fake=lambda x, weight, *rest: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
FEATURES = frozenset({"groups"})
dispatch.register_definition(OPERATOR, FEATURES)

GROUP = 32  # what kernels take at a time: a group holds whole ones
_plain: Any = None


def bind() -> None:
    """Gives it to the CPU kernels: gradients are products of theirs, in Python."""
    global _plain
    primitive = OPERATOR.bind("cpu")
    torch.library.impl("fastattn_cpu::linear_bwd", "CPU", backward)
    torch.library.define("fastattn_cpu::linear_plain", f"({ARGUMENTS}) -> Tensor")
    torch.library.register_fake("fastattn_cpu::linear_plain", OPERATOR.fake)
    _plain = torch.ops.fastattn_cpu.linear_plain.default
    registry.register("linear", "cpu", registry.Kernel(primitive, FEATURES))


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    needs: int,
) -> tuple[Tensor, Tensor]:
    """dx = dy W; W has no gradient."""
    rows = dy.reshape(-1, weight.shape[0]).float()
    dx, dbias = x.new_empty(0), x.new_empty(0)
    if needs & 1:
        whole = dequantized(weight, scale, group_size, torch.float32)
        dx = torch.empty_like(x)
        dx.copy_(torch.ops.fastattn_cpu.matmul(rows, whole, None).view(x.shape))
    if needs & 2 and bias is not None:
        dbias = rows.sum(0).to(bias.dtype)
    return dx, dbias


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    group_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """x W^T + bias: (..., N) in x's dtype, summed in fp32; x is not rounded.

    x: (..., K) float; weight: (N, K), int8 with a scale or bfloat16 without; scale: (N,), or
    (N, ceil(K / group_size)) where group_size inputs share one, a multiple of 32; bias: (N,).
    weight and scale are constants: x and bias may have gradients.
    """
    out = without_gradient(x, weight, scale, bias, group_size) if backend is None else None
    if out is not None:
        return out
    checks.is_tensor("linear", x=x, weight=weight)
    for name, given in (("scale", scale), ("bias", bias)):
        if given is not None:
            checks.is_tensor("linear", **{name: given})
    x, bias = dispatch.autocast(x, bias)
    checks.is_float("linear", x=x, scale=scale, bias=bias)
    checks.same_device("linear", x=x, weight=weight, scale=scale, bias=bias)
    check_weight(x, weight, scale, group_size)
    if bias is not None:
        checks.has_shape("linear", "bias", bias, weight.shape[:1], layout="(N,)")
    if x.dim() == 1:
        return linear(x[None], weight, scale, bias=bias, group_size=group_size, backend=backend)[0]
    features = ["groups"] if group_size else []
    arguments = (x, weight, scale, bias, group_size or 0)
    y: Tensor = dispatch.run(dispatch.request("linear", x, features, arguments), backend)
    return y


def check_weight(x: Tensor, weight: Tensor, scale: Tensor | None, group_size: int | None) -> None:
    checks.is_weight("linear", weight, scale)
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x must be (..., K) and weight (N, K), got {checks.described(x=x, weight=weight)}"
        )
    if group_size is not None:
        check_group(weight, group_size)
    if scale is not None:
        shape, layout = scale_shape(weight, group_size)
        checks.has_shape("linear", "scale", scale, shape, layout=layout)
    checks.is_frozen("linear", weight=weight, scale=scale)


def check_group(weight: Tensor, group_size: int) -> None:
    checks.is_int("linear", "group_size", group_size, GROUP)
    if group_size % GROUP:
        raise ValueError(f"linear: group_size must be a multiple of {GROUP}, got {group_size}")
    if weight.dtype != torch.int8:
        raise ValueError(
            "linear: group_size needs a weight in int8, for it says which scale is whose"
        )


def scale_shape(weight: Tensor, group_size: int | None) -> tuple[tuple[int, ...], str]:
    N, K = weight.shape
    if group_size is None:
        return (N,), "(N,)"
    return (N, -(-K // group_size)), "(N, ceil(K / group_size))"


# ---- the short way ------------------------------------------------------------------------------


def without_gradient(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, group_size: int | None
) -> Tensor | None:
    """linear() past dispatch and autograd, as inference.attend(): None where it must go the long way,
    which says what is wrong. Shapes and dtypes the operator checks itself."""
    if _plain is None or inference.transformed():
        return None
    if not all(t is None or inference.is_bare(t) for t in (x, weight, scale, bias)):
        return None
    try:
        return _plain(x, weight, scale, bias, group_size or 0)
    except RuntimeError:
        return None
