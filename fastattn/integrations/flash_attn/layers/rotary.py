"""flash_attn.layers.rotary: rotary embedding of packed queries, keys and values, in place, and its tables.

Su et al. 2021, arXiv:2104.09864; with scale_base xPos, Sun et al. 2022, arXiv:2212.10554.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....ops import checks
from ....ops.rotary import rotary
from .._attend import raises_runtime_errors
from ..ops.triton.rotary import apply_rotary, in_place


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x (B, S, H, D), or packed (total, H, D) with cu_seqlens (B + 1,): like x, its first R channels turned.

    cos, sin: (P, R / 2). Pairs are (d, d + R / 2), or (2d, 2d + 1) when interleaved. seqlen_offsets: place
    of each sequence's first token, an int or (B,). inplace: x itself is changed. Errors as in apply_rotary.
    """
    return apply_rotary(
        x,
        cos,
        sin,
        seqlen_offsets,
        cu_seqlens,
        max_seqlen,
        interleaved=interleaved,
        inplace=inplace,
    )


apply_rotary_emb_func = apply_rotary_emb  # its older name


@raises_runtime_errors
def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """apply_rotary_emb with cos, sin (S, R / 2), or (B, S, R / 2): a row of its own for every token."""
    if cos.dim() == 2:
        return apply_rotary_emb(x, cos[: x.shape[1]], sin[: x.shape[1]], interleaved)
    rows = torch.arange(cos.shape[0] * cos.shape[1], device=cos.device).view(cos.shape[:2])
    tables = cos.flatten(0, 1), sin.flatten(0, 1)
    turned = rotary(x.transpose(1, 2), *tables, interleaved=interleaved, positions=rows)
    return turned.transpose(1, 2)


@raises_runtime_errors
def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """qkv with its queries and keys turned in place; cos_k, sin_k: tables of the keys' own (xPos).

    qkv: (B, S, 3, H, D), or (B, S, Hq + 2 Hkv, D) with num_heads_q = Hq.
    """
    name = "apply_rotary_emb_qkv_"
    checks.is_tensor(name, qkv=qkv)
    checks.has_dims(name, "qkv", qkv, 4, 5, layout="(B, S, 3, H, D) or (B, S, Hq + 2 Hkv, D)")
    qkv = in_place(qkv)
    q, k = queries_and_keys(name, qkv, num_heads_q)
    options: dict[str, Any] = {"seqlen_offsets": seqlen_offsets, "interleaved": interleaved}
    apply_rotary(q, cos, sin, **options, inplace=True)
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    apply_rotary(k, cos_k, sin_k, **options, inplace=True)
    return qkv


def queries_and_keys(name: str, qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor]:
    """Views of (B, S, H, D) each."""
    described = checks.described(qkv=qkv)
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            raise ValueError(f"{name}: qkv must be (B, S, 3, H, D), got {described}")
        return qkv[:, :, 0], qkv[:, :, 1]
    if num_heads_q is None:
        raise ValueError(f"{name}: qkv (B, S, Hq + 2 Hkv, D) needs num_heads_q, got {described}")
    checks.is_int(name, "num_heads_q", num_heads_q, low=1)
    both = qkv.shape[2] - num_heads_q
    if both < 0 or both % 2:
        raise ValueError(f"{name}: qkv must be (B, S, {num_heads_q} + 2 Hkv, D), got {described}")
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + both // 2]


@raises_runtime_errors
def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """kv (B, S, 2, H, D) with its keys turned in place."""
    name = "apply_rotary_emb_kv_"
    checks.is_tensor(name, kv=kv)
    checks.has_dims(name, "kv", kv, 5, layout="(B, S, 2, H, D)")
    if kv.shape[2] != 2:
        raise ValueError(f"{name}: kv must be (B, S, 2, H, D), got {checks.described(kv=kv)}")
    kv = in_place(kv)
    apply_rotary(kv[:, :, 0], cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
    return kv


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding with tables that grow as needed; no parameters, and nothing in the state_dict.

    dim: R, the channels that turn. base: angles are base^(-2d / R). scale_base: xPos, 512 is usual.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = (
            dim,
            float(base),
            interleaved,
            scale_base,
        )
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None if scale_base is None else self._compute_scale(device)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: Any = None) -> Tensor:
        return self.base ** (-self._channels(device) / self.dim)

    def _compute_scale(self, device: Any = None) -> Tensor:
        return (self._channels(device) + 0.4 * self.dim) / (1.4 * self.dim)

    def _channels(self, device: Any) -> Tensor:
        return torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)

    def _update_cos_sin_cache(self, seqlen: int, device: Any = None, dtype: Any = None) -> None:
        """Tables for `seqlen` places in dtype, unless those at hand suffice."""
        if seqlen <= self._seq_len_cached and self._serves(device, dtype):
            return
        self._seq_len_cached = seqlen
        places = torch.arange(seqlen, device=device, dtype=torch.float32)
        inv_freq: Any = self.inv_freq
        if (
            inv_freq.dtype != torch.float32
        ):  # cast with its model: place * frequency is off by radians
            inv_freq = self._compute_inv_freq(device)
        angles = torch.outer(places, inv_freq.to(device))
        waves = angles.cos(), angles.sin()
        if self.scale_base is None:
            self._cos_cached, self._sin_cached = (wave.to(dtype) for wave in waves)
            return
        power = (places - seqlen // 2) / self.scale_base
        scale = self._compute_scale(device) ** power[:, None]
        self._cos_cached, self._sin_cached = ((wave * scale).to(dtype) for wave in waves)
        self._cos_k_cached, self._sin_k_cached = ((wave / scale).to(dtype) for wave in waves)

    def _serves(self, device: Any, dtype: Any) -> bool:
        """Whether the tables fit; what inference mode made, no backward may keep."""
        held = self._cos_cached
        if held is None or held.device != device or held.dtype != dtype:
            return False
        return not (self.training and held.is_inference())

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """qkv (B, S, 3, H, D), or (B, S, Hq + 2 Hkv, D) with num_heads_q, turned in place; or, with kv
        (B, S, 2, Hkv, D), qkv is the queries (B, S, Hq, D), and (q, kv) are returned.

        seqlen_offset: an int, or (B,), for which max_seqlen says how far the tables reach.
        """
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        elif isinstance(seqlen_offset, int):
            reach = qkv.shape[1] + seqlen_offset
            self._update_cos_sin_cache(reach, device=qkv.device, dtype=qkv.dtype)
        if self._cos_cached is None or self._sin_cached is None:
            raise RuntimeError("RotaryEmbedding: a tensor as seqlen_offset needs max_seqlen")
        cos, sin = self._cos_cached, self._sin_cached
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached  # None without scale_base
        by: dict[str, Any] = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset}
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, **by, num_heads_q=num_heads_q)
        q = apply_rotary_emb_func(qkv, cos, sin, **by, inplace=True)
        keys = (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
        return q, apply_rotary_emb_kv_(kv, *keys, **by)
