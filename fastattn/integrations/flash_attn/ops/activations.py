"""flash_attn.ops.activations: gelu (its tanh form), squared relu and SwiGLU, with their backwards by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ....ops.activation import gelu
from ....ops.activation import swiglu as fused_swiglu
from .._attend import raises_runtime_errors


@raises_runtime_errors
def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    """gelu(y + bias), tanh form; y (..., C), bias (C,)."""
    return gelu(y, bias=bias, approximate="tanh")


bias_gelu_impl = bias_gelu


def bias_gelu_back(g: Tensor, y: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(dy, dbias) of bias_gelu for the gradient g."""
    dy = gelu_bwd(g, y + bias)
    return dy.to(y.dtype), dy.flatten(0, -2).sum(0, dtype=bias.dtype)


@raises_runtime_errors
def gelu_fwd(x: Tensor) -> Tensor:
    """gelu(x), tanh form."""
    return gelu(x, approximate="tanh")


fast_gelu_impl = gelu_fwd


def gelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """dx of gelu_fwd for the gradient g."""
    return torch.ops.aten.gelu_backward(g.to(x.dtype), x, approximate="tanh")


def relu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """dx of relu for the gradient g; it is g at 0, as in flash-attn."""
    return torch.where(x >= 0, g, 0.0).to(x.dtype)


def sqrelu_fwd(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return F.relu(x).square()


def sqrelu_bwd(g: Tensor, x: Tensor) -> Tensor:
    """dx of sqrelu_fwd for the gradient g."""
    return (2.0 * g * F.relu(x)).to(x.dtype)


@raises_runtime_errors
def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y."""
    return fused_swiglu(x, y)


swiglu_fwd = swiglu


def swiglu_bwd(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dy) of swiglu for the gradient g."""
    return torch.ops.aten.silu_backward(g * y, x), F.silu(x) * g
