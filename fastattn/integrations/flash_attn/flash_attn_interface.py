"""flash_attn.flash_attn_interface on fastattn.ops: the functions of flash-attn 2.8, by their signatures.

q (B, Sq, Hq, D), k, v (B, Sk, Hkv, D), or packed (total, H, D) with cu_seqlens; Hq a multiple of Hkv. Here v
may be narrower or wider than k, and any dtype of fastattn.attention serves, float32 and float64 too, on a CPU
too. What all functions share:

    dropout_p          of the weights, always applied: 0 for evaluation
    softmax_scale      None is D^-0.5
    causal             bottom-right: query i sees key j where j <= i + Sk - Sq; a right window is then 0
    window_size        (left, right) keys around that diagonal, -1 (or None) is no limit; ints or a tensor
    softcap            softcap * tanh(score / softcap), 0 is none
    alibi_slopes       (Hq,) or (B, Hq): -slope * |i + Sk - Sq - j| is added; with a gradient here
    deterministic      accepted: every backward is, at no cost
    return_attn_probs  (out, softmax_lse, S_dmask): lse (B, Hq, Sq) or (Hq, total_q) in float32; S_dmask
                       (B, Hq, Sq, Sk): exp(score - row's largest), negative where dropped, else empty
    learnable_sink     (Hq,): one more logit a head in the denominator, with gradient   (flash-attn 4's name)
    return_lse         (out, softmax_lse), with a gradient                              (flash-attn 4's name)

A row that sees no key gives 0, and -inf as lse (flash-attn 2: +inf). Raises RuntimeError, or TypeError for a
wrong type. Dao 2023, arXiv:2307.08691; the interface is that of github.com/Dao-AILab/flash-attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import checks
from . import _backward, _kvcache
from ._attend import (
    Asked,
    Lengths,
    dense,
    dense_probs,
    forward,
    longest,
    packed,
    packed_probs,
    raises_runtime_errors,
)
from ._rows import check_page_table, rows, used


def _get_block_size_n(device: Any, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """How many keys share the row maximum that S_dmask is scaled by: all of them, whatever the arguments."""
    return 2**31 - 1


# ---- dense --------------------------------------------------------------------------------------


@raises_runtime_errors
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of q (B, Sq, Hq, D) over k (B, Sk, Hkv, D) and v (B, Sk, Hkv, Dv): out (B, Sq, Hq, Dv).

    Options, further results and errors: the module's docstring.
    """
    asked = Asked(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, learnable_sink, return_lse,
    )  # fmt: skip
    return dense("flash_attn_func", q, k, v, asked)


@raises_runtime_errors
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """flash_attn_func with keys and values in one tensor, kv (B, Sk, 2, Hkv, D)."""
    name = "flash_attn_kvpacked_func"
    k, v = unpacked(name, "kv", kv, "(B, Sk, 2, Hkv, D)")
    asked = Asked(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, learnable_sink, return_lse,
    )  # fmt: skip
    return dense(name, q, k, v, asked)


@raises_runtime_errors
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """flash_attn_func with everything in one tensor, qkv (B, S, 3, H, D)."""
    name = "flash_attn_qkvpacked_func"
    q, k, v = unpacked(name, "qkv", qkv, "(B, S, 3, H, D)")
    asked = Asked(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, learnable_sink, return_lse,
    )  # fmt: skip
    return dense(name, q, k, v, asked)


def unpacked(name: str, argument: str, x: Tensor, layout: str) -> tuple[Tensor, ...]:
    """What `layout` stacks in its third dimension from the end, one by one."""
    checks.is_tensor(name, **{argument: x})
    checks.has_dims(name, argument, x, layout.count(",") + 1, layout=layout)
    if x.shape[-3] != len(argument):
        raise ValueError(
            f"{name}: {argument} must be {layout}, got {checks.described(**{argument: x})}"
        )
    return x.unbind(-3)


# ---- packed -------------------------------------------------------------------------------------


