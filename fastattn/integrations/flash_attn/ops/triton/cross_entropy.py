"""flash_attn.ops.triton.cross_entropy: the loss of each row, and its z-loss part."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .....ops import checks, dispatch
from .....ops.cross_entropy import check_options
from ..._attend import raises_runtime_errors
from ..._parallel import alone

NAME = "cross_entropy_loss"


@raises_runtime_errors
def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(losses (N,), z_losses (N,)), float32, of logits (N, V) with labels (N,) int64, 0 where ignored.

    losses hold z_losses = lse_square_scale * lse^2, which have no gradient of their own. logit_scale: what
    the logits are multiplied by first, in float32. inplace_backward: the gradient takes the logits' memory
    (with logit_scale, that of their product). precomputed_lse (N,): the logits' log-sum-exp, which is
    computed here anyway: on a CPU it is compared. process_group: of one process; logits are not sharded.
    Raises RuntimeError, or TypeError for a wrong type.
    """
    alone(NAME, process_group)
    checks.is_tensor(NAME, logits=logits, labels=labels)
    checks.is_float(NAME, logits=logits)
    checks.has_dims(NAME, "logits", logits, 2, layout="(N, V)")
    checks.same_device(NAME, logits=logits, labels=labels)
    checks.is_flag(NAME, inplace_backward=inplace_backward)
    checks.in_range(NAME, "logit_scale", logit_scale, 0)
    labels = labels.long()
    check_options(NAME, logits, labels, ignore_index, label_smoothing, lse_square_scale, "none")
    if logit_scale != 1:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    operator = "cross_entropy_inplace" if inplace_backward else "cross_entropy"
    arguments = (logits, labels, ignore_index, float(label_smoothing), float(lse_square_scale))
    losses, lse = dispatch.run(dispatch.request(operator, logits, [], arguments, NAME), None)
    if precomputed_lse is not None:
        check_lse(precomputed_lse, lse)
    z_losses = lse_square_scale * lse.detach().square()
    return losses, z_losses.masked_fill(labels == ignore_index, 0.0)


def check_lse(given: Tensor, lse: Tensor) -> None:
    checks.is_tensor(NAME, precomputed_lse=given)
    checks.has_shape(NAME, "precomputed_lse", given, lse.shape, layout="(N,)")
    if checks.can_read(given, lse) and not torch.allclose(given.to(lse), lse, rtol=1e-2, atol=1e-2):
        worst = (given - lse).abs().max().item()
        raise ValueError(
            f"{NAME}: precomputed_lse is not the logits' log-sum-exp, by up to {worst:.3g}"
        )
