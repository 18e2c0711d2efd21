"""Attention that asks for nothing but causal, without gradients, on a CPU: the short way to the kernel.

The general way takes 46 us of Python and of a schema with 21 arguments, as long as a new token's attention
over 400 keys. Whatever is not exactly as it is here goes the general way, which says what is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import registry
from . import dispatch
from .operator import transforming

SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, float scale, bool causal, "
    "bool diagonal_at_length) -> Tensor"
)
PLAIN = (Tensor, torch.nn.Parameter)  # no subclass, whose own meaning the general way keeps

_operator: Any = None


def bind() -> None:
    """Once the CPU kernels are loaded."""
    global _operator
    torch.library.define("fastattn_cpu::attention_plain", SCHEMA)
    _operator = torch.ops.fastattn_cpu.attention_plain.default


def attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, key_lengths: Tensor | None = None
) -> Tensor | None:
    """out of attention(), bit for bit, or None where the call must go the general way. key_lengths: of
    a cache, from which the diagonal counts."""
    if _operator is None or transformed() or not (causal is True or causal is False):
        return None
    for x in (query, key, value):
        if type(x) not in PLAIN or not x.is_cpu or x.layout is not torch.strided or x.is_nested:
            return None
        if (x.requires_grad and torch.is_grad_enabled()) or x.dtype != query.dtype or x.dim() != 4:
            return None
        if x.stride(3) != 1:
            return None
    B, Hq, _, D = query.shape
    _, Hkv, Sk, _ = value.shape
    if key.shape != (B, Hkv, Sk, D) or value.shape[0] != B or D == 0 or Hkv == 0 or Hq % Hkv:
        return None
    if query.dtype not in registry.KERNEL_FLOATS:
        return None
    at_length = key_lengths is not None
    try:
        return _operator(query, key, value, key_lengths, D**-0.5, causal, at_length)
    except RuntimeError:
        return None


def transformed() -> bool:
    """Does somebody watch or change what operators do? Then they are shown the general operator."""
    return (
        registry.wanted(None) is not None
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or transforming()
        or dispatch.autocasts("cpu")
    )
