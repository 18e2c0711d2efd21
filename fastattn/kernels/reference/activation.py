"""gelu (with an optional bias added first) and the gated activations swiglu and geglu.

gelu: x * Phi(x), or its tanh form (Hendrycks and Gimpel 2016). Gated: Shazeer 2020.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(
    x: Tensor, bias: Tensor | None, tanh: bool, *, accumulate: torch.dtype | None = None
) -> Tensor:
    """gelu(x + bias) in x's shape and dtype; bias (C,) is added over the last dimension."""
    acc = accumulate or torch.promote_types(x.dtype, torch.float32)
    z = x.to(acc) if bias is None else x.to(acc) + bias.to(acc)
    return F.gelu(z, approximate="tanh" if tanh else "none").to(x.dtype)


def glu(
    gate: Tensor, up: Tensor, gelu: bool, tanh: bool, *, accumulate: torch.dtype | None = None
) -> Tensor:
    """silu(gate) * up, or gelu(gate) * up, in gate's shape and dtype."""
    acc = accumulate or torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(acc)
    activated = F.gelu(g, approximate="tanh" if tanh else "none") if gelu else F.silu(g)
    return (activated * up.to(acc)).to(gate.dtype)
