"""Rotary position embedding (Su et al. 2021): pairs of channels rotated by a position's angles."""

import torch
from torch import Tensor


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    inverse: bool,
    *,
    accumulate: torch.dtype | None = None,
) -> Tensor:
    """x (B, H, S, D); cos, sin (P, R / 2) with R <= D, the rest of D passes through.

    positions (B or 1, S) says which row of cos and sin serves a token; None: its index. Pairs are
    (d, d + R / 2), or (2d, 2d + 1) when interleaved. inverse rotates by the opposite angle.
    """
    acc = accumulate or torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[-1]
    rows = slice(x.shape[2]) if positions is None else positions
    c, s = (table[rows].to(acc) for table in (cos, sin))  # (S, half) or (B, S, half)
    if positions is not None:
        c, s = c[:, None], s[:, None]
    if inverse:
        s = -s
    rotated, rest = x[..., : 2 * half].to(acc), x[..., 2 * half :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        turned = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)
