"""softmax over kept entries, with scale and causal. Spec, schemas, public function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.reference.softmax import softmax_bwd
from . import checks, dispatch
from .operator import Operator

OPERATOR = Operator(
    "softmax",
    "(Tensor x, Tensor? mask, bool causal, float scale) -> Tensor y",
    "(Tensor dy, Tensor y, bool causal, float scale) -> Tensor",
    differentiable=["x"],
    define=reference.softmax,
    define_backward=softmax_bwd,
    fake=lambda x, mask, causal, scale: torch.empty_like(x, memory_format=torch.contiguous_format),
)
FEATURES = frozenset({"mask", "causal"})
dispatch.register_definition(OPERATOR, FEATURES)


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * x) over `dim`, of x's shape and dtype.

    x: (..., Sq, Sk) or any shape, float64 (reference only), float32, float16 or bfloat16.
    mask: bool, broadcastable to x, True keeps. causal: entry j of row i of the last two dimensions is
    kept where j <= i + Sk - Sq. A row that keeps nothing is 0. Without options it equals
    torch.softmax. Under autocast the result is float32, as torch's on a GPU.
    Raises ValueError or TypeError, naming the argument.
    """
    check(x, dim, mask, causal, scale)
    if mask is not None:
        mask = mask.expand(x.shape)
    if dispatch.autocasts(x.device.type) and x.dtype != torch.float64:
        x = x.float()
    if x.dim() == 0:
        kept = None if mask is None else mask.reshape(1)
        return softmax(x.reshape(1), mask=kept, scale=scale, backend=backend).reshape(())
    last = dim % x.dim() == x.dim() - 1
    if not last:
        x = x.transpose(dim, -1)
        mask = None if mask is None else mask.transpose(dim, -1)
    features = ["mask"] * (mask is not None) + ["causal"] * causal
    call = dispatch.request("softmax", x, features, (x, mask, causal, float(scale)))
    y = dispatch.run(call, backend)
    return y if last else y.transpose(dim, -1)


def check(x: Tensor, dim: int, mask: Tensor | None, causal: bool, scale: float) -> None:
    checks.is_tensor("softmax", x=x)
    checks.is_float("softmax", x=x)
    checks.is_int("softmax", "dim", dim)
    checks.is_flag("softmax", causal=causal)
    checks.is_finite("softmax", "scale", scale)
    dims = max(x.dim(), 1)
    if not -dims <= dim < dims:
        raise ValueError(f"softmax: dim must be a dimension of {checks.described(x=x)}, got {dim}")
    if causal and (x.dim() < 2 or dim % dims != dims - 1):
        raise ValueError(
            f"softmax: causal needs rows and columns and dim=-1, got {checks.described(x=x)}, dim={dim}"
        )
    if mask is not None:
        checks.is_tensor("softmax", mask=mask)
        checks.is_bool("softmax", "mask", mask, "keeps")
        checks.same_device("softmax", x=x, mask=mask)
        checks.broadcasts("softmax", "mask", mask, x.shape, "x")