@raises_runtime_errors
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of q (total_q, Hq, D) over k (total_k, Hkv, D), v (total_k, Hkv, Dv): (total_q, Hq, Dv).

    cu_seqlens_*: (B + 1,) int32, sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1], which may be none.
    max_seqlen_*: at least the longest sequence's length, an int or a tensor of one; None: unknown.
    seqused_*: (B,), only the first seqused[b] rows of each sequence count; rows of out beyond are 0.
    block_table (or page_table, its later name): (B, max_pages), with k, v (pages, page_size, Hkv, D), any
    page_size; cu_seqlens_k then says how many tokens each sequence has there, or seqused_k with
    cu_seqlens_k=None. Both gather k and v first, with gradients.
    Other options, further results and errors: the module's docstring.
    """
    name = "flash_attn_varlen_func"
    asked = Asked(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, learnable_sink, return_lse,
    )  # fmt: skip
    if block_table is not None and page_table is not None:
        raise ValueError(
            f"{name}: block_table and page_table are two names of one argument, give one"
        )
    table = page_table if block_table is None else block_table
    k, v, cu_seqlens_k = keys(name, k, v, cu_seqlens_k, table, seqused_k)
    max_q, max_k = (
        longest(name, "max_seqlen_q", max_seqlen_q),
        longest(name, "max_seqlen_k", max_seqlen_k),
    )
    if seqused_q is None:
        return packed(name, q, k, v, Lengths(cu_seqlens_q, cu_seqlens_k, max_q, max_k), asked)
    kept = used(name, "seqused_q", cu_seqlens_q, seqused_q)
    found = packed(
        name, kept.take(q), k, v, Lengths(kept.cu_seqlens, cu_seqlens_k, max_q, max_k), asked
    )
    if isinstance(found, Tensor):
        return kept.put(found, len(q), 0)
    out, lse, *probs = found
    return kept.put(out, len(q), 0), kept.put(lse, len(q), -torch.inf, dim=1), *probs


def keys(
    name: str,
    k: Tensor,
    v: Tensor,
    cu_seqlens_k: Tensor | None,
    page_table: Tensor | None,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed k, v of the tokens that count, and their cu_seqlens."""
    if cu_seqlens_k is None and (page_table is None or seqused_k is None):
        raise ValueError(f"{name}: cu_seqlens_k may be None only with a block_table and seqused_k")
    if page_table is None and leftpad_k is None:
        assert cu_seqlens_k is not None
        if seqused_k is None:
            return k, v, cu_seqlens_k
        kept = used(name, "seqused_k", cu_seqlens_k, seqused_k)
        return kept.take(k), kept.take(v), kept.cu_seqlens
    lengths = seqused_k
    if lengths is None:
        assert cu_seqlens_k is not None
        lengths = cu_seqlens_k.diff()
    skipped = torch.zeros_like(lengths) if leftpad_k is None else leftpad_k
    if page_table is None:
        assert cu_seqlens_k is not None
        kept = rows(cu_seqlens_k[:-1] + skipped, lengths - skipped)
        return kept.take(k), kept.take(v), kept.cu_seqlens
    for letter, x in (("k", k), ("v", v)):
        checks.has_dims(name, letter, x, 4, layout="(pages, page_size, Hkv, D)")
    check_page_table(name, page_table, k, len(lengths), lengths)
    kept = rows(skipped, lengths - skipped, page_table, k.shape[1])
    return kept.take(k.flatten(0, 1)), kept.take(v.flatten(0, 1)), kept.cu_seqlens


@raises_runtime_errors
def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """flash_attn_varlen_func with keys and values in one tensor, kv (total_k, 2, Hkv, D)."""
    name = "flash_attn_varlen_kvpacked_func"
    k, v = unpacked(name, "kv", kv, "(total_k, 2, Hkv, D)")
    asked = Asked(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, learnable_sink, return_lse,
    )  # fmt: skip
    max_q, max_k = (
        longest(name, "max_seqlen_q", max_seqlen_q),
        longest(name, "max_seqlen_k", max_seqlen_k),
    )
    return packed(name, q, k, v, Lengths(cu_seqlens_q, cu_seqlens_k, max_q, max_k), asked)


@raises_runtime_errors
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """flash_attn_varlen_func with everything in one tensor, qkv (total, 3, H, D)."""
    name = "flash_attn_varlen_qkvpacked_func"
    q, k, v = unpacked(name, "qkv", qkv, "(total, 3, H, D)")
    asked = Asked(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, learnable_sink, return_lse,
    )  # fmt: skip
    most = longest(name, "max_seqlen", max_seqlen)
    return packed(name, q, k, v, Lengths(cu_seqlens, cu_seqlens, most, most), asked)


# ---- a cache ------------------------------------------------------------------------------------


