"""Attention that asks for nothing but causal, and norms, without gradients, on a CPU: a short way to kernels.

The general way takes 46 us of Python and of a schema with 21 arguments, as long as a new token's attention
over 400 keys; a norm's takes 24, as long as 100 rows of 768. Whatever is not exactly as it is here goes the
general way, which says what is wrong.
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
NORM_SCHEMA = (
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, bool rms, float eps) -> Tensor"
)
PLAIN = (Tensor, torch.nn.Parameter)  # no subclass, whose own meaning the general way keeps

_operator: Any = None
_norm: Any = None


def bind() -> None:
    """Once the CPU kernels are loaded."""
    global _operator, _norm
    torch.library.define("fastattn_cpu::attention_plain", SCHEMA)
    torch.library.define("fastattn_cpu::norm_plain", NORM_SCHEMA)
    _operator = torch.ops.fastattn_cpu.attention_plain.default
    _norm = torch.ops.fastattn_cpu.norm_plain.default


def attend(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, key_lengths: Tensor | None = None
) -> Tensor | None:
    """out of attention(), bit for bit, or None where the call must go the general way. key_lengths: of
    a cache, from which the diagonal counts."""
    if _operator is None or transformed() or not (causal is True or causal is False):
        return None
    for x in (query, key, value):
        if not is_bare(x) or x.dtype != query.dtype or x.dim() != 4 or x.stride(3) != 1:
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


def normalise(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
) -> Tensor | None:
    """y of layer_norm() or rms_norm(), bit for bit, or None where the call must go the general way."""
    if _norm is None or transformed() or type(eps) is not float or not 0 <= eps < float("inf"):
        return None
    if type(x) not in PLAIN or x.dim() == 0 or x.dtype not in registry.KERNEL_FLOATS:
        return None
    row = x.shape[-1:]
    for tensor, shape in ((x, x.shape), (residual, x.shape), (weight, row), (bias, row)):
        if tensor is None:
            continue
        if not is_bare(tensor) or tensor.shape != shape or tensor.dtype != x.dtype:
            return None
    return _norm(x, residual, weight, bias, rms, eps)


def is_bare(x: Tensor) -> bool:
    """A dense tensor of a CPU, without a meaning of its own and without a gradient."""
    if type(x) not in PLAIN or not x.is_cpu or x.layout is not torch.strided or x.is_nested:
        return False
    return not (x.requires_grad and torch.is_grad_enabled())


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
