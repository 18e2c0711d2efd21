"""Triton kernels: one file an operator, each with its launcher, which computes the operator's schema.

Nothing here is imported before a call needs it: Triton is optional, and it decides when a kernel is
decorated whether that kernel is compiled for a GPU or interpreted on the CPU (fastattn.emulate).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

# operator's name in the schemas -> the file that has a launcher of that name
LAUNCHERS = {
    "attention_fwd": "attention_fwd",
    "attention_bwd": "attention_bwd",
    "cache_append_": "cache",
    "cross_entropy_fwd": "cross_entropy",
    "cross_entropy_bwd": "cross_entropy",
    "cross_entropy_bwd_": "cross_entropy",
    "gelu_fwd": "activation",
    "gelu_bwd": "activation",
    "glu_fwd": "activation",
    "glu_bwd": "activation",
    "norm_fwd": "norm",
    "norm_bwd": "norm",
    "rotary_fwd": "rotary",
    "rotary_bwd": "rotary",
    "rotary_tables_fwd": "rotary",
    "rotary_tables_bwd": "rotary",
    "softmax_fwd": "softmax",
    "softmax_bwd": "softmax",
}


def launcher(name: str) -> Callable[..., Any]:
    """The function over tensors that computes `name`: on a GPU, or where Triton interprets."""
    module = importlib.import_module(f"{__name__}.{LAUNCHERS[name]}")
    found: Callable[..., Any] = getattr(module, name)
    return found
