"""flash-attn's way to ask for attention, in the words of fastattn.ops: (B, S, H, D) for (B, H, S, D), window
sides of -1 for None, RuntimeError for ValueError. And S_dmask, which only flash-attn knows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from ...kernels.reference import philox
from ...ops import checks, dispatch, inference
from ...ops.attention import Options, asks_nothing, prepare, request

P = ParamSpec("P")
R = TypeVar("R")


def raises_runtime_errors(function: Callable[P, R]) -> Callable[P, R]:
    """flash-attn's errors are RuntimeError; the sentences are ours."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise RuntimeError(str(error)) from None

    return call


class Asked(NamedTuple):
    """What flash-attn's functions share, in their order and words, then what later versions added.

    deterministic asks for nothing: every backward here is.
    """

    dropout_p: float = 0.0
    softmax_scale: float | None = None
    causal: bool = False
    window_size: Any = (-1, -1)
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    deterministic: bool = False
    return_attn_probs: bool = False
    learnable_sink: Tensor | None = None
    return_lse: bool = False

    def options(self, name: str) -> Options:
        checks.is_flag(
            name,
            deterministic=self.deterministic,
            return_attn_probs=self.return_attn_probs,
            return_lse=self.return_lse,
        )
        checks.is_finite(name, "softcap", self.softcap)
        return Options(
            causal=self.causal,
            window=window(name, self.window_size),
            alibi_slopes=self.alibi_slopes,
            softcap=self.softcap if self.softcap > 0 else None,
            sinks=self.learnable_sink,
            dropout_p=self.dropout_p,
            scale=self.softmax_scale,
        )


def window(name: str, window_size: Any) -> tuple[int | None, int | None] | None:
    """(left, right) with None for no limit, from flash-attn's -1 (any negative) or None; ints or a tensor."""
    sides = window_size.tolist() if isinstance(window_size, Tensor) else window_size
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise ValueError(
            f"{name}: window_size must be (left, right), -1 for no limit, got {checks.shown(sides)}"
        )
    left, right = (int(n) if isinstance(n, Tensor) else n for n in sides)
    for side, n in (("window_size[0]", left), ("window_size[1]", right)):
        if n is not None:
            checks.is_int(name, side, n)
    left, right = (n if n is None or n >= 0 else None for n in (left, right))
    return None if left is None and right is None else (left, right)


# ---- dense: (B, S, H, D) ------------------------------------------------------------------------


