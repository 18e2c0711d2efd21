"""CrossEntropyLoss over the fused operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.cross_entropy import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss, classes in dimension 1.

    Class weights and probability targets have no fused kernel: torch computes those, and raises its
    own errors about what it does not take either.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input: (C,), (N, C) or (N, C, d1, ...); target: class indices without C, int64 or uint8."""
        if self.weight is not None or not are_classes(input, target):
            return super().forward(input, target)
        return cross_entropy(
            input if input.dim() == 1 else input.movedim(1, -1),
            target.long().reshape(()) if input.dim() == 1 else target.long(),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )


def are_classes(input: Tensor, target: Tensor) -> bool:
    """Whether torch takes target as class indices of input, by dtype and shape."""
    if not isinstance(input, Tensor) or not isinstance(target, Tensor) or input.dim() == 0:
        return False
    if not input.is_floating_point() or target.dtype not in (torch.int64, torch.uint8):
        return False
    if input.dim() == 1:
        return target.shape in ((), (1,))
    return target.shape == (len(input), *input.shape[2:])
