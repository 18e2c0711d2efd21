"""torch's scaled_dot_product_attention, its signature and meaning, over the operator of attention()."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import registry
from . import checks
from .attention import Options, call

NAME = "scaled_dot_product_attention"


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

    query: (..., Hq, L, E), key: (..., Hkv, S, E), value: (..., Hkv, S, Ev), at least 2 dimensions,
    which broadcast before L and S; heads only group with enable_gqa. attn_mask: bool (True attends)
    or float (added, with gradient). is_causal is top-left aligned, as torch's. A row that sees no key
    is 0, as in torch. Raises TypeError and RuntimeError, where torch does.
    """
    checks.is_tensor(NAME, query=query, key=key, value=value)
    if attn_mask is not None:
        checks.is_tensor(NAME, attn_mask=attn_mask)
    checks.is_flag(NAME, is_causal=is_causal, enable_gqa=enable_gqa)
    if attn_mask is not None and is_causal:
        raise RuntimeError(f"{NAME}: attn_mask and is_causal cannot both be set")
    query, key, value = broadcast_lead(query, key, value, enable_gqa)
    lead, L, S = query.shape[:-2], query.shape[-2], key.shape[-2]
    options = Options(dropout_p=dropout_p, scale=scale)
    try:
        if attn_mask is not None:
            options = masked(options, attn_mask, (*lead, L, S))
        if is_causal:  # key j <= query i, while attention() counts from the last key and query
            key, value = key[..., :L, :], value[..., :L, :]
            options = options._replace(causal=L <= S, window=None if L <= S else (None, L - S))
        query, key, value = (four_dims(x) for x in (query, key, value))
        out = call(NAME, query, key, value, options, None)
    except ValueError as error:
        raise RuntimeError(str(error)) from None
    return out if len(lead) == 2 else out.reshape(*lead, L, out.shape[-1])


def broadcast_lead(
    query: Tensor, key: Tensor, value: Tensor, grouped: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All with the same dimensions before (L, E), or before (H, L, E) when heads are grouped."""
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if x.dim() < 2 + grouped:
            layout = "(..., H, L, E) with enable_gqa" if grouped else "(..., L, E)"
            raise RuntimeError(
                f"{NAME}: {name} must be {layout}, got {checks.described(**{name: x})}"
            )
    if grouped and key.shape[-3] != value.shape[-3]:  # torch lets each group by itself
        key, value = (repeated(x, query.shape[-3]) for x in (key, value))
    own = 3 if grouped else 2
    leads = [x.shape[:-own] for x in (query, key, value)]
    if leads[0] == leads[1] == leads[2]:
        return query, key, value
    try:
        lead = torch.broadcast_shapes(*leads)
    except RuntimeError:
        hint = "" if grouped else "; grouped queries need enable_gqa=True"
        raise RuntimeError(
            f"{NAME}: leading dimensions must broadcast, got {checks.described(**tensors)}{hint}"
        ) from None
    query, key, value = (x.expand(*lead, *x.shape[-own:]) for x in (query, key, value))
    return query, key, value


def repeated(x: Tensor, heads: int) -> Tensor:
    own = x.shape[-3]
    return x.repeat_interleave(heads // own, -3) if own and heads % own == 0 else x


def masked(options: Options, attn_mask: Tensor, shape: tuple[int, ...]) -> Options:
    """attn_mask, (..., L, S) or what broadcasts to it, as the mask or bias of attention()."""
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in registry.ALL_FLOATS:
        dtype = checks.dtype_name(attn_mask.dtype)
        raise RuntimeError(f"{NAME}: attn_mask must be bool or {checks.FLOATS}, got {dtype}")
    checks.broadcasts(NAME, "attn_mask", attn_mask, shape, "(..., L, S)")
    if len(shape) > 4:
        attn_mask = attn_mask.expand(shape)
    attn_mask = four_dims(attn_mask)
    if attn_mask.dtype == torch.bool:
        return options._replace(mask=attn_mask)
    return options._replace(bias=attn_mask)


def four_dims(x: Tensor) -> Tensor:
    """(..., H, S, D) -> (B, H, S, D)"""
    if x.dim() == 4:
        return x
    return x[(None,) * (4 - x.dim())] if x.dim() < 4 else x.reshape(-1, *x.shape[-3:])
