"""flash_attn.ops.triton.rotary: apply_rotary, over fastattn's rotary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .....ops import checks
from .....ops.rotary import rotary
from ..._attend import longest, raises_runtime_errors

NAME = "apply_rotary"


@raises_runtime_errors
def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """x (B, S, H, D), or packed (total, H, D) with cu_seqlens (B + 1,), turned by its tokens' places.

    cos, sin: (P, R / 2), R <= D. A token's place counts within its sequence, from seqlen_offsets on: an int,
    or (B,). conjugate turns back. inplace: x itself is changed, and returned. max_seqlen: not needed.
    Differentiable. Raises RuntimeError, or TypeError for a wrong type.
    """
    checks.is_tensor(NAME, x=x, cos=cos, sin=sin)
    checks.is_flag(NAME, interleaved=interleaved, inplace=inplace, conjugate=conjugate)
    longest(NAME, "max_seqlen", max_seqlen)
    x, packed = in_place(x) if inplace else x, cu_seqlens is not None
    checks.has_dims(
        NAME, "x", x, 3 if packed else 4, layout="(total, H, D)" if packed else "(B, S, H, D)"
    )
    if cu_seqlens is None:
        cos, sin, positions = placed(cos, sin, seqlen_offsets, len(x), x.shape[1])
    else:
        positions = packed_positions(len(x), cu_seqlens, seqlen_offsets)
    rows = (x[None] if packed else x).transpose(1, 2)
    turned = rotary(
        rows, cos, -sin if conjugate else sin, interleaved=interleaved, positions=positions
    ).transpose(1, 2)
    turned = turned[0] if packed else turned
    return x.copy_(turned) if inplace else turned


def placed(
    cos: Tensor, sin: Tensor, offsets: int | Tensor, B: int, S: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tables from an int offset on, or with positions (B, S) where every sequence has its own."""
    if isinstance(offsets, Tensor):
        checks.is_integer(NAME, seqlen_offsets=offsets)
        checks.has_shape(NAME, "seqlen_offsets", offsets, (B,), layout="(B,)")
        return cos, sin, offsets.long()[:, None] + torch.arange(S, device=offsets.device)
    checks.is_int(NAME, "seqlen_offsets", offsets, low=0)
    if offsets + S > len(cos):
        raise ValueError(
            f"{NAME}: cos has {len(cos)} rows, and tokens reach position {offsets + S - 1}"
        )
    return cos[offsets:], sin[offsets:], None


def packed_positions(total: int, cu_seqlens: Tensor, offsets: int | Tensor) -> Tensor:
    """(total,): each token's place in its sequence, without waiting for a GPU."""
    checks.is_tensor(NAME, cu_seqlens=cu_seqlens)
    checks.is_integer(NAME, cu_seqlens=cu_seqlens)
    rows = torch.arange(total, device=cu_seqlens.device)
    starts = cu_seqlens.long()
    sequence = torch.searchsorted(starts, rows, right=True).clamp(max=len(starts) - 1) - 1
    offset: Any = offsets
    if isinstance(offsets, Tensor):
        checks.has_shape(NAME, "seqlen_offsets", offsets, (len(starts) - 1,), layout="(B,)")
        offset = offsets.long()[sequence]
    else:
        checks.is_int(NAME, "seqlen_offsets", offsets, low=0)
    return rows - starts[sequence] + offset


class Alias(torch.autograd.Function):
    """x's own memory as the result of something, so that a leaf can be changed in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx


def in_place(x: Tensor) -> Tensor:
    """x as autograd lets one change it: rotating needs none of the old values for its gradient."""
    leaf = torch.is_grad_enabled() and x.requires_grad and x.is_leaf
    return Alias.apply(x) if leaf else x
