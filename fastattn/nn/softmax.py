"""Softmax over the fused operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.softmax import softmax


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax. Without a dim torch guesses one and warns, and so does this."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.dim is None else softmax(input, self.dim)
