"""Attention over dense and packed sequences. Spec, schemas, public functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import registry
from ..kernels import reference
from . import checks, dispatch
from .operator import Operator

TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? mask, Tensor? alibi_slopes, "
    "Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_lengths, "
    "Tensor? page_table, Tensor? philox"
)
SCALARS = (
    "float scale, bool causal, int? window_left, int? window_right, float softcap, float dropout_p, "
    "bool diagonal_at_length, int max_seqlen_q, int max_seqlen_k"
)


class AttentionSpec(NamedTuple):
    """Everything about a call that is not a tensor, in the schema's order.

    softcap 0 is none. diagonal_at_length: causal and windows count from key_lengths instead of Sk,
    as a cache's length does. max_seqlen 0 is unknown.
    """

    scale: float
    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    diagonal_at_length: bool = False
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0


class AttentionTensors(NamedTuple):
    """The tensors of a call, in the schema's order."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    key_lengths: Tensor | None = None
    page_table: Tensor | None = None
    philox: Tensor | None = None


FEATURES = frozenset({
    "bias", "mask", "alibi_slopes", "sinks", "packed", "key_lengths", "paged", "causal", "window",
    "softcap", "dropout", "diagonal_at_length",
})  # fmt: skip


def features_of(tensors: AttentionTensors, spec: AttentionSpec) -> set[str]:
    used = {
        "packed": tensors.cu_seqlens_q is not None,
        "paged": tensors.page_table is not None,
        "causal": spec.causal,
        "window": spec.window_left is not None or spec.window_right is not None,
        "softcap": spec.softcap > 0,
        "dropout": spec.dropout_p > 0,
        "diagonal_at_length": spec.diagonal_at_length,
    }
    optional = ("bias", "mask", "alibi_slopes", "sinks", "key_lengths")
    used |= {name: getattr(tensors, name) is not None for name in optional}
    return {name for name, present in used.items() if present}


def fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and strides of the results: out lies as query does, heads before or after rows."""
    if query.dim() == 3:
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[-1])
        lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
        return out, lse, torch.empty_like(lse)
    B, Hq, Sq, _ = query.shape
    if query.stride(1) < query.stride(2):
        out = query.new_empty(B, Sq, Hq, value.shape[-1]).transpose(1, 2)
    else:
        out = query.new_empty(B, Hq, Sq, value.shape[-1])
    lse = query.new_empty(B, Hq, Sq, dtype=torch.float32)
    return out, lse, torch.empty_like(lse)


# lse_low is what rounding lse to fp32 left: the backward's weights exp(score - lse) are as accurate as
# naive PyTorch's only with both (logits of 3500 would err by 1e-4 otherwise). Zeros are allowed.
OPERATOR = Operator(
    "attention",
    f"({TENSORS}, {SCALARS}) -> (Tensor out, Tensor lse, Tensor lse_low)",
    f"(Tensor? dout, Tensor? dlse, {TENSORS}, Tensor out, Tensor lse, Tensor lse_low, {SCALARS}, "
    "int needs) -> "
    "(Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dbias, Tensor dalibi_slopes, Tensor dsinks)",
    differentiable=["query", "key", "value", "bias", "alibi_slopes", "sinks"],
    outputs=2,
    define=reference.attention,
    fake=fake,
)


def definition(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The reference, after the checks of data that kernels make themselves."""
    tensors = AttentionTensors(*arguments[: len(AttentionTensors._fields)])
    if not torch.compiler.is_compiling():
        if tensors.cu_seqlens_q is not None and tensors.cu_seqlens_k is not None:
            checks.ascending("cu_seqlens_q", tensors.cu_seqlens_q, tensors.query.shape[0])
            checks.ascending("cu_seqlens_k", tensors.cu_seqlens_k, tensors.key.shape[0])
        elif tensors.key_lengths is not None and tensors.page_table is None:
            checks.lengths_fit(tensors.key_lengths, tensors.key.shape[2])
    return reference.attention(*arguments)