@raises_runtime_errors
@torch.no_grad()
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Tensor | None = None,
    learnable_sink: Tensor | None = None,
) -> Any:
    """Attention of q (B, Sq, Hq, D) over a cache, to which k and v are added first, in place. No gradient.

    k_cache (B_cache, S_cache, Hkv, D), v_cache likewise, of which sequence b holds its first cache_seqlens[b]
    tokens (an int for all, (B,), or None: all of them; it is not changed), in row cache_batch_idx[b], from
    cache_leftpad[b] on. With a block_table (B, max_pages), or page_table, its later name, they are pages
    (pages, page_size, Hkv, D), any page_size. k, v: (B, S_new, Hkv, D), to be written at cache_seqlens.
    rotary_cos, rotary_sin: (P, R / 2), which turn k at cache_seqlens, cache_seqlens + 1 ..., and q too
    where causal or a window is asked for; else all of q at cache_seqlens. num_splits: accepted; keys are
    always split by a fixed size, and no result depends on it. causal and windows count from the last token.
    Returns out (B, Sq, Hq, Dv), with softmax_lse (B, Hq, Sq) if asked for. Raises RuntimeError, with nothing
    changed, where the cache has no room. Other options: the module's docstring.
    """
    name = "flash_attn_with_kvcache"
    asked = Asked(
        0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, False, False,
        learnable_sink, return_softmax_lse,
    )  # fmt: skip
    options = asked.options(name)
    checks.is_int(name, "num_splits", num_splits, low=0)
    checks.is_flag(name, rotary_interleaved=rotary_interleaved)
    if block_table is not None and page_table is not None:
        raise ValueError(
            f"{name}: block_table and page_table are two names of one argument, give one"
        )
    table = page_table if block_table is None else block_table
    _kvcache.check_tensors(q, k_cache, v_cache, k, v)
    turns = _kvcache.rotary_tables(rotary_cos, rotary_sin, rotary_interleaved, k is not None)
    if k is not None and cache_seqlens is None:
        raise ValueError(f"{name}: k and v need cache_seqlens, the places where they belong")
    cache = _kvcache.cache_of(
        q, k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, table
    )
    _kvcache.check_room(cache, 0 if k is None else k.shape[1])
    if k is not None and v is not None:
        if turns is not None:
            one_position = not options.causal and options.window is None
            q, k = _kvcache.turned(q, k, cache, turns, one_position)
        cache = _kvcache.append(cache, k, v)
    return _kvcache.attend(q, cache, options, return_softmax_lse)


# ---- what other libraries import, underscores and all -------------------------------------------


@raises_runtime_errors
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state), without a gradient. rng_state (2,): dropout's seed, offset."""
    name = "_flash_attn_forward"
    asked = Asked(
        dropout_p,
        softmax_scale,
        causal,
        (window_size_left, window_size_right),
        softcap,
        alibi_slopes,
    )
    with torch.no_grad():
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        options = asked.options(name)
        out, lse, drawn = forward(name, query, key, value, options)
        probs = dense_probs(name, query, key, options, drawn if return_softmax else None)
    return out.transpose(1, 2), lse, probs, rng_state_of(drawn, q)


@raises_runtime_errors
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """_flash_attn_forward of packed sequences. zero_tensors: accepted, every result is written anyway."""
    name = "_flash_attn_varlen_forward"
    checks.is_flag(name, zero_tensors=zero_tensors)
    asked = Asked(
        dropout_p,
        softmax_scale,
        causal,
        (window_size_left, window_size_right),
        softcap,
        alibi_slopes,
    )
    with torch.no_grad():
        k, v, cu_seqlens_k = keys(name, k, v, cu_seqlens_k, block_table, seqused_k, leftpad_k)
        max_q = longest(name, "max_seqlen_q", max_seqlen_q)
        max_k = longest(name, "max_seqlen_k", max_seqlen_k)
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_q, max_k)
        options = asked.options(name)._replace(**lengths._asdict())
        out, lse, drawn = forward(name, q, k, v, options)
        probs = packed_probs(name, q, k, options, drawn if return_softmax else None)
    return out, lse, probs, rng_state_of(drawn, q)


def rng_state_of(drawn: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros(2, dtype=torch.int64, device=like.device) if drawn is None else drawn


@raises_runtime_errors
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes the gradients into dq, dk and dv, where given, and returns rowsum(dout * out), (B, Hq, Sq).

    out and softmax_lse may be those of more keys than k holds, as in ring attention: the gradients are
    then this part's. rng_state: what the forward returned, needed with dropout.
    """
    name = "_flash_attn_backward"
    asked = Asked(
        dropout_p, softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes,
        deterministic,
    )  # fmt: skip
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    tensors = _backward.Saved(dout, q, k, v, out, softmax_lse)
    found, delta = _backward.gradients(name, tensors, asked.options(name), rng_state)
    for given, gradient in zip((dq, dk, dv), found, strict=True):
        if given is not None:
            given.copy_(gradient.transpose(1, 2))
    return delta


@raises_runtime_errors
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """_flash_attn_backward of packed sequences; rowsum(dout * out) is (Hq, total_q)."""
    name = "_flash_attn_varlen_backward"
    checks.is_flag(name, zero_tensors=zero_tensors)
    asked = Asked(
        dropout_p, softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes,
        deterministic,
    )  # fmt: skip
    max_q, max_k = (
        longest(name, "max_seqlen_q", max_seqlen_q),
        longest(name, "max_seqlen_k", max_seqlen_k),
    )
    lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_q, max_k)
    options = asked.options(name)._replace(**lengths._asdict())
    tensors = _backward.Saved(dout, q, k, v, out, softmax_lse)
    found, delta = _backward.gradients(name, tensors, options, rng_state)
    for given, gradient in zip((dq, dk, dv), found, strict=True):
        if given is not None:
            given.copy_(gradient)
    return delta


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
