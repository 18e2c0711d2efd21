"""Attention over dense and packed sequences. Spec, schemas, public functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import registry
from ..kernels import reference
from . import checks, dispatch, inference
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


# what each optional tensor is a feature of, in the schema's order; philox comes with dropout_p
TENSOR_FEATURES = (
    "bias", "mask", "alibi_slopes", "sinks", "packed", "packed", "key_lengths", "paged", "dropout",
)  # fmt: skip
FEATURES = frozenset({*TENSOR_FEATURES, "causal", "window", "softcap", "diagonal_at_length"})


def features_of(tensors: AttentionTensors, spec: AttentionSpec) -> list[str]:
    used = [f for f, x in zip(TENSOR_FEATURES, tensors[3:], strict=True) if x is not None]
    if spec.causal:
        used.append("causal")
    if spec.window_left is not None or spec.window_right is not None:
        used.append("window")
    if spec.softcap > 0:
        used.append("softcap")
    if spec.dropout_p > 0:
        used.append("dropout")
    if spec.diagonal_at_length:
        used.append("diagonal_at_length")
    return used


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


def check_data(*arguments: Any) -> None:
    tensors = AttentionTensors(*arguments[: len(AttentionTensors._fields)])
    if tensors.cu_seqlens_q is not None and tensors.cu_seqlens_k is not None:
        checks.ascending("cu_seqlens_q", tensors.cu_seqlens_q, tensors.query.shape[0])
        checks.ascending("cu_seqlens_k", tensors.cu_seqlens_k, tensors.key.shape[0])
    elif tensors.key_lengths is not None and tensors.page_table is None:
        checks.lengths_fit(tensors.key_lengths, tensors.key.shape[2])


def definition_declines(*arguments: Any) -> str | None:
    cu_seqlens = AttentionTensors(*arguments[: len(AttentionTensors._fields)]).cu_seqlens_q
    if cu_seqlens is not None and checks.holds_no_data(cu_seqlens):
        return "reference reads cu_seqlens, and these tensors hold no data"
    return None


dispatch.register_definition(OPERATOR, FEATURES, check=check_data, declines=definition_declines)


class Options(NamedTuple):
    """What may be asked of a call, as attention() and attention_varlen() take it."""

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    key_lengths: Tensor | None = None
    alibi_slopes: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    scale: float | None = None
    return_lse: bool = False
    generator: torch.Generator | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None


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
    options = Options(
        causal, window, mask, bias, key_lengths, alibi_slopes, softcap, sinks, dropout_p, scale,
        return_lse, generator,
    )  # fmt: skip
    if backend is None and key_lengths is None and asks_nothing(options):
        out = inference.attend(query, key, value, causal)
        if out is not None:
            return out
    return call("attention", query, key, value, options, backend)


def asks_nothing(o: Options) -> bool:
    """Nothing but causal, and key_lengths, which the caller knows of."""
    return (
        o.window is None and o.mask is None and o.bias is None and o.alibi_slopes is None
        and o.softcap is None and o.sinks is None and o.scale is None and o.generator is None
        and o.return_lse is False and type(o.dropout_p) is float and o.dropout_p == 0.0
    )  # fmt: skip


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
    key_lengths are declined. max_seqlen_*: at least the longest sequence's length, from which a GPU
    plans its work; None: unknown, and planned without.
    Returns out (total_q, Hq, Dv), or (out, lse) with lse (Hq, total_q).
    """
    name = "attention_varlen"
    checks.is_tensor(name, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    options = Options(
        causal, window, mask, bias, key_lengths, alibi_slopes, softcap, sinks, dropout_p, scale,
        return_lse, generator, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    return call(name, query, key, value, options, backend)


def explain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> str:
    """Which backend serves attention(query, key, value, **options), and why the others do not.

    With cu_seqlens_q and cu_seqlens_k it speaks of attention_varlen. Draws no random numbers.
    """
    backend = options.pop("backend", None)
    for name in options:
        if name not in Options._fields:
            raise TypeError(f"explain() got an unexpected keyword argument {name!r}")
    tensors, spec = prepare("explain", query, key, value, Options(**options))
    asked = request("explain", tensors, spec)
    lines: list[str] = []
    found = registry.verdicts(asked, backend)
    only = registry.wanted(backend)
    serving = next((n for n, reason in found.items() if reason is None and only in (None, n)), None)
    for name, reason in found.items():
        other = "could serve it too" if serving else f"could serve it, but {only!r} is asked for"
        lines.append(f"  {name}: {'serves this call' if name == serving else reason or other}")
    if serving is None:
        lines.append("  nobody serves this call: it raises ValueError")
    if asked.device == "cuda":
        first, second, _ = registry.order(asked)
        table = registry.measured()
        known = registry.row_of(asked) in table
        where = f"measured on {table.get('where')}" if known else registry.UNMEASURED
        lines.append(f"  {first} is asked before {second}: {where}")
    used = ", ".join(sorted(asked.features)) or "no features"
    head = f"attention on {asked.device} in {checks.dtype_name(asked.dtype)} with {used}"
    return "\n".join([head, *lines])


def call(
    name: str, query: Tensor, key: Tensor, value: Tensor, options: Options, backend: str | None
) -> Any:
    """attention() as the function `name`, whose arguments these are."""
    tensors, spec = prepare(name, query, key, value, options)
    out, lse, _ = run(name, tensors, spec, options.generator, backend)
    return (out, lse) if options.return_lse else out


def run(
    name: str,
    tensors: AttentionTensors,
    spec: AttentionSpec,
    generator: torch.Generator | None,
    backend: str | None,
) -> Any:
    """out, lse and what rounding lse left."""
    if spec.dropout_p > 0:
        tensors = tensors._replace(philox=dispatch.draw_philox(tensors.query, generator))
    return dispatch.run(request(name, tensors, spec), backend)


def request(name: str, tensors: AttentionTensors, spec: AttentionSpec) -> registry.Call:
    used = features_of(tensors, spec)
    return dispatch.request("attention", tensors.query, used, (*tensors, *spec), name)


def prepare(
    name: str, query: Tensor, key: Tensor, value: Tensor, options: Options
) -> tuple[AttentionTensors, AttentionSpec]:
    """Checks a call of the function `name` and puts it into the schema's form."""
    checks.is_tensor(name, query=query, key=key, value=value)
    query, key, value = dispatch.autocast(query, key, value)
    checks.is_float(name, query=query, key=key, value=value)
    checks.same_dtype(name, query=query, key=key, value=value)
    o = options
    mask, bias = o.mask, o.bias
    if o.cu_seqlens_q is None and o.cu_seqlens_k is None:
        checks.dense_attention(name, query, key, value)
        B, Hq, Sq, _ = query.shape
        mask, bias = (four_dims(x) for x in check_dense(name, (B, Hq, Sq, key.shape[2]), o))
    else:
        checks.packed_attention(name, query, key, value)
        checks.is_cu_seqlens(name, o.cu_seqlens_q, o.cu_seqlens_k)
        checks.not_packed(name, mask=mask, bias=bias, key_lengths=o.key_lengths)
        B, Hq = len(o.cu_seqlens_q) - 1, query.shape[1]  # type: ignore[arg-type]
    check_heads(name, B, Hq, o)
    checks.same_device(
        name, query=query, key=key, value=value, mask=mask, bias=bias, key_lengths=o.key_lengths,
        alibi_slopes=o.alibi_slopes, sinks=o.sinks, cu_seqlens_q=o.cu_seqlens_q,
        cu_seqlens_k=o.cu_seqlens_k,
    )  # fmt: skip
    checks.is_generator(name, o.generator, query)
    tensors = AttentionTensors(
        last_contiguous(query), last_contiguous(key), last_contiguous(value), bias, mask, o.alibi_slopes,
        o.sinks, int32(o.cu_seqlens_q), int32(o.cu_seqlens_k), int32(o.key_lengths),
    )  # fmt: skip
    return tensors, scalars(name, query.shape[-1], o)


def check_dense(
    name: str, shape: tuple[int, ...], options: Options
) -> tuple[Tensor | None, Tensor | None]:
    """mask and bias, once they and key_lengths fit the scores' shape (B, Hq, Sq, Sk)."""
    mask, bias, key_lengths = options.mask, options.bias, options.key_lengths
    layout = "(B, Hq, Sq, Sk)"
    if mask is not None:
        checks.is_tensor(name, mask=mask)
        checks.is_bool(name, "mask", mask, "may attend", hint="; a float to be added is a bias")
        checks.broadcasts(name, "mask", mask, shape, layout)
    if bias is not None:
        checks.is_tensor(name, bias=bias)
        checks.is_float(name, bias=bias)
        checks.broadcasts(name, "bias", bias, shape, layout)
    if key_lengths is not None:
        checks.is_tensor(name, key_lengths=key_lengths)
        checks.is_integer(name, key_lengths=key_lengths)
        checks.has_shape(name, "key_lengths", key_lengths, shape[:1], layout="(B,)")
    return mask, bias


def check_heads(name: str, B: int, Hq: int, options: Options) -> None:
    """What there is one of for a head."""
    slopes, sinks = options.alibi_slopes, options.sinks
    if slopes is not None:
        checks.is_tensor(name, alibi_slopes=slopes)
        checks.is_float(name, alibi_slopes=slopes)
        checks.has_shape(name, "alibi_slopes", slopes, (Hq,), (B, Hq), layout="(Hq,) or (B, Hq)")
    if sinks is not None:
        checks.is_tensor(name, sinks=sinks)
        checks.is_float(name, sinks=sinks)
        checks.has_shape(name, "sinks", sinks, (Hq,), layout="(Hq,)")


def scalars(name: str, D: int, options: Options) -> AttentionSpec:
    """What is not a tensor, checked."""
    o = options
    checks.is_flag(name, causal=o.causal, return_lse=o.return_lse)
    checks.is_window(name, o.window)
    checks.in_range(name, "dropout_p", o.dropout_p, 0, 1)
    if o.softcap is not None:
        checks.in_range(name, "softcap", o.softcap, 0)
    if o.scale is not None:
        checks.is_finite(name, "scale", o.scale)
    for argument, n in (("max_seqlen_q", o.max_seqlen_q), ("max_seqlen_k", o.max_seqlen_k)):
        if n is not None:
            checks.is_int(name, argument, n, low=0)
    # a window wider than any length is none; no channels give scores of 0 by any scale
    left, right = (n if n is None or n < 2**31 else None for n in o.window or (None, None))
    scale = float(o.scale) if o.scale is not None else D**-0.5 if D else 1.0
    return AttentionSpec(
        scale, o.causal, left, right, float(o.softcap or 0.0), float(o.dropout_p), False,
        o.max_seqlen_q or 0, o.max_seqlen_k or 0,
    )  # fmt: skip


def four_dims(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dim() == 4 else x[(None,) * (4 - x.dim())]


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def int32(x: Tensor | None) -> Tensor | None:
    """Lengths as kernels read them. One beyond int32 becomes its limit, which no kernel accepts."""
    if x is None:
        return None
    if x.dtype == torch.int64:
        x = x.clamp(-(2**31), 2**31 - 1).int()
    return x.contiguous()
