"""Every error about a call's arguments, in one place. Kernels trust what passed here.

A sentence names the function that was called, the argument, the rule and the values that broke it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import registry

FLOATS = "float64, float32, float16 or bfloat16"
INF = float("inf")
INT64 = 2**63
STRIDED = torch.strided
# a traced integer or number takes a plain one's place
INTEGER, NUMBER, FLAG = (
    (int, torch.SymInt),
    (int, float, torch.SymInt, torch.SymFloat),
    (bool, torch.SymBool),
)


def described(**tensors: Tensor | None) -> str:
    """key (2, 4, 96, 64), value (2, 4, 64, 64)"""
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items() if x is not None)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shown(x: Any) -> str:
    """What was passed, on one line and not at length."""
    if isinstance(x, Tensor):
        return f"a tensor {tuple(x.shape)}"
    return " ".join(reprlib.repr(x).split())


def is_tensor(operator: str, **arguments: Any) -> None:
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(x).__name__}")
        if x.layout is not STRIDED or x.is_nested:
            layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
            raise TypeError(f"{operator}: {name} must be a dense tensor, got a {layout} one")


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


def is_bool(operator: str, name: str, x: Tensor, true_means: str, hint: str = "") -> None:
    if x.dtype != torch.bool:
        raise TypeError(
            f"{operator}: {name} must be bool (True {true_means}), got {dtype_name(x.dtype)}{hint}"
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


def is_flag(operator: str, **flags: Any) -> None:
    for name, x in flags.items():
        if not isinstance(x, FLAG):
            raise TypeError(f"{operator}: {name} must be True or False, got {shown(x)}")


def is_int(operator: str, name: str, x: Any, low: int = -INT64, high: int = INT64 - 1) -> None:
    if not isinstance(x, INTEGER) or isinstance(x, bool):
        raise TypeError(f"{operator}: {name} must be an int, got {shown(x)}")
    if not low <= x <= high:
        rule = f"an int of at least {low}" if x < low else f"an int of at most {high}"
        raise ValueError(f"{operator}: {name} must be {rule}, got {x}")


def in_range(operator: str, name: str, x: Any, low: float, high: float = INF) -> None:
    if not isinstance(x, NUMBER) or isinstance(x, bool):
        raise TypeError(f"{operator}: {name} must be a number, got {type(x).__name__}")
    if not (low <= x <= high and -INF < x < INF):
        rule = f"in [{low:g}, {high:g}]" if high < INF else "finite"
        rule += f" and at least {low:g}" if low > -INF and high == INF else ""
        raise ValueError(f"{operator}: {name} must be {rule}, got {x}")


def is_finite(operator: str, name: str, x: Any) -> None:
    in_range(operator, name, x, -INF)


def one_of(operator: str, name: str, x: Any, choices: Sequence[str]) -> None:
    if not isinstance(x, str) or x not in choices:
        raise ValueError(
            f"{operator}: {name} must be one of {', '.join(map(repr, choices))}, got {shown(x)}"
        )


def is_generator(operator: str, generator: Any, like: Tensor) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{operator}: generator must be a torch.Generator or None, got {type(generator).__name__}"
        )
    if generator.device.type != like.device.type:
        raise ValueError(
            f"{operator}: generator must be on the tensors' device {like.device.type}, "
            f"got one on {generator.device.type}"
        )


def is_weight(operator: str, weight: Tensor, scale: Tensor | None) -> None:
    if weight.dtype == torch.int8 and scale is None:
        raise ValueError(f"{operator}: a weight in int8 needs its scale, got None")
    if weight.dtype != torch.int8 and scale is not None:
        raise ValueError(
            f"{operator}: a scale belongs to a weight in int8, got one in {dtype_name(weight.dtype)}"
        )
    if weight.dtype not in (torch.int8, torch.bfloat16):
        raise TypeError(
            f"{operator}: weight must be int8 with a scale or bfloat16, got {dtype_name(weight.dtype)}"
        )


def is_frozen(operator: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{operator}: {name} is a constant and has no gradient, got one that requires_grad; "
                "train what is beside it, as LoRA does, or the weight before it is quantized"
            )


# ---- attention ----------------------------------------------------------------------------------


def dense_attention(operator: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        has_dims(operator, name, x, 4, layout="(B, H, S, D)")
    agree(operator, "B", 0, query=query, key=key, value=value)
    agree(operator, "D", 3, query=query, key=key)
    agree(operator, "Hkv", 1, key=key, value=value)
    agree(operator, "Sk", 2, key=key, value=value)
    heads_divide(operator, query, key)


def packed_attention(operator: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        has_dims(operator, name, x, 3, layout="packed (total, H, D)")
    agree(operator, "D", 2, query=query, key=key)
    agree(operator, "Hkv", 1, key=key, value=value)
    agree(operator, "total_k", 0, key=key, value=value)
    heads_divide(operator, query, key)


def is_cu_seqlens(operator: str, cu_seqlens_q: Any, cu_seqlens_k: Any) -> None:
    is_tensor(operator, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    is_integer(operator, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        has_dims(operator, name, cu_seqlens, 1, layout="(B + 1,)")
        if len(cu_seqlens) == 0:
            raise ValueError(f"{operator}: {name} must have B + 1 entries, the first 0, got none")
    agree(operator, "B + 1", 0, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)


def not_packed(operator: str, **arguments: Any) -> None:
    for name, x in arguments.items():
        if x is not None:
            raise ValueError(
                f"{operator}: {name} is not defined for packed sequences; cut or pad them, or use attention"
            )


def heads_divide(operator: str, query: Tensor, key: Tensor) -> None:
    query_heads, key_heads = query.shape[1], key.shape[1]
    if query_heads % key_heads if key_heads else query_heads:
        raise ValueError(
            f"{operator}: the heads of query must be a multiple of the heads of key, "
            f"got {query_heads} and {key_heads}: {described(query=query, key=key)}"
        )


def is_window(operator: str, window: Any) -> None:
    ok = window is None or (
        isinstance(window, (tuple, list))
        and len(window) == 2
        and all(
            side is None or (isinstance(side, INTEGER) and not isinstance(side, bool) and side >= 0)
            for side in window
        )
    )
    if not ok:
        raise ValueError(
            f"{operator}: window must be None or (left, right), each None (unlimited) or an int of at "
            f"least 0, got {shown(window)}"
        )


def agree(operator: str, letter: str, dim: int, **tensors: Tensor) -> None:
    first, *others = tensors.values()
    size = first.shape[dim]
    for (
        x
    ) in others:  # one by one: a set would hash a traced size, and compile anew for every length
        if x.shape[dim] != size:
            *names, last = tensors
            listed = described(**tensors)
            raise ValueError(
                f"{operator}: {', '.join(names)} and {last} disagree on {letter}: {listed}"
            )


# ---- what depends on data: inside the kernels; these serve the definition -----------------------


def can_read(*arguments: Any) -> bool:
    """The tensors' values can be looked at: nothing is traced or transformed, or waits for a GPU."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    return all(x.device.type == "cpu" and not holds_no_data(x) for x in tensors)


def holds_no_data(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


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
