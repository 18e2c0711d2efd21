"""Cross-entropy of hidden @ weight^T + bias, the logits whole: what the chunked form must equal."""

import torch
from torch import Tensor

from .cross_entropy import cross_entropy


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    ahead: int,
    *,
    accumulate: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (R, E), weight (V, E), bias (V,), target (R,) -> loss (R,) in fp32, and nothing ahead."""
    acc = accumulate or torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(acc) @ weight.to(acc).t()
    if bias is not None:
        logits = logits + bias.to(acc)
    loss, _ = cross_entropy(
        logits, target, ignore_index, label_smoothing, z_loss, accumulate=accumulate
    )
    nothing = loss.new_empty(0)
    return loss, nothing, nothing.clone(), nothing.clone()
