"""flash_attn.ops.rms_norm: as ops.layer_norm, without centring. Zhang and Sennrich 2019, arXiv:1910.07467."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._attend import raises_runtime_errors
from .._norm import Inputs, Settings, normalised
from .layer_norm import Subsets, add_norm, add_norm_of_subset, add_two_norms


@raises_runtime_errors
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x (..., C), weight (C,): like x."""
    return normalised("rms_norm", Inputs(x, weight), Settings(epsilon, rms=True)).y


@raises_runtime_errors
def dropout_add_rms_norm(
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
    """As dropout_add_layer_norm."""
    inputs = Inputs(x0, weight, bias, residual, rowscale=rowscale, layerscale=layerscale)
    settings = Settings(epsilon, dropout_p, rms=True, return_sum=prenorm)
    name = "dropout_add_rms_norm"
    return add_norm(name, inputs, settings, residual_in_fp32, return_dropout_mask)


@raises_runtime_errors
def dropout_add_rms_norm_subset(
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
    """As dropout_add_layer_norm_subset."""
    name = "dropout_add_rms_norm_subset"
    subsets = Subsets(x0_subset, out_subset, out_numrows, rowscale_const)
    inputs = Inputs(x0, weight, bias, residual, layerscale=layerscale)
    settings = Settings(epsilon, dropout_p, rms=True, return_sum=prenorm)
    return add_norm_of_subset(
        name, inputs, subsets, settings, residual_in_fp32, return_dropout_mask
    )


@raises_runtime_errors
def dropout_add_rms_norm_parallel_residual(
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
    """As dropout_add_layer_norm_parallel_residual."""
    name = "dropout_add_rms_norm_parallel_residual"
    inputs = Inputs(x0, weight0, bias0, residual, x1, weight1, bias1)
    settings = Settings(epsilon, dropout_p, rms=True, return_sum=prenorm)
    return add_two_norms(name, inputs, settings, residual_in_fp32, return_dropout_mask)


class RMSNorm(torch.nn.Module):
    """rms_norm as a module: weight (hidden_size,), no bias."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class DropoutAddRMSNorm(torch.nn.Module):
    """dropout_add_rms_norm as a module: weight (hidden_size,), no bias."""

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
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        """y, or (y, z) with prenorm."""
        return dropout_add_rms_norm(
            x0,
            residual,
            self.weight,
            None,
            self.p if self.training else 0.0,
            self.eps,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
        )
