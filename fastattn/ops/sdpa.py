"""torch's scaled_dot_product_attention, to the letter, over attention()."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import attention
from .checks import described


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: same arguments, same meaning.

    query: (N, ..., H, L, E), key: (N, ..., Hkv, S, E), value: (N, ..., Hkv, S, Ev). attn_mask: bool
    (True attends) or float (added, with gradient). is_causal is top-left aligned, as torch's.
    Raises RuntimeError where torch does: attn_mask together with is_causal.
    """
    if attn_mask is not None and is_causal:
        raise RuntimeError(
            "scaled_dot_product_attention: attn_mask and is_causal cannot both be set"
        )
    lead = query.shape[:-2]
    if not enable_gqa:  # then torch broadcasts every leading dimension, heads too
        lead = broadcast_lead(query, key, value)
        query, key, value = (x.expand(*lead, *x.shape[-2:]) for x in (query, key, value))
    L, S = query.shape[-2], key.shape[-2]
    options: dict[str, Any] = {}
    if attn_mask is not None:
        kind = "mask" if attn_mask.dtype == torch.bool else "bias"
        shape = attn_mask.shape if len(lead) == 2 else (*lead, L, S)
        options[kind] = four_dims(attn_mask.expand(shape))
    if is_causal:  # key j <= query i, while attention() counts from the last key and query
        key, value = key[..., :L, :], value[..., :L, :]
        options["window"] = (None, max(L - S, 0))
    query, key, value = (four_dims(x) for x in (query, key, value))
    out = attention(query, key, value, dropout_p=dropout_p, scale=scale, **options)
    return out.reshape(*lead, L, out.shape[-1])


def broadcast_lead(query: Tensor, key: Tensor, value: Tensor) -> torch.Size:
    try:
        return torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    except RuntimeError:
        shapes = described(query=query, key=key, value=value)
        raise RuntimeError(
            f"scaled_dot_product_attention: leading dimensions must broadcast, got {shapes}; "
            "grouped queries need enable_gqa=True"
        ) from None


def four_dims(x: Tensor) -> Tensor:
    """(N, ..., H, S, D) -> (B, H, S, D); three dimensions have one head."""
    if x.dim() == 4:
        return x
    return x.unsqueeze(-3) if x.dim() == 3 else x.reshape(-1, *x.shape[-3:])
