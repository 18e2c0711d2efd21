"""flash_attn.modules.mha: multi-head attention, its inner attentions, and generation against a cache.

Attention is fused with use_flash_attn and without it: ALiBi, windows, key_padding_mask and cu_seqlens serve
either way. State dicts are flash-attn's: Wqkv, or Wq and Wkv, and out_proj.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ....ops.attention import attention
from .._parallel import alone
from ..flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from ..layers.rotary import RotaryEmbedding
from ..ops.fused_dense import FusedDense


def get_alibi_slopes(nheads: int) -> list[float]:
    """2^(-8 h / n) for h = 1 to n, a power of two; what is missing from every other slope of 2n heads.
    Press et al. 2022, arXiv:2108.12409."""
    n = 2 ** math.floor(math.log2(nheads))
    slopes = [2 ** (-8 * h / n) for h in range(1, n + 1)]
    between = [2 ** (-8 * h / (2 * n)) for h in range(1, 2 * n + 1, 2)]
    return slopes + between[: nheads - n]


# ---- inner attentions ---------------------------------------------------------------------------


class FlashSelfAttention(nn.Module):
    """Attention of qkv (B, S, 3, H, D), or packed (total, 3, H, D). attention_dropout acts in training."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal, self.softmax_scale = causal, softmax_scale
        self.window_size, self.deterministic = window_size, deterministic
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)

    def options(self, causal: bool | None) -> dict[str, Any]:
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": self.alibi_slopes,
            "deterministic": self.deterministic,
        }

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, S, H, D), or (total, H, D). key_padding_mask (B, S): True is a token."""
        if cu_seqlens is not None:
            declines_mask(self, key_padding_mask)
            lengths: Any = (cu_seqlens, max_seqlen)
            return flash_attn_varlen_qkvpacked_func(qkv, *lengths, **self.options(causal))
        if key_padding_mask is None:
            return flash_attn_qkvpacked_func(qkv, **self.options(causal))
        return masked(qkv[:, :, 0], qkv[:, :, 1:], key_padding_mask, self.options(causal))


class FlashCrossAttention(FlashSelfAttention):
    """Attention of q (B, Sq, Hq, D) over kv (B, Sk, 2, Hkv, D), or both packed; causal is bottom-right."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(
            causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )

    def forward(  # type: ignore[override]
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, Sq, Hq, D), or (total_q, Hq, D). key_padding_mask (B, Sk): True is a token."""
        options = self.options(causal)
        if cu_seqlens is not None:
            declines_mask(self, key_padding_mask)
            lengths: Any = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
            return flash_attn_varlen_kvpacked_func(q, kv, *lengths, **options)
        if key_padding_mask is None:
            return flash_attn_kvpacked_func(q, kv, **options)
        return masked(q, kv, key_padding_mask, options)


class SelfAttention(FlashSelfAttention):
    """FlashSelfAttention by its plainer constructor."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(  # type: ignore[override]
        self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        return super().forward(qkv, causal, key_padding_mask=key_padding_mask)


