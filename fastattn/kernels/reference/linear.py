"""y = x W^T + bias with W in few bits: int8 times scales, or bfloat16.

A scale belongs to an output, or to an output and `group_size` neighbouring inputs.
"""

import torch
from torch import Tensor


def dequantized(weight: Tensor, scale: Tensor | None, group_size: int, acc: torch.dtype) -> Tensor:
    """weight (N, K) times scale: (N,), or (N, groups) where group_size is not 0."""
    if scale is None:
        return weight.to(acc)
    factor = scale.to(acc)[:, None]
    if group_size:
        factor = scale.to(acc).repeat_interleave(group_size, 1)[:, : weight.shape[1]]
    return weight.to(acc) * factor


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    *,
    accumulate: torch.dtype | None = None,
) -> Tensor:
    """x (..., K) -> (..., N) in x's dtype; bias (N,)."""
    acc = accumulate or torch.promote_types(x.dtype, torch.float32)
    y = x.to(acc) @ dequantized(weight, scale, group_size, acc).t()
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)
