"""Cross-entropy of logits with class targets: label smoothing, z-loss, gradient in place on request."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry
from ..kernels import reference
from . import checks, dispatch
from .operator import Operator

SCALARS = "int ignore_index, float label_smoothing, float z_loss"


def fake(logits: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))  # type: ignore[return-value]


OPERATOR = Operator(
    "cross_entropy",
    f"(Tensor logits, Tensor target, {SCALARS}) -> (Tensor loss, Tensor lse)",
    f"(Tensor dloss, Tensor logits, Tensor target, Tensor lse, {SCALARS}) -> Tensor",
    differentiable=["logits"],
    outputs=1,
    define=reference.cross_entropy,
    fake=fake,
)


def definition(
    logits: Tensor, target: Tensor, ignore_index: int, *rest: float
) -> tuple[Tensor, Tensor]:
    """The reference, after the check of the targets that kernels make themselves."""
    if not torch.compiler.is_compiling():
        checks.targets_fit(target, logits.shape[1], ignore_index)
    return reference.cross_entropy(logits, target, ignore_index, *rest)


registry.register(
    "cross_entropy", "reference", registry.Kernel(definition, frozenset(), registry.ALL_FLOATS)
)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of logits (..., V) with class indices target (...), int64.

    Equals torch.nn.functional.cross_entropy with the classes last: mean is over the targets that are
    not ignored, and NaN when all are. z_loss adds z_loss * lse^2 a row (PaLM, arXiv:2204.02311).
    reduction: mean, sum, or none for target's shape. The loss has the logits' dtype, float32 under
    autocast, and is computed in float32. inplace_backward: the backward writes the gradient over the
    logits, which saves their size in memory and their values for nobody. Only backends that can do
    it serve such a call. Raises ValueError for a target outside [0, V).
    """
    name = "cross_entropy"
    checks.is_tensor(name, logits=logits, target=target)
    checks.is_float(name, logits=logits)
    checks.same_device(name, logits=logits, target=target)
    if target.dtype != torch.int64:
        raise TypeError(
            f"{name}: target must be int64 class indices, got {checks.dtype_name(target.dtype)}"
        )
    if logits.dim() == 0:
        raise ValueError(f"{name}: logits must be (..., V), got {checks.described(logits=logits)}")
    checks.has_shape(name, "target", target, logits.shape[:-1], layout="logits' shape without V")
    checks.in_range(name, "label_smoothing", label_smoothing, 0, 1)
    checks.in_range(name, "z_loss", z_loss, 0)
    checks.one_of(name, "reduction", reduction, ("mean", "sum", "none"))
    flat, rows = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    arguments = (flat, rows, int(ignore_index), float(label_smoothing), float(z_loss))
    features = ["inplace_backward"] if inplace_backward else []
    loss, _ = dispatch.run(dispatch.request(name, logits, features, arguments), backend)
    if reduction == "none":
        loss = loss.reshape(target.shape)
    else:
        loss = loss.sum()
        if reduction == "mean":
            loss = loss / (rows != ignore_index).sum()
    return loss if torch.is_autocast_enabled(logits.device.type) else loss.to(logits.dtype)
