"""layer_norm and rms_norm over the last dimension, with residual and dropout.

    z = dropout(x) + residual;   y = (z - mean) * rstd * (weight + weight_offset) + bias
rms: mean is 0 and rstd = 1 / sqrt(mean(z^2) + eps). Zhang and Sennrich 2019 for rms_norm.
"""

import torch
from torch import Tensor

from .philox import keep_mask, keep_scale


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    philox: Tensor | None,
    rms: bool,
    eps: float,
    weight_offset: float,
    dropout_p: float,
    return_residual: bool,
    *,
    accumulate: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y like x; summed: z in residual's dtype (0 elements unless return_residual); mean and rstd of
    x's leading shape in fp32 (mean: 0 elements when rms)."""
    acc = accumulate or torch.promote_types(x.dtype, torch.float32)
    z = x.to(acc)
    if dropout_p and philox is not None:
        rows = torch.arange(x.shape[:-1].numel(), device=x.device).reshape(x.shape[:-1])
        kept = keep_mask(rows, torch.zeros_like(rows), x.shape[-1], philox, dropout_p)
        z = torch.where(kept, z * keep_scale(dropout_p), 0.0)
    if residual is not None:
        z = z + residual.to(acc)
    mean = z.new_zeros(()) if rms else z.mean(-1, keepdim=True)
    centred = z - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd
    if weight is not None:
        y = y * (weight.to(acc) + weight_offset)
    if bias is not None:
        y = y + bias.to(acc)
    summed = (
        z.to(x.dtype if residual is None else residual.dtype) if return_residual else z.new_empty(0)
    )
    stat = torch.promote_types(x.dtype, torch.float32)
    mean = z.new_empty(0) if rms else mean.squeeze(-1)
    return y.to(x.dtype), summed, mean.to(stat), rstd.squeeze(-1).to(stat)
