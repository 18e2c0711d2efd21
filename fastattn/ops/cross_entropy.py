"""Cross-entropy of logits with class targets: label smoothing, z-loss, gradient in place on request."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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


class InPlace(torch.autograd.Function):
    """Cross-entropy whose backward writes the gradient over the logits."""

    @staticmethod
    def forward(ctx: Any, kernels: Any, logits: Tensor, target: Tensor, *scalars: float) -> Any:
        loss, lse = kernels.cross_entropy_fwd(logits, target, *scalars)
        ctx.save_for_backward(target, lse)
        ctx.logits, ctx.kernels, ctx.scalars = logits.detach(), kernels, scalars
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, dlse: Tensor) -> Any:
        if ctx.logits is None:
            raise RuntimeError(
                "cross_entropy: inplace_backward has used up the logits; a second backward needs them"
            )
        dlogits, ctx.logits = ctx.logits, None
        ctx.kernels.cross_entropy_bwd_(dloss, dlogits, *ctx.saved_tensors, *ctx.scalars)
        torch.autograd.graph.increment_version(dlogits)  # whoever saved the logits will be told
        return None, dlogits, *[None] * (1 + len(ctx.scalars))


def check_data(logits: Tensor, target: Tensor, ignore_index: int, *rest: float) -> None:
    checks.targets_fit(target, logits.shape[1], ignore_index)


dispatch.register_definition(OPERATOR, check=check_data)


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
    if logits.dim() == 0:
        raise ValueError(f"{name}: logits must be (..., V), got {checks.described(logits=logits)}")
    checks.is_flag(name, inplace_backward=inplace_backward)
    check_options(name, logits, target, ignore_index, label_smoothing, z_loss, reduction)
    flat, rows = logits.reshape(target.numel(), logits.shape[-1]), target.reshape(-1)
    overlap = inplace_backward and flat.stride(0) < flat.shape[1]  # rows of one memory: no place
    if flat.stride(-1) != 1 or overlap:
        flat = flat.contiguous()
    arguments = (flat, rows, ignore_index, float(label_smoothing), float(z_loss))
    operator = "cross_entropy_inplace" if inplace_backward else name
    loss, _ = dispatch.run(dispatch.request(operator, logits, [], arguments, name), backend)
    return reduced(loss, target, ignore_index, reduction, logits)


def check_options(
    name: str,
    x: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> None:
    """x is logits or hidden: target has its shape without the last dimension."""
    if target.dtype != torch.int64:
        raise TypeError(
            f"{name}: target must be int64 class indices, got {checks.dtype_name(target.dtype)}"
        )
    checks.has_shape(name, "target", target, x.shape[:-1], layout="one class for each row")
    checks.is_int(name, "ignore_index", ignore_index)
    checks.in_range(name, "label_smoothing", label_smoothing, 0, 1)
    checks.in_range(name, "z_loss", z_loss, 0)
    checks.one_of(name, "reduction", reduction, ("mean", "sum", "none"))


def total(loss: Tensor) -> Tensor:
    """The sum of (R,) in an order that no number of threads changes: torch shares a sum of 32768 numbers
    and more among its threads, but not the sum of a row."""
    if loss.shape[0] >= 16384:
        loss = torch.nn.functional.pad(loss, (0, -loss.shape[0] % 4096)).reshape(-1, 4096).sum(1)
    return loss.sum()


def reduced(
    loss: Tensor, target: Tensor, ignore_index: int, reduction: str, like: Tensor
) -> Tensor:
    """Losses of rows, fp32 -> the result, in like's dtype unless autocast is on."""
    if reduction == "none":
        loss = loss.reshape(target.shape)
    else:
        loss = total(loss)
        if reduction == "mean":
            loss = loss / (target != ignore_index).sum()
    return loss if dispatch.autocasts(like.device.type) else loss.to(like.dtype)
