"""Cross-entropy of logits with class targets, a row at a time; the reduction is the caller's.

loss = (1 - label_smoothing) * (lse - x[target]) + label_smoothing * (lse - mean(x)) + z_loss * lse^2
"""

import torch
from torch import Tensor


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    *,
    accumulate: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """logits (R, V), target (R,) int64 -> loss (R,), 0 where ignored, and lse (R,), both fp32."""
    acc = accumulate or torch.promote_types(logits.dtype, torch.float32)
    kept = target != ignore_index
    x = logits.to(acc)
    lse = torch.logsumexp(x, -1)
    loss = lse
    if x.shape[-1]:
        loss = lse - x.gather(-1, torch.where(kept, target, 0)[:, None])[:, 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - x.mean(-1))
    if z_loss:
        loss = loss + z_loss * lse.square()
    stat = torch.promote_types(logits.dtype, torch.float32)
    return torch.where(kept, loss, 0.0).to(stat), lse.to(stat)
