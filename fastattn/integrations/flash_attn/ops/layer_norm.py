"""flash_attn.ops.layer_norm: LayerNorm of dropout(x0) + residual, as flash-attn's CUDA extension has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....kernels.reference.philox import keep_scale
from ....ops import checks
from .._attend import raises_runtime_errors
from .._norm import Inputs, Settings, normalised


@raises_runtime_errors
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """x (..., C), weight, bias (C,): like x."""
    return normalised("layer_norm", Inputs(x, weight, bias), Settings(epsilon)).y


@raises_runtime_errors
def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """y = LayerNorm(z) for z = dropout(x0 * rowscale * layerscale) + residual: y, then z with prenorm,
    then the mask (uint8, 1 is kept) with return_dropout_mask; y alone if there is nothing else.

    x0, residual: (..., C); rowscale: (...,); layerscale: (C,). y has x0's dtype; z the residual's, or where
    there is none float32 with residual_in_fp32, else x0's. Raises RuntimeError, TypeError for a wrong type.
    """
    inputs = Inputs(x0, weight, bias, residual, rowscale=rowscale, layerscale=layerscale)
    settings = Settings(epsilon, dropout_p, return_sum=prenorm)
    name = "dropout_add_layer_norm"
    return add_norm(name, inputs, settings, residual_in_fp32, return_dropout_mask)


def add_norm(
    name: str, inputs: Inputs, settings: Settings, residual_in_fp32: bool, return_mask: bool
) -> Any:
    """What dropout_add_layer_norm and dropout_add_rms_norm return."""
    if residual_in_fp32 and inputs.residual is None:
        settings = settings._replace(residual_dtype=torch.float32)
    found = normalised(name, inputs, settings)
    results = [found.y] + ([found.z] if settings.return_sum else [])
    results += [as_bytes(found.kept, inputs.x)] if return_mask else []
    return results[0] if len(results) == 1 else tuple(results)


def as_bytes(kept: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.uint8) if kept is None else kept.to(torch.uint8)


@raises_runtime_errors
def dropout_add_layer_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """LayerNorms by two sets of weights of z = dropout(x0) + dropout(x1) + residual: (y0, y1), y1 None
    without weight1, then z with prenorm, then both masks with return_dropout_mask. Otherwise as
    dropout_add_layer_norm."""
    name = "dropout_add_layer_norm_parallel_residual"
    inputs = Inputs(x0, weight0, bias0, residual, x1, weight1, bias1)
    settings = Settings(epsilon, dropout_p, return_sum=prenorm)
    return add_two_norms(name, inputs, settings, residual_in_fp32, return_dropout_mask)


def add_two_norms(
    name: str, inputs: Inputs, settings: Settings, residual_in_fp32: bool, return_masks: bool
) -> Any:
    if residual_in_fp32 and inputs.residual is None:
        settings = settings._replace(residual_dtype=torch.float32)
    found = normalised(name, inputs, settings)
    z = (found.z,) if settings.return_sum else ()
    masks = (
        (as_bytes(found.kept, inputs.x), as_bytes(found.kept1, inputs.x)) if return_masks else ()
    )
    return (found.y, found.y1, *z, *masks)


@raises_runtime_errors
def dropout_add_layer_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None = None,
    x0_subset: Tensor | None = None,
    out_subset: Tensor | None = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """dropout_add_layer_norm where some rows have no x0, and some are not wanted.

    x0_subset (...,): for each row of the sum the row of x0 (N0, C) that belongs there, counted from 1, or 0
    for none. out_subset (...,): likewise the row of y (out_numrows, C) that it becomes. None: all, in order.
    rowscale_const multiplies x0. z has all rows; the mask has x0's.
    """
    name = "dropout_add_layer_norm_subset"
    subsets = Subsets(x0_subset, out_subset, out_numrows, rowscale_const)
    inputs = Inputs(x0, weight, bias, residual, layerscale=layerscale)
    settings = Settings(epsilon, dropout_p, return_sum=prenorm)
    return add_norm_of_subset(
        name, inputs, subsets, settings, residual_in_fp32, return_dropout_mask
    )


class Subsets:
    """Which rows have an x0, and which are wanted: tensors of 1-based rows, 0 for none."""

    def __init__(
        self, x0: Tensor | None, out: Tensor | None, out_numrows: int, rowscale: float
    ) -> None:
        self.x0, self.out, self.out_numrows, self.rowscale = x0, out, out_numrows, rowscale

    def spread(self, x0: Tensor) -> Tensor:
        """x0 (N0, C) where it belongs, 0 elsewhere: (rows, C)."""
        flat = x0.reshape(-1, x0.shape[-1])
        if self.x0 is None:
            return flat
        at = self.x0.reshape(-1).long()
        return torch.where((at > 0)[:, None], flat[(at - 1).clamp(min=0)], 0.0)

    def wanted(self, y: Tensor) -> Tensor:
        if self.out is None:
            return y
        at = self.out.reshape(-1).long()
        rows = at.nonzero()[:, 0]
        return y.new_zeros(self.out_numrows, y.shape[-1]).index_copy(0, at[rows] - 1, y[rows])


def add_norm_of_subset(
    name: str,
    inputs: Inputs,
    subsets: Subsets,
    settings: Settings,
    residual_in_fp32: bool,
    return_mask: bool,
) -> Any:
    """Dropout and scales act on x0's own rows, before they are spread; then it is a norm as any other."""
    x0, p = inputs.x, settings.dropout_p
    checks.is_tensor(name, x0=x0)
    checks.in_range(name, "dropout_p", p, 0, 1)
    kept = None
    x = x0.to(torch.promote_types(x0.dtype, torch.float32)) * subsets.rowscale
    if inputs.layerscale is not None:
        x = x * inputs.layerscale
    if p > 0:
        kept = torch.rand_like(x) >= p
        x = torch.where(kept, x * keep_scale(p), 0.0)
    residual = inputs.residual
    if residual is not None:
        residual = residual.reshape(-1, residual.shape[-1])
    like = torch.float32 if residual_in_fp32 else x0.dtype
    settings = settings._replace(
        dropout_p=0.0,
        out_dtype=x0.dtype,
        residual_dtype=like if residual is None else residual.dtype,
    )
    whole = Inputs(subsets.spread(x), inputs.weight, inputs.bias, residual)
    found = normalised(name, whole, settings)
    results = [subsets.wanted(found.y)] + ([found.z] if settings.return_sum else [])
    results += [as_bytes(kept, x0)] if return_mask else []
    return results[0] if len(results) == 1 else tuple(results)


class DropoutAddLayerNorm(torch.nn.Module):
    """dropout_add_layer_norm as a module: weight, bias (hidden_size,)."""

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.prenorm, self.p, self.eps, self.residual_in_fp32 = prenorm, p, eps, residual_in_fp32
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        """y, or (y, z) with prenorm."""
        return dropout_add_layer_norm(
            x0,
            residual,
            self.weight,
            self.bias,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )
