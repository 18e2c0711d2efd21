"""The gradients of attention from a given out and lse, which may be those of more keys than are here.

With P = exp(score - lse), delta = rowsum(dout * out):   dv = P^T dout,   dscore = P * (dout v^T - delta).
These keys alone give out_here and lse_here, of weights P_here = P / w, for w = exp(lse_here - lse). So the
gradients are those of out_here and lse_here, pulled back from
    w * dout   and   w * (rowsum(dout * out_here) - delta),
on whatever backend serves the call. Ring attention needs this: Liu et al. 2023, arXiv:2310.01889.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops.attention import Options
from ._attend import forward


class Saved(NamedTuple):
    """In fastattn's layouts: (B, H, S, D) with lse (B, Hq, Sq), or (total, H, D) with (Hq, total_q)."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


@torch.enable_grad()
def gradients(
    name: str, saved: Saved, options: Options, drawn: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """((dq, dk, dv), delta): delta like lse, the rest like their tensors."""
    dout, q, k, v, out, lse = saved
    if options.dropout_p > 0 and drawn is None:
        raise ValueError(f"{name}: with dropout_p > 0 the backward needs the forward's rng_state")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out_here, lse_here, _ = forward(name, leaves[0], leaves[1], leaves[2], options, drawn)
    delta = rowsum(dout, out)
    share = torch.exp(lse_here - lse).detach()
    share = torch.where(lse_here == -torch.inf, 0.0, share)  # a row that saw nothing here
    dlse = share * (rowsum(dout, out_here) - delta)
    pulled = (dout.float() * rows_first(share, dout)).to(dout.dtype)
    found = torch.autograd.grad((out_here, lse_here), leaves, (pulled, dlse.to(lse_here.dtype)))
    return found, delta


@torch.no_grad()
def rowsum(dout: Tensor, out: Tensor) -> Tensor:
    """(B, Hq, Sq), or (Hq, total_q), in fp32."""
    precise = torch.promote_types(out.dtype, torch.float32)
    products = (dout.to(precise) * out.to(precise)).sum(-1)
    return products if out.dim() == 4 else products.transpose(0, 1)


def rows_first(x: Tensor, like: Tensor) -> Tensor:
    """A number a row, as it multiplies `like`."""
    return (x if like.dim() == 4 else x.transpose(0, 1))[..., None]
