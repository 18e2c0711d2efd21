"""gelu with an optional bias, and the gated activations swiglu and geglu."""

from __future__ import annotations

from torch import Tensor

from ..kernels import reference
from . import checks, dispatch
from .operator import Operator

GELU = Operator(
    "gelu",
    "(Tensor x, Tensor? bias, bool tanh) -> Tensor y",
    "(Tensor dy, Tensor x, Tensor? bias, bool tanh, int needs) -> (Tensor dx, Tensor dbias)",
    differentiable=["x", "bias"],
    define=reference.gelu,
    fake=lambda x, bias, tanh: x.new_empty(x.shape),
)
GLU = Operator(
    "glu",
    "(Tensor gate, Tensor up, bool gelu, bool tanh) -> Tensor y",
    "(Tensor dy, Tensor gate, Tensor up, bool gelu, bool tanh) -> (Tensor dgate, Tensor dup)",
    differentiable=["gate", "up"],
    define=reference.glu,
    fake=lambda gate, up, gelu, tanh: gate.new_empty(gate.shape),
)
FORMS = ("none", "tanh")
dispatch.register_definition(GELU, {"bias"})
dispatch.register_definition(GLU)


def gelu(
    x: Tensor, *, bias: Tensor | None = None, approximate: str = "none", backend: str | None = None
) -> Tensor:
    """gelu(x + bias) of x's shape and dtype; x: (..., C), bias: (C,).

    approximate: "none" is x * Phi(x); "tanh" is its tanh form, as in torch.nn.functional.gelu.
    """
    checks.is_tensor("gelu", x=x)
    if bias is not None:
        checks.is_tensor("gelu", bias=bias)
    checks.is_float("gelu", x=x, bias=bias)
    checks.same_device("gelu", x=x, bias=bias)
    checks.one_of("gelu", "approximate", approximate, FORMS)
    if bias is not None:
        checks.has_shape("gelu", "bias", bias, x.shape[-1:], layout="(C,)")
    if x.dim() == 0:
        flat = None if bias is None else bias.reshape(1)
        return gelu(x.reshape(1), bias=flat, approximate=approximate, backend=backend).reshape(())
    features = [] if bias is None else ["bias"]
    call = dispatch.request("gelu", x, features, (x, bias, approximate == "tanh"))
    return dispatch.run(call, backend)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up, both of one shape and dtype (Shazeer 2020, arXiv:2002.05202)."""
    return gated("swiglu", gate, up, gelu=False, tanh=False, backend=backend)


def geglu(
    gate: Tensor, up: Tensor, *, approximate: str = "none", backend: str | None = None
) -> Tensor:
    """gelu(gate) * up, both of one shape and dtype (Shazeer 2020); approximate as in gelu."""
    checks.one_of("geglu", "approximate", approximate, FORMS)
    return gated("geglu", gate, up, gelu=True, tanh=approximate == "tanh", backend=backend)


def gated(
    name: str, gate: Tensor, up: Tensor, *, gelu: bool, tanh: bool, backend: str | None
) -> Tensor:
    checks.is_tensor(name, gate=gate, up=up)
    checks.is_float(name, gate=gate, up=up)
    checks.same_dtype(name, gate=gate, up=up)
    checks.same_device(name, gate=gate, up=up)
    checks.has_shape(name, "up", up, gate.shape, layout="gate's shape")
    if gate.dim() == 0:
        rows = gate.reshape(1), up.reshape(1)
        return gated(name, *rows, gelu=gelu, tanh=tanh, backend=backend).reshape(())
    call = dispatch.request("glu", gate, [], (gate, up, gelu, tanh), name)
    return dispatch.run(call, backend)
