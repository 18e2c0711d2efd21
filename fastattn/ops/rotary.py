"""Rotary position embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from . import checks, dispatch
from .operator import Operator

TABLES = "Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse"


def turn_back(
    dy: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, *flags: bool
) -> Tensor:
    """The gradient of a rotation is the opposite rotation."""
    interleaved, inverse = flags
    return reference.rotary(dy, cos, sin, positions, interleaved, not inverse)


OPERATOR = Operator(
    "rotary",
    f"(Tensor x, {TABLES}) -> Tensor y",
    f"(Tensor dy, {TABLES}) -> Tensor dx",
    differentiable=["x"],
    define=reference.rotary,
    define_backward=turn_back,
    fake=lambda x, *rest: torch.empty_like(x),
)
# The same rotation where cos or sin wants a gradient: its backward keeps x, which the other does not.
TABLES_OPERATOR = Operator(
    "rotary_tables",
    f"(Tensor x, {TABLES}) -> Tensor y",
    f"(Tensor dy, Tensor x, {TABLES}, int needs) -> (Tensor dx, Tensor dcos, Tensor dsin)",
    differentiable=["x", "cos", "sin"],
    define=reference.rotary,
    fake=lambda x, *rest: torch.empty_like(x),
)
FEATURES = frozenset({"positions"})


def check_data(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, *flags: Any) -> None:
    if positions is not None:
        checks.positions_fit(positions, cos.shape[0])


dispatch.register_definition(OPERATOR, FEATURES, check=check_data)
dispatch.register_definition(TABLES_OPERATOR, FEATURES, check=check_data)


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    positions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rotates channel pairs of x: (B, H, S, D) by the angles of each token's position.

    cos, sin: (P, R / 2), R <= D; channels from R on pass through. positions: (S,) or (B, S) int, the
    row of cos and sin for each token; None: 0 to S - 1. Pairs are (d, d + R / 2) as in GPT-NeoX and
    Llama, or (2d, 2d + 1) as in GPT-J when interleaved. Su et al. 2021, arXiv:2104.09864.
    """
    checks.is_tensor("rotary", x=x, cos=cos, sin=sin)
    if positions is not None:
        checks.is_tensor("rotary", positions=positions)
    checks.is_flag("rotary", interleaved=interleaved)
    checks.is_float("rotary", x=x, cos=cos, sin=sin)
    checks.same_device("rotary", x=x, cos=cos, sin=sin, positions=positions)
    checks.has_dims("rotary", "x", x, 4, layout="(B, H, S, D)")
    checks.has_dims("rotary", "cos", cos, 2, layout="(P, R / 2)")
    checks.has_shape("rotary", "sin", sin, cos.shape, layout="cos's shape")
    B, _, S, D = x.shape
    if 2 * cos.shape[1] > D:
        raise ValueError(
            f"rotary: cos has more than D / 2 columns: {checks.described(cos=cos, x=x)}"
        )
    if positions is None:
        if cos.shape[0] < S:
            raise ValueError(f"rotary: cos has fewer rows than S: {checks.described(cos=cos, x=x)}")
    else:
        checks.is_integer("rotary", positions=positions)
        checks.has_shape("rotary", "positions", positions, (S,), (B, S), layout="(S,) or (B, S)")
        positions = positions.long()[None] if positions.dim() == 1 else positions.long()
    features = ["positions"] if positions is not None else []
    learned = torch.is_grad_enabled() and (wants_gradient(cos) or wants_gradient(sin))
    operator = TABLES_OPERATOR if learned else OPERATOR
    arguments = (x, cos, sin, positions, interleaved, False)
    call = dispatch.request(operator.name, x, features, arguments, "rotary")
    return dispatch.run(call, backend)


def wants_gradient(x: Tensor) -> bool:
    """requires_grad, of what a transformation of torch.func wraps too: vmap's wrapper says no."""
    while not x.requires_grad:
        if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True
