"""LayerNorm and RMSNorm over the fused norm operator, with the residual sum fused on request."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.norm import layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm, and LayerNorm(dropout(input) + residual) in one pass."""

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, dropout_p: float = 0.0
    ) -> Tensor:
        """input, residual: (..., *normalized_shape) -> the same shape."""
        x, weight, bias, residual = (
            flat(t, len(self.normalized_shape)) for t in (input, self.weight, self.bias, residual)
        )
        y: Tensor = layer_norm(x, weight, bias, self.eps, residual=residual, dropout_p=dropout_p)  # type: ignore[arg-type]
        return y.reshape(input.shape)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm, and RMSNorm(dropout(x) + residual) in one pass."""

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, dropout_p: float = 0.0
    ) -> Tensor:
        """x, residual: (..., *normalized_shape) -> the same shape."""
        rows, weight, residual = (
            flat(t, len(self.normalized_shape)) for t in (x, self.weight, residual)
        )
        y: Tensor = rms_norm(rows, weight, self.eps, residual=residual, dropout_p=dropout_p)  # type: ignore[arg-type]
        return y.reshape(x.shape)


def flat(x: Tensor | None, dims: int) -> Tensor | None:
    """The last dims as one: (..., C)."""
    if x is None or dims == 1:
        return x
    return x.reshape(*x.shape[:-dims], math.prod(x.shape[-dims:]))