registry.register(
    "attention", "reference", registry.Kernel(definition, FEATURES, registry.ALL_FLOATS)
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Any:
    """softmax(scale * query key^T, masked) value, fused: memory O(Sq) a head, forward and backward.

    query: (B, Hq, Sq, D), key: (B, Hkv, Sk, D), value: (B, Hkv, Sk, Dv), with Hq a multiple of Hkv;
    any strides with a contiguous last dimension; float64 (reference only), float32, float16, bfloat16.
    causal: query i sees key j where j <= i + Sk - Sq (bottom-right). window: (left, right) keys
    around that diagonal, None is unlimited. mask: bool, True may attend, and bias: float, added to
    the scores, both broadcastable to (B, Hq, Sq, Sk). key_lengths: (B,) int; keys from there on are
    never read. alibi_slopes: (Hq,) or (B, Hq), of -slope * |i + Sk - Sq - j|. softcap:
    softcap * tanh(score / softcap). sinks: (Hq,), one more logit a head in the denominator.
    dropout_p: of the weights, always applied, drawn from generator. scale: default D^-0.5.

    Returns out (B, Hq, Sq, Dv) in query's dtype, or (out, lse) with lse (B, Hq, Sq) in float32:
    natural log of the denominator, differentiable. A row that sees no key gives 0 and -inf.
    Gradients reach query, key, value, bias, alibi_slopes and sinks. Raises ValueError or TypeError.
    Flash attention: Dao et al. 2022, arXiv:2205.14135. For torch's own meaning of is_causal and
    attn_mask see scaled_dot_product_attention.
    """
    tensors, spec = prepare(
        query, key, value, causal=causal, window=window, mask=mask, bias=bias, key_lengths=key_lengths,
        alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, dropout_p=dropout_p, scale=scale,
        generator=generator,
    )  # fmt: skip
    out, lse, _ = run(tensors, spec, backend)
    return (out, lse) if return_lse else out


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Any:
    """attention over packed sequences of different lengths, with no padding.

    query: (total_q, Hq, D), key: (total_k, Hkv, D), value: (total_k, Hkv, Dv). Sequence b is rows
    cu_seqlens[b] to cu_seqlens[b + 1]; cu_seqlens_q and cu_seqlens_k: (B + 1,) int, from 0 to the
    total; a sequence may be empty. Options as in attention, a sequence at a time; mask, bias and
    key_lengths are declined. max_seqlen_* are accepted for GPUs, and derived when None.
    Returns out (total_q, Hq, Dv), or (out, lse) with lse (Hq, total_q).
    """
    for name, given in (("mask", mask), ("bias", bias), ("key_lengths", key_lengths)):
        if given is not None:
            raise ValueError(
                f"attention: {name} is not defined for packed sequences; cut or pad them, or use attention"
            )
    tensors, spec = prepare(
        query, key, value, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, packed=True, causal=causal, window=window,
        alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, dropout_p=dropout_p, scale=scale,
        generator=generator,
    )  # fmt: skip
    out, lse, _ = run(tensors, spec, backend)
    return (out, lse) if return_lse else out


def explain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> str:
    """Which backend serves attention(query, key, value, **options), and why the others do not."""
    options.pop("return_lse", None)
    backend = options.pop("backend", None)
    tensors, spec = prepare(query, key, value, **options)
    call = requested(tensors, spec)
    lines, chosen = [], backend
    for name, reason in registry.verdicts(call).items():
        if reason is None and chosen in (None, name):
            chosen = name
            lines.append(f"{name}: serves this call")
        else:
            lines.append(f"{name}: {reason or 'could serve it too'}")
    used = ", ".join(sorted(call.features)) or "no features"
    head = f"attention on {call.device} in {checks.dtype_name(call.dtype)} with {used}"
    return "\n".join([head, *(f"  {line}" for line in lines)])


def requested(tensors: AttentionTensors, spec: AttentionSpec) -> registry.Call:
    return dispatch.request(
        "attention", tensors.query, features_of(tensors, spec), (*tensors, *spec)
    )


def run(tensors: AttentionTensors, spec: AttentionSpec, backend: str | None) -> Any:
    return dispatch.run(requested(tensors, spec), backend)


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    packed: bool = False,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[AttentionTensors, AttentionSpec]:
    """Checks a call and puts it into the schema's form."""
    checks.is_tensor("attention", query=query, key=key, value=value)
    query, key, value = dispatch.autocast(query, key, value)
    checks.is_float("attention", query=query, key=key, value=value)
    checks.same_dtype("attention", query=query, key=key, value=value)
    if packed:
        checks.packed_attention(query, key, value, cu_seqlens_q, cu_seqlens_k)
        B, Hq = len(cu_seqlens_q) - 1, query.shape[1]  # type: ignore[arg-type]
    else:
        checks.dense_attention(query, key, value)
        B, Hq = query.shape[:2]
        mask, bias, key_lengths = prepare_dense(query, key, mask, bias, key_lengths)
    checks.same_device(
        "attention", query=query, key=key, value=value, mask=mask, bias=bias, key_lengths=key_lengths,
        alibi_slopes=alibi_slopes, sinks=sinks, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
    )  # fmt: skip
    checks.is_window(window)
    checks.in_range("attention", "dropout_p", dropout_p, 0, 1)
    checks.in_range("attention", "softcap", softcap or 0.0, 0)
    if scale is not None:
        checks.is_finite("attention", "scale", scale)
    if alibi_slopes is not None:
        checks.is_tensor("attention", alibi_slopes=alibi_slopes)
        checks.is_float("attention", alibi_slopes=alibi_slopes)
        checks.has_shape(
            "attention", "alibi_slopes", alibi_slopes, (Hq,), (B, Hq), layout="(Hq,) or (B, Hq)"
        )
    if sinks is not None:
        checks.is_tensor("attention", sinks=sinks)
        checks.is_float("attention", sinks=sinks)
        checks.has_shape("attention", "sinks", sinks, (Hq,), layout="(Hq,)")
    left, right = window or (None, None)
    spec = AttentionSpec(
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=bool(causal),
        window_left=left,
        window_right=right,
        softcap=float(softcap or 0.0),
        dropout_p=float(dropout_p),
        max_seqlen_q=max_seqlen_q or 0,
        max_seqlen_k=max_seqlen_k or 0,
    )
    tensors = AttentionTensors(
        query=last_contiguous(query),
        key=last_contiguous(key),
        value=last_contiguous(value),
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        cu_seqlens_q=None if cu_seqlens_q is None else cu_seqlens_q.int(),
        cu_seqlens_k=None if cu_seqlens_k is None else cu_seqlens_k.int(),
        key_lengths=None if key_lengths is None else key_lengths.int(),
        philox=dispatch.draw_philox(query, generator) if dropout_p > 0 else None,
    )
    return tensors, spec


def prepare_dense(
    query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None, key_lengths: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """mask and bias with four dimensions, each 1 or full; key_lengths checked."""
    B, Hq, Sq, _ = query.shape
    layout, shape = "(B, Hq, Sq, Sk)", (B, Hq, Sq, key.shape[2])
    if mask is not None:
        checks.is_tensor("attention", mask=mask)
        checks.is_bool("attention", mask=mask)
        checks.broadcasts("attention", "mask", mask, shape, layout)
        mask = mask[(None,) * (4 - mask.dim())]
    if bias is not None:
        checks.is_tensor("attention", bias=bias)
        checks.is_float("attention", bias=bias)
        checks.broadcasts("attention", "bias", bias, shape, layout)
        bias = bias[(None,) * (4 - bias.dim())]
    if key_lengths is not None:
        checks.is_tensor("attention", key_lengths=key_lengths)
        checks.is_integer("attention", key_lengths=key_lengths)
        checks.has_shape("attention", "key_lengths", key_lengths, (B,), layout="(B,)")
    return mask, bias, key_lengths


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