def dense(name: str, q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Any:
    """out (B, Sq, Hq, Dv), or (out, lse (B, Hq, Sq)), or (out, lse, S_dmask (B, Hq, Sq, Sk)) for probs."""
    options = asked.options(name)
    check_dense(name, q, k, v)
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    if not asked.return_attn_probs and not asked.return_lse and asks_nothing(options):
        out = inference.attend(query, key, value, options.causal)
        if out is not None:
            return out.transpose(1, 2)
    out, lse, drawn = forward(name, query, key, value, options)
    out = out.transpose(1, 2)
    if asked.return_attn_probs:
        return out, lse, dense_probs(name, query, key, options, drawn)
    return (out, lse) if asked.return_lse else out


def forward(
    name: str, query: Tensor, key: Tensor, value: Tensor, options: Options, drawn: Any = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """out, lse and the (seed, offset) of the dropout: drawn, or None where nothing is dropped."""
    tensors, spec = prepare(name, query, key, value, options)
    if spec.dropout_p > 0:
        if drawn is None:
            drawn = dispatch.draw_philox(tensors.query, None)
        tensors = tensors._replace(philox=drawn)
    out, lse, _ = dispatch.run(request(name, tensors, spec), None)
    return out, lse, tensors.philox


def check_dense(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """In the caller's letters and layout; what is left, prepare() checks."""
    given = {"q": q, "k": k, "v": v}
    checks.is_tensor(name, **given)
    for letter, x in given.items():
        checks.has_dims(name, letter, x, 4, layout="(B, S, H, D)")
    checks.agree(name, "B", 0, **given)
    checks.agree(name, "D", 3, q=q, k=k)
    checks.agree(name, "Hkv", 2, k=k, v=v)
    checks.agree(name, "Sk", 1, k=k, v=v)
    check_heads(name, q, k)


def check_heads(name: str, q: Tensor, k: Tensor) -> None:
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(
            f"{name}: q's heads must be a multiple of k's, got {heads} and {kv_heads}: "
            f"{checks.described(q=q, k=k)}"
        )


# ---- packed: (total, H, D) ----------------------------------------------------------------------


class Lengths(NamedTuple):
    """Where packed sequences begin: (B + 1,) each, and the longest's lengths, None where unknown."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int | None
    max_seqlen_k: int | None


def packed(name: str, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths, asked: Asked) -> Any:
    """out (total_q, Hq, Dv), or (out, lse (Hq, total_q)), or those and S_dmask
    (B, Hq, max_seqlen_q, max_seqlen_k)."""
    options = asked.options(name)._replace(**lengths._asdict())
    check_packed(name, q, k, v)
    out, lse, drawn = forward(name, q, k, v, options)
    if asked.return_attn_probs:
        return out, lse, packed_probs(name, q, k, options, drawn)
    return (out, lse) if asked.return_lse else out


def check_packed(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    given = {"q": q, "k": k, "v": v}
    checks.is_tensor(name, **given)
    for letter, x in given.items():
        checks.has_dims(name, letter, x, 3, layout="packed (total, H, D)")
    checks.agree(name, "D", 2, q=q, k=k)
    checks.agree(name, "Hkv", 1, k=k, v=v)
    checks.agree(name, "total_k", 0, k=k, v=v)
    check_heads(name, q, k)


def longest(name: str, argument: str, given: Any) -> int | None:
    """max_seqlen as an int; callers also hold it as a tensor of one number, or not at all."""
    if isinstance(given, Tensor):
        if given.numel() != 1:
            raise ValueError(f"{name}: {argument} must be one int, got {checks.shown(given)}")
        given = int(given)
    if given is not None:
        checks.is_int(name, argument, given, low=0)
    return given


# ---- S_dmask ------------------------------------------------------------------------------------
# exp(score - row's largest score), negative where dropout dropped: what flash-attn's kernels leave in it
# where one block spans all keys. Memory O(Sq * Sk): flash-attn has it for tests alone.


def dense_probs(
    name: str, query: Tensor, key: Tensor, options: Options, drawn: Tensor | None
) -> Tensor:
    if drawn is None:
        return query.new_empty(0)
    B, Hq = query.shape[:2]
    planes = torch.arange(B * Hq, device=query.device).reshape(B, Hq)
    return signed(name, query, key, options, planes, drawn)


def packed_probs(name: str, q: Tensor, k: Tensor, options: Options, drawn: Tensor | None) -> Tensor:
    if drawn is None:
        return q.new_empty(0)
    assert options.cu_seqlens_q is not None and options.cu_seqlens_k is not None
    starts = zip(options.cu_seqlens_q.tolist(), options.cu_seqlens_k.tolist(), strict=True)
    starts_q, starts_k = (list(s) for s in zip(*starts, strict=True))
    B, Hq = len(starts_q) - 1, q.shape[1]
    Sq, Sk = (
        max((b - a for a, b in itertools.pairwise(s)), default=0) for s in (starts_q, starts_k)
    )
    probs = q.new_zeros(B, Hq, Sq, Sk)
    one = options._replace(
        cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None
    )
    for b in range(B):
        query = q[starts_q[b] : starts_q[b + 1]].transpose(0, 1)[None]
        key = k[starts_k[b] : starts_k[b + 1]].transpose(0, 1)[None]
        slopes = options.alibi_slopes
        slopes = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        planes = b * Hq + torch.arange(Hq, device=q.device)[None]
        found = signed(name, query, key, one._replace(alibi_slopes=slopes), planes, drawn)
        probs[b, :, : query.shape[2], : key.shape[2]] = found[0]
    return probs


@torch.no_grad()
def signed(
    name: str, query: Tensor, key: Tensor, options: Options, planes: Tensor, drawn: Tensor
) -> Tensor:
    """(B, Hq, Sq, Sk): the weights are attention over the rows of the identity, so that no score is
    computed twice in two ways."""
    B, Hkv, Sk, _ = key.shape
    Sq, p = query.shape[2], options.dropout_p
    precise = torch.promote_types(query.dtype, torch.float32)
    identity = torch.eye(Sk, dtype=precise, device=key.device).expand(B, Hkv, Sk, Sk)
    plain = options._replace(dropout_p=0.0, sinks=None)
    weights, _, _ = forward(name, query.to(precise), key.to(precise), identity, plain)
    if not Sk:
        return weights.to(query.dtype)
    largest = weights.amax(-1, keepdim=True)
    scaled = weights / torch.where(largest > 0, largest, 1.0)
    rows = torch.arange(Sq, device=query.device)
    kept = philox.keep_mask(rows, planes[..., None], Sk, drawn, p)
    return torch.where(kept, scaled, -scaled).to(query.dtype)
