"""CrossEntropyLoss over the fused operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.cross_entropy import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, classes in dimension 1.

    Class weights and probability targets have no fused kernel: torch computes those.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input: (C,), (N, C) or (N, C, d1, ...); target: class indices without C."""
        if self.weight is not None or target.is_floating_point():
            return super().forward(input, target)
        return cross_entropy(
            input if input.dim() == 1 else input.movedim(1, -1),
            target,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )
