"""LayerNorm and RMSNorm over the fused norm operator, with the residual sum fused on request."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.checks import described
from ..ops.norm import layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm, and LayerNorm(dropout(input) + residual) in one pass."""

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, dropout_p: float = 0.0
    ) -> Tensor:
        """input, residual: (..., *normalized_shape) -> the same shape, in the dtype of their sum."""
        x, residual = prepared("LayerNorm", self.normalized_shape, input, residual)
        weight, bias = (flat(p, len(self.normalized_shape)) for p in (self.weight, self.bias))
        y: Tensor = layer_norm(x, weight, bias, self.eps, residual=residual, dropout_p=dropout_p)
        return y.reshape(input.shape)


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm, and RMSNorm(dropout(x) + residual) in one pass."""

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, dropout_p: float = 0.0
    ) -> Tensor:
        """x, residual: (..., *normalized_shape) -> the same shape, in the dtype of their sum."""
        rows, residual = prepared("RMSNorm", self.normalized_shape, x, residual)
        weight = flat(self.weight, len(self.normalized_shape))
        y: Tensor = rms_norm(rows, weight, self.eps, residual=residual, dropout_p=dropout_p)
        return y.reshape(x.shape)


def prepared(
    name: str, shape: tuple[int, ...], x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x and residual with the normalised dimensions as one, and x in the dtype of their sum: under
    autocast a bfloat16 branch joins a float32 residual, and the result is float32."""
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise RuntimeError(
            f"{name}: the input must end in normalized_shape {tuple(shape)}, got {tuple(x.shape)}"
        )
    if residual is not None:
        if residual.shape != x.shape:
            raise RuntimeError(
                f"{name}: residual must have the input's shape, got {described(input=x, residual=residual)}"
            )
        x = x.to(torch.promote_types(x.dtype, residual.dtype))
    return flat(x, len(shape)), flat(residual, len(shape))  # type: ignore[return-value]


def flat(x: Tensor | None, dims: int) -> Tensor | None:
    """The last dims as one: (..., C)."""
    if x is None or dims == 1:
        return x
    return x.reshape(*x.shape[:-dims], math.prod(x.shape[-dims:]))
