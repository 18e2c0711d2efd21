"""flash_attn.losses.cross_entropy: CrossEntropyLoss with z-loss and a scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....ops.cross_entropy import total
from ..ops.triton.cross_entropy import cross_entropy_loss

REDUCTIONS = ("mean", "none", "sum")


class CrossEntropyLoss(torch.nn.Module):
    """The loss of input (N, V) with target (N,) int64, float32; mean is over the targets not ignored.

    Arguments as in cross_entropy_loss; return_z_loss: (loss, z_loss), the second without a gradient.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise NotImplementedError(
                f"CrossEntropyLoss: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
            )
        self.ignore_index, self.reduction, self.label_smoothing = (
            ignore_index,
            reduction,
            label_smoothing,
        )
        self.logit_scale, self.lse_square_scale = logit_scale, lse_square_scale
        self.inplace_backward, self.process_group = inplace_backward, process_group
        self.return_z_loss = return_z_loss

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, () or (N,) for reduction none; with return_z_loss also its z-loss part."""
        loss, z_loss = cross_entropy_loss(
            input,
            target,
            precomputed_lse,
            self.label_smoothing,
            self.logit_scale,
            self.lse_square_scale,
            self.ignore_index,
            self.inplace_backward,
            self.process_group,
        )
        loss = self.reduced(loss, target)
        return (loss, self.reduced(z_loss, target)) if self.return_z_loss else loss

    def reduced(self, loss: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "none":
            return loss
        whole = total(loss)
        return whole / (target != self.ignore_index).sum() if self.reduction == "mean" else whole
