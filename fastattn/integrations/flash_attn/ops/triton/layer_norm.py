"""flash_attn.ops.triton.layer_norm: norms of dropout(x) + dropout(x1) + residual, by one or two weights.

layer_norm_ref and rms_norm_ref are the same in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._attend import raises_runtime_errors
from ..._norm import Inputs, Results, Settings, normalised


@raises_runtime_errors
def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """y = norm(z) weight + bias for z = dropout(x * rowscale) + dropout(x1) + residual, x being (..., C).

    Returns y, then y1 (with weight1), then z (with prenorm), then both masks (with return_dropout_mask:
    bool, True is kept, None without dropout or x1); y alone if there is nothing else. z has the residual's
    dtype, or float32 with residual_in_fp32, or x's. y has out_dtype or x's. rowscale (...,), not with x1.
    zero_centered_weight: 1 is added to the weights. out, residual_out: where to put y and z, both returned.
    Raises RuntimeError, or TypeError for a wrong type.
    """
    name = "rms_norm_fn" if is_rms_norm else "layer_norm_fn"
    if rowscale is not None and x1 is not None:
        raise ValueError(f"{name}: rowscale has no meaning beside x1")
    sum_dtype = torch.float32 if residual_in_fp32 and residual is None else None
    if residual is None and residual_out is not None:
        sum_dtype = residual_out.dtype
    settings = Settings(
        eps, dropout_p, is_rms_norm, zero_centered_weight, out_dtype if out is None else out.dtype,
        sum_dtype, prenorm or residual_out is not None,
    )  # fmt: skip
    found = normalised(
        name, Inputs(x, weight, bias, residual, x1, weight1, bias1, rowscale), settings
    )
    found = found._replace(y=put(found.y, out), z=put(found.z, residual_out))
    return listed(found, prenorm, weight1 is not None, return_dropout_mask)


def put(x: Any, where: Tensor | None) -> Any:
    return x if where is None else where.copy_(x)


def listed(found: Results, prenorm: bool, two: bool, masks: bool) -> Any:
    results: list[Any] = [found.y]
    results += [found.y1] if two else []
    results += [found.z] if prenorm else []
    results += [found.kept, found.kept1] if masks else []
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """layer_norm_fn with is_rms_norm: z is divided by the root of its mean square, and not centred."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        zero_centered_weight, True, return_dropout_mask, out_dtype, out, residual_out,
    )  # fmt: skip


class RMSNorm(torch.nn.Module):
    """rms_norm_fn as a module: weight (hidden_size,), no bias."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.eps, self.zero_centered_weight = eps, zero_centered_weight
        self.drop = torch.nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """y, or (y, z) with prenorm: see layer_norm_fn."""
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """linear(norm(x + residual)), or with prenorm that and x + residual."""
    found = layer_norm_fn(
        x, norm_weight, norm_bias, residual, eps=eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )  # fmt: skip
    y, *z = found if prenorm else (found,)
    bias = None if linear_bias is None else linear_bias.to(linear_weight.dtype)
    out = F.linear(y.to(linear_weight.dtype), linear_weight, bias)
    return (out, *z) if prenorm else out


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """layer_norm_fn in plain PyTorch, all of it in x's dtype, or in float32 with upcast. The masks are
    applied if given, else drawn."""
    z = plain_sum(x, residual, x1, dropout_p, rowscale, dropout_mask, dropout_mask1, upcast)

    def norm(w: Tensor, b: Tensor | None) -> Tensor:
        w, b = w.to(z.dtype) + float(zero_centered_weight), None if b is None else b.to(z.dtype)
        return F.layer_norm(z, z.shape[-1:], w, b, eps).to(x.dtype)

    results = [norm(weight, bias)] + ([] if weight1 is None else [norm(weight1, bias1)])
    return tuple(results + [z] * prenorm) if len(results) + prenorm > 1 else results[0]


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    zero_centered_weight: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """rms_norm_fn in plain PyTorch, as layer_norm_ref."""
    z = plain_sum(x, residual, x1, dropout_p, rowscale, dropout_mask, dropout_mask1, upcast)

    def norm(w: Tensor, b: Tensor | None) -> Tensor:
        y = F.rms_norm(z, z.shape[-1:], eps=eps) * (w.to(z.dtype) + float(zero_centered_weight))
        return (y if b is None else y + b.to(z.dtype)).to(x.dtype)

    results = [norm(weight, bias)] + ([] if weight1 is None else [norm(weight1, bias1)])
    return tuple(results + [z] * prenorm) if len(results) + prenorm > 1 else results[0]


def plain_sum(
    x: Tensor,
    residual: Tensor | None,
    x1: Tensor | None,
    p: float,
    rowscale: Tensor | None,
    mask: Tensor | None,
    mask1: Tensor | None,
    upcast: bool,
) -> Tensor:
    dtype = torch.float32 if upcast else x.dtype

    def dropped(t: Tensor, kept: Tensor | None) -> Tensor:
        return F.dropout(t, p) if kept is None else torch.where(kept, t / (1 - p), 0.0)

    z = x.to(dtype)
    if rowscale is not None:
        z = z * rowscale[..., None]
    z = dropped(z, mask) if p > 0 else z
    if x1 is not None:
        z = z + (dropped(x1.to(dtype), mask1) if p > 0 else x1.to(dtype))
    return (z if residual is None else z + residual.to(dtype)).to(dtype)