class CrossAttention(FlashCrossAttention):
    """FlashCrossAttention by its plainer constructor."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(  # type: ignore[override]
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        return super().forward(q, kv, causal, key_padding_mask=key_padding_mask)


def declines_mask(module: nn.Module, key_padding_mask: Tensor | None) -> None:
    if key_padding_mask is not None:
        raise ValueError(
            f"{type(module).__name__}: packed sequences have no padding: key_padding_mask and cu_seqlens "
            "exclude each other"
        )


def masked(q: Tensor, kv: Tensor, key_padding_mask: Tensor, options: dict[str, Any]) -> Tensor:
    """(B, Sq, Hq, D) of dense q, kv under a mask (B, Sk), True is a token. As in flash-attn, causal counts
    from as many keys as there are tokens where Sq differs from Sk, else from the last key."""
    B, Sq, Sk = len(q), q.shape[1], kv.shape[1]
    if tuple(key_padding_mask.shape) != (B, Sk):
        raise ValueError(
            f"attention: key_padding_mask must be (B, Sk) = {(B, Sk)}, got {tuple(key_padding_mask.shape)}"
        )
    mask, causal = key_padding_mask.bool()[:, None, None], options["causal"]
    if causal and Sq != Sk:
        i, j = torch.arange(Sq, device=q.device)[:, None], torch.arange(Sk, device=q.device)
        tokens = mask.sum(-1, keepdim=True)
        mask, causal = mask & (j <= i + tokens - Sq), False
    left, right = (None if n is None or n < 0 else n for n in options["window_size"])
    query, key, value = (x.transpose(1, 2) for x in (q, *kv.unbind(2)))
    out: Tensor = attention(
        query,
        key,
        value,
        mask=mask,
        causal=causal,
        window=None if left is None and right is None else (left, right),
        scale=options["softmax_scale"],
        dropout_p=options["dropout_p"],
        alibi_slopes=options["alibi_slopes"],
    )
    return out.transpose(1, 2)


# ---- MHA ----------------------------------------------------------------------------------------


class LinearResidual(nn.Linear):
    """nn.Linear that returns (out, input)."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input


def _update_kv_cache(kv: Tensor, inference_params: Any, layer_idx: Any) -> Tensor:
    """Writes kv (B, S, 2, H, D) into a layer's memory, made if need be; returns all that it holds of B."""
    p = inference_params
    memory = p.key_value_memory_dict
    if layer_idx not in memory:
        memory[layer_idx] = kv.new_zeros(p.max_batch_size, p.max_seqlen, 2, *kv.shape[-2:])
    held = memory[layer_idx]
    rows = slice(p.batch_size_offset, p.batch_size_offset + kv.shape[0])
    start, end = p.seqlen_offset, p.seqlen_offset + kv.shape[1]
    if rows.stop > held.shape[0] or end > held.shape[1]:
        raise RuntimeError(
            f"MHA: layer {layer_idx} has memory for {held.shape[0]} sequences of {held.shape[1]} tokens, and "
            f"was to hold sequences {rows.start} to {rows.stop} up to token {end}"
        )
    held[rows, start:end] = kv
    return held[rows, :end]


