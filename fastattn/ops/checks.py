"""Every error about a call's arguments, in one place. Kernels trust what passed here.

A sentence names the operator, the argument, the rule and the values that broke it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import registry

FLOATS = "float64, float32, float16 or bfloat16"


def described(**tensors: Tensor | None) -> str:
    """key (2, 4, 96, 64), value (2, 4, 64, 64)"""
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items() if x is not None)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_tensor(operator: str, **arguments: Any) -> None:
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(x).__name__}")


def is_float(operator: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.dtype not in registry.ALL_FLOATS:
            raise TypeError(f"{operator}: {name} must be {FLOATS}, got {dtype_name(x.dtype)}")


def same_dtype(operator: str, **tensors: Tensor | None) -> None:
    given = {name: x.dtype for name, x in tensors.items() if x is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name} {dtype_name(d)}" for name, d in given.items())
        raise TypeError(f"{operator}: {', '.join(given)} must have one dtype, got {listed}")


def same_device(operator: str, **tensors: Tensor | None) -> None:
    given = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in given.items())
        raise ValueError(f"{operator}: all tensors must be on one device, got {listed}")


def has_dims(operator: str, name: str, x: Tensor, *dims: int, layout: str) -> None:
    if x.dim() not in dims:
        raise ValueError(f"{operator}: {name} must be {layout}, got {described(**{name: x})}")


def has_shape(operator: str, name: str, x: Tensor, *shapes: Sequence[int], layout: str) -> None:
    if all(tuple(x.shape) != tuple(shape) for shape in shapes):
        wanted = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(
            f"{operator}: {name} must be {layout} = {wanted}, got {described(**{name: x})}"
        )


def is_bool(operator: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.dtype != torch.bool:
            raise TypeError(
                f"{operator}: {name} must be bool (True may attend), got {dtype_name(x.dtype)}; "
                "a float to be added is a bias"
                if operator == "attention"
                else f"{operator}: {name} must be bool (True keeps), got {dtype_name(x.dtype)}"
            )


def is_integer(operator: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{operator}: {name} must be int32 or int64, got {dtype_name(x.dtype)}")


def broadcasts(operator: str, name: str, x: Tensor, shape: Sequence[int], layout: str) -> None:
    """x is broadcastable to shape without growing it."""
    ok = x.dim() <= len(shape) and all(
        have in (1, want) for have, want in zip(reversed(x.shape), reversed(shape), strict=False)
    )
    if not ok:
        raise ValueError(
            f"{operator}: {name} must broadcast to {layout} = {tuple(shape)}, got {described(**{name: x})}"
        )


def in_range(operator: str, name: str, x: float, low: float, high: float = math.inf) -> None:
    if not isinstance(x, (int, float)) or isinstance(x, bool):
        raise TypeError(f"{operator}: {name} must be a number, got {type(x).__name__}")
    if not low <= x <= high or not math.isfinite(x):
        rule = f"in [{low:g}, {high:g}]" if high < math.inf else "finite"
        rule += f" and at least {low:g}" if -math.inf < low and high == math.inf else ""
        raise ValueError(f"{operator}: {name} must be {rule}, got {x}")


def is_finite(operator: str, name: str, x: float) -> None:
    in_range(operator, name, x, -math.inf)


def one_of(operator: str, name: str, x: Any, choices: Sequence[Any]) -> None:
    if x not in choices:
        raise ValueError(
            f"{operator}: {name} must be one of {', '.join(map(repr, choices))}, got {x!r}"
        )


# ---- attention ----------------------------------------------------------------------------------


def heads_divide(query_heads: int, key_heads: int, **tensors: Tensor) -> None:
    if key_heads == 0 and query_heads == 0:
        return
    if key_heads == 0 or query_heads % key_heads:
        raise ValueError(
            "attention: the heads of query must be a multiple of the heads of key, "
            f"got {query_heads} and {key_heads}: {described(**tensors)}"
        )


def is_window(window: Any) -> None:
    ok = window is None or (
        isinstance(window, (tuple, list))
        and len(window) == 2
        and all(side is None or (isinstance(side, int) and side >= 0) for side in window)
    )
    if not ok:
        raise ValueError(
            "attention: window must be None or (left, right), each None (unlimited) or an int of at "
            f"least 0, got {window!r}"
        )


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        has_dims("attention", name, x, 4, layout="(B, H, S, D)")
    tensors = {"query": query, "key": key, "value": value}
    agree("B", 0, **tensors)
    agree("D", 3, query=query, key=key)
    agree("Hkv", 1, key=key, value=value)
    agree("Sk", 2, key=key, value=value)
    heads_divide(query.shape[1], key.shape[1], query=query, key=key)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any
) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        has_dims("attention", name, x, 3, layout="packed (total, H, D)")
    agree("D", 2, query=query, key=key)
    agree("Hkv", 1, key=key, value=value)
    agree("total_k", 0, key=key, value=value)
    heads_divide(query.shape[1], key.shape[1], query=query, key=key)
    is_tensor("attention", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    is_integer("attention", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        has_dims("attention", name, cu_seqlens, 1, layout="(B + 1,)")
        if len(cu_seqlens) == 0:
            raise ValueError(f"attention: {name} must have B + 1 entries, the first 0, got none")
    agree("B + 1", 0, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)


def agree(letter: str, dim: int, **tensors: Tensor) -> None:
    if len({x.shape[dim] for x in tensors.values()}) > 1:
        *first, last = tensors
        raise ValueError(
            f"attention: {', '.join(first)} and {last} disagree on {letter}: {described(**tensors)}"
        )


# ---- what depends on data: inside the kernels; these serve the definition -----------------------


def ascending(name: str, cu_seqlens: Tensor, total: int) -> None:
    values = cu_seqlens.tolist()
    for at, (before, after) in enumerate(zip([0, *values], values, strict=False)):
        if after < before or (at == 0 and after != 0):
            raise ValueError(
                f"attention: {name} must start at 0 and not decrease: entry {at} is {after} after {before}"
            )
    if values[-1] != total:
        raise ValueError(
            f"attention: {name} must end at the packed total {total}, got {values[-1]}"
        )


def lengths_fit(key_lengths: Tensor, Sk: int) -> None:
    for b, length in enumerate(key_lengths.tolist()):
        if not 0 <= length <= Sk:
            raise ValueError(f"attention: key_lengths must be in [0, {Sk}], entry {b} is {length}")


def targets_fit(target: Tensor, V: int, ignore_index: int) -> None:
    wrong = (target != ignore_index) & ((target < 0) | (target >= V))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"cross_entropy: target {int(target[row])} at row {row} is outside [0, {V}) and is not "
            f"ignore_index {ignore_index}"
        )


def positions_fit(positions: Tensor, P: int) -> None:
    wrong = (positions < 0) | (positions >= P)
    if wrong.any():
        raise ValueError(
            f"rotary: positions must be in [0, {P}), the rows of cos; got {int(positions[wrong][0])}"
        )
