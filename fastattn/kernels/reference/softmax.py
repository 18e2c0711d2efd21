"""softmax(scale * x) over the last dimension's kept entries; 0 in a row that keeps none."""

import torch
from torch import Tensor


def softmax(
    x: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    *,
    accumulate: torch.dtype | None = None,
) -> Tensor:
    """y of x's shape and dtype. mask: bool, True keeps; causal: bottom-right over the last two."""
    if x.shape[-1] == 0:
        return x.clone()  # no entry, no maximum
    acc = accumulate or torch.promote_types(x.dtype, torch.float32)
    keep = torch.ones((), dtype=torch.bool, device=x.device) if mask is None else mask
    if causal:
        Sq, Sk = x.shape[-2:]
        keep = keep & torch.ones(Sq, Sk, dtype=torch.bool, device=x.device).tril(Sk - Sq)
    logits = torch.where(keep, x.to(acc) * scale, -torch.inf)
    row_max = logits.detach().amax(-1, keepdim=True)
    weights = torch.exp(logits - torch.where(row_max == -torch.inf, 0.0, row_max))
    row_sum = weights.sum(-1, keepdim=True)
    return (weights / torch.where(row_sum == 0, 1.0, row_sum)).to(x.dtype)


def softmax_bwd(dy: Tensor, y: Tensor, causal: bool, scale: float) -> Tensor:
    """dx = scale * y * (dy - sum(dy * y)): masks need no mention, since y is 0 there."""
    acc = torch.promote_types(y.dtype, torch.float32)
    y, dy, dtype = y.to(acc), dy.to(acc), y.dtype
    return (scale * y * (dy - (dy * y).sum(-1, keepdim=True))).to(dtype)