class MHA(nn.Module):
    """Multi-head self-attention, or cross-attention with cross_attn: projections, attention, projection.

    num_heads_kv: fewer heads for keys and values. rotary_emb_dim: channels of each head that turn, 0 is none.
    layer_idx: which memory of inference_params is this layer's. return_residual: (out, x). checkpointing:
    attention is computed again in the backward. fused_bias_fc: FusedDense for nn.Linear, with the same
    parameters. use_flash_attn: accepted, see above. dwconv is declined.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.cross_attn = embed_dim, cross_attn
        self.causal, self.layer_idx = causal, layer_idx
        self.rotary_emb_dim, self.use_flash_attn = rotary_emb_dim, use_flash_attn
        self.return_residual, self.checkpointing, self.dwconv = (
            return_residual,
            checkpointing,
            dwconv,
        )
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        self.check_constructor()
        self.head_dim = embed_dim // num_heads
        kv_dim = 2 * self.head_dim * self.num_heads_kv
        place = {"device": device, "dtype": dtype}
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                rotary_emb_base,
                rotary_emb_interleaved,
                rotary_emb_scale_base,
                device,
            )
        linear = FusedDense if fused_bias_fc else nn.Linear
        residual = partial(FusedDense, return_residual=True) if fused_bias_fc else LinearResidual
        wide = residual if return_residual else linear
        if cross_attn:
            self.Wq = linear(embed_dim, embed_dim, bias=qkv_proj_bias, **place)
            self.Wkv = wide(embed_dim, kv_dim, bias=qkv_proj_bias, **place)
        else:
            self.Wqkv = wide(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **place)
        slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
        inner: dict[str, Any] = {"causal": causal, "softmax_scale": softmax_scale}
        inner |= {"attention_dropout": dropout, "alibi_slopes": slopes, "window_size": window_size}
        self.inner_attn = FlashSelfAttention(**inner)
        self.inner_cross_attn = FlashCrossAttention(**inner)
        self.out_proj = linear(embed_dim, embed_dim, bias=out_proj_bias, **place)

    def check_constructor(self) -> None:
        name, heads, kv_heads = type(self).__name__, self.num_heads, self.num_heads_kv
        if self.embed_dim % heads or heads % kv_heads:
            raise ValueError(
                f"{name}: embed_dim must be a multiple of num_heads, and num_heads of num_heads_kv, got "
                f"{self.embed_dim}, {heads} and {kv_heads}"
            )
        if self.dwconv:
            raise ValueError(
                f"{name}: dwconv, a convolution after the projections, is not supported"
            )
        if self.cross_attn and self.rotary_emb_dim > 0:
            raise ValueError(f"{name}: rotary_emb_dim has no meaning with cross_attn")

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Any = None
    ) -> Tensor:
        """This layer's entry of key_value_memory_dict: (batch_size, max_seqlen, 2, Hkv, D)."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return torch.zeros(*shape, dtype=dtype or weight.dtype, device=weight.device)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """x (B, S, E), or packed (total, E) with cu_seqlens (B + 1,) and max_seqlen: like x, or that and x.

        For cross-attention: x_kv (B, Sk, E), None is x; mixer_subset: which of x's tokens ask.
        key_padding_mask (B, Sk): True is a token. inference_params: see utils.generation; x then are the next
        tokens. kwargs go to the inner attention: causal, or cu_seqlens_k and max_seqlen_k of a packed x_kv.
        """
        self.check_call(
            x_kv, key_padding_mask, cu_seqlens, max_seqlen, mixer_subset, inference_params
        )
        q, kv, x = self.project(x, x_kv, mixer_subset)
        if self.rotary_emb_dim > 0:
            q, kv = self.turned(q, kv, inference_params)
        if inference_params is not None:
            context = self.generate(q, kv, inference_params, **kwargs)
        else:
            if cu_seqlens is not None:
                kwargs = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, **kwargs}
            elif key_padding_mask is not None:
                kwargs = {"key_padding_mask": key_padding_mask, **kwargs}
            context = self.attend(q, kv, kwargs)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def check_call(
        self,
        x_kv: Any,
        mask: Any,
        cu_seqlens: Any,
        max_seqlen: Any,
        subset: Any,
        inference_params: Any,
    ) -> None:
        name = type(self).__name__
        if not self.cross_attn and (x_kv is not None or subset is not None):
            raise ValueError(f"{name}: x_kv and mixer_subset need cross_attn=True")
        if (cu_seqlens is None) != (max_seqlen is None):
            raise ValueError(f"{name}: cu_seqlens and max_seqlen are given both or neither")
        if cu_seqlens is not None and (mask is not None or self.rotary_emb_dim > 0):
            raise ValueError(
                f"{name}: packed sequences take no key_padding_mask and no rotary embedding here"
            )
        if inference_params is None:
            return
        if mask is not None or cu_seqlens is not None:
            raise ValueError(f"{name}: inference_params take no key_padding_mask and no cu_seqlens")
        if self.layer_idx is None:
            raise ValueError(f"{name}: inference_params need layer_idx in the constructor")

    def project(
        self, x: Tensor, x_kv: Tensor | None, mixer_subset: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q (..., H, D), kv (..., 2, Hkv, D) and x, as the projection returns it with return_residual."""
        if self.cross_attn:
            given = x if x_kv is None else x_kv
            kv, same = self.Wkv(given) if self.return_residual else (self.Wkv(given), given)
            x = same if x_kv is None else x
            q = self.Wq(x if mixer_subset is None else x[:, mixer_subset])
        else:
            qkv, x = self.Wqkv(x) if self.return_residual else (self.Wqkv(x), x)
            q, kv = qkv[..., : self.embed_dim], qkv[..., self.embed_dim :]
        return (
            q.unflatten(-1, (self.num_heads, self.head_dim)),
            kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim)),
            x,
        )

    def turned(self, q: Tensor, kv: Tensor, inference_params: Any) -> tuple[Tensor, Tensor]:
        """q and kv by the angles of their places."""
        p = inference_params
        offset = 0 if p is None else p.seqlen_offset
        if p is not None and p.lengths_per_sample is not None:
            offset = p.lengths_per_sample
        reach = None if p is None else p.max_seqlen
        q, kv = self.rotary_emb(q, kv, seqlen_offset=offset, max_seqlen=reach)
        return q, kv

    def attend(self, q: Tensor, kv: Tensor, kwargs: dict[str, Any]) -> Tensor:
        module: nn.Module = self.inner_cross_attn
        tensors: tuple[Tensor, ...] = (q, kv)
        if self.cross_attn or self.num_heads != self.num_heads_kv:
            if not self.cross_attn and "cu_seqlens" in kwargs:  # the keys' are the queries'
                own = {"cu_seqlens_k": kwargs["cu_seqlens"], "max_seqlen_k": kwargs["max_seqlen"]}
                kwargs = own | kwargs
        else:
            module, tensors = self.inner_attn, (torch.cat([q[..., None, :, :], kv], -3),)
        if self.checkpointing:
            return checkpoint(module, *tensors, use_reentrant=False, **kwargs)
        return module(*tensors, **kwargs)

    def _update_kv_cache(self, kv: Tensor, inference_params: Any) -> Tensor:
        return _update_kv_cache(kv, inference_params, self.layer_idx)

    def generate(self, q: Tensor, kv: Tensor, inference_params: Any, **kwargs: Any) -> Tensor:
        """Attention of the next tokens: the first ones over themselves, later ones over the memory too."""
        p, inner = inference_params, self.inner_cross_attn
        if p.seqlen_offset == 0:
            return inner(q, self._update_kv_cache(kv, p), **kwargs)
        options = inner.options(kwargs.pop("causal", None))
        if kwargs or options.pop("dropout_p") > 0:
            what = ", ".join(kwargs) or "dropout in training"
            raise ValueError(f"{type(self).__name__}: generating takes no {what}")
        options.pop("deterministic")
        held = p.key_value_memory_dict[self.layer_idx]
        held = held[p.batch_size_offset : p.batch_size_offset + len(q)]
        lengths = p.lengths_per_sample
        lengths = p.seqlen_offset if lengths is None else lengths[: len(q)]
        (k, v), (k_cache, v_cache) = kv.unbind(2), held.unbind(2)
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, **options)


class ParallelMHA(MHA):
    """MHA of a process group of one process, self-attention alone."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        process_group: Any,
        num_heads_kv: int | None = None,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        use_flash_attn: bool = False,
        checkpointing: bool = False,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        alone(type(self).__name__, process_group)
        super().__init__(
            embed_dim, num_heads, num_heads_kv, False, qkv_proj_bias, out_proj_bias, dropout, softmax_scale,
            causal, layer_idx, False, rotary_emb_dim, rotary_emb_base, rotary_emb_scale_base,
            rotary_emb_interleaved, use_alibi, window_size, False, use_flash_attn, False, checkpointing,
            device, dtype,
        )  # fmt: skip
        self.process_group, self.sequence_parallel = process_group, sequence_parallel

    def forward(  # type: ignore[override]
        self, x: Tensor, seqlen: int | None = None, inference_params: Any = None, **kwargs: Any
    ) -> Tensor:
        """x (B, S, E), or (B * S, E) with seqlen = S: like x."""
        if seqlen is None:
            return super().forward(x, inference_params=inference_params, **kwargs)
        rows = x.unflatten(0, (-1, seqlen))
        return super().forward(rows, inference_params=inference_params, **kwargs).flatten(0, 1)
