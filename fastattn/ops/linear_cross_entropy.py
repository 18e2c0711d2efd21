"""Cross-entropy of a linear layer's output, without ever holding the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.reference.linear_cross_entropy import linear_cross_entropy as definition
from . import checks, cross_entropy, dispatch
from .operator import Operator

INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
AHEAD = "Tensor ahead_hidden, Tensor ahead_weight, Tensor ahead_bias"
# ahead: bits of (hidden, weight, bias) whose gradients of the summed loss the forward computes
SCALARS = f"{cross_entropy.SCALARS}, int ahead"


def fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *scalars: int
) -> tuple[Tensor, ...]:
    ahead = scalars[-1]
    sums = torch.promote_types(weight.dtype, torch.float32)  # over rows, not yet scaled
    gradients = [torch.empty_like(hidden) if ahead & 1 else hidden.new_empty(0)]
    for bit, x in enumerate((weight, bias), 1):
        wanted = x is not None and ahead >> bit & 1
        gradients.append(x.new_empty(x.shape, dtype=sums) if wanted else hidden.new_empty(0))  # type: ignore[union-attr]
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32), *gradients


OPERATOR = Operator(
    "linear_cross_entropy",
    f"({INPUTS}, {SCALARS}) -> (Tensor loss, {AHEAD})",
    f"(Tensor dloss, {INPUTS}, {AHEAD}, {SCALARS}, int needs) -> "
    "(Tensor dhidden, Tensor dweight, Tensor dbias)",
    differentiable=["hidden", "weight", "bias"],
    outputs=1,
    define=definition,
    fake=fake,
)
FEATURES = frozenset({"bias"})


def check_data(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *scalars: Any
) -> None:
    checks.targets_fit(target, weight.shape[0], scalars[0])


dispatch.register_definition(OPERATOR, FEATURES, check=check_data)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(hidden @ weight^T + bias, target) in chunks of rows.

    hidden: (..., E), weight: (V, E) as torch.nn.Linear stores it, bias: (V,), target: (...) int64.
    Options, result and errors as in cross_entropy; the loss has hidden's dtype. At most 52 MB of
    logits exist at a time. The products are torch's, so bits may depend on its number of threads.
    Wijmans et al. 2024, arXiv:2411.09009.
    """
    name = "linear_cross_entropy"
    checks.is_tensor(name, hidden=hidden, weight=weight, target=target)
    if bias is not None:
        checks.is_tensor(name, bias=bias)
    hidden, weight, bias = dispatch.autocast(hidden, weight, bias)
    checks.is_float(name, hidden=hidden, weight=weight, bias=bias)
    checks.same_dtype(name, hidden=hidden, weight=weight)
    checks.same_device(name, hidden=hidden, weight=weight, bias=bias, target=target)
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: hidden must be (..., E) and weight (V, E), got "
            f"{checks.described(hidden=hidden, weight=weight)}"
        )
    if bias is not None:
        checks.has_shape(name, "bias", bias, weight.shape[:1], layout="(V,)")
    cross_entropy.check_options(
        name, hidden, target, ignore_index, label_smoothing, z_loss, reduction
    )
    flat, rows = hidden.reshape(target.numel(), hidden.shape[-1]), target.reshape(-1)
    ahead = 0
    if reduction != "none" and torch.is_grad_enabled():
        inputs = (hidden, weight, bias)
        ahead = sum((x is not None and x.requires_grad) << bit for bit, x in enumerate(inputs))
    arguments = (
        flat,
        weight,
        bias,
        rows,
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        ahead,
    )
    features = [] if bias is None else ["bias"]
    loss, *_ = dispatch.run(dispatch.request(name, hidden, features, arguments), backend)
    return cross_entropy.reduced(loss, target, ignore_index, reduction, hidden)
