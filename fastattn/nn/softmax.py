"""Softmax over the fused operator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.softmax import softmax


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax. Without a dim torch guesses one and warns, and so does this."""

    def forward(self, input: Tensor) -> Tensor:
        if self.dim is None:
            return super().forward(input)
        y = softmax(input, self.dim)
        # autocast makes a softmax float32 on a GPU, and leaves its dtype alone on a CPU
        return y.to(input.dtype) if input.device.type == "cpu" else y
