"""Is a backend right? The error rule, for every output and every gradient of a case.

    max|x - x64| <= 2 max|naive - x64| + atol max(1, max|x64|)

x64: the definition in fp64, on the same rounded inputs. naive: the definition with all arithmetic in the
dtype itself, as one would write it in PyTorch. NaN and infinities must stand where the truth has them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..kernels import reference
from ..kernels.reference.linear_cross_entropy import linear_cross_entropy
from .cases import Case

ATOL = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = tuple(ATOL)
DEFINITIONS: dict[str, Callable[..., Any]] = {
    "attention": reference.attention,
    "norm": reference.norm,
    "softmax": reference.softmax,
    "cross_entropy": reference.cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "gelu": reference.gelu,
    "glu": reference.glu,
    "linear": reference.linear,
    "rotary": reference.rotary,
    "rotary_tables": reference.rotary,
}


@dataclass(frozen=True)
class Verdict:
    """errors: (tensor's name, error / allowance): at most 1 is right. declined: the backend's sentence.
    raised: what it raised instead of a result."""

    case: Case
    dtype: torch.dtype
    backend: str
    device: str = "cpu"
    errors: tuple[tuple[str, float], ...] = ()
    declined: str | None = None
    raised: str | None = None

    @property
    def passed(self) -> bool:
        served = self.declined is None and self.raised is None
        return served and all(ratio <= 1 for _, ratio in self.errors)

    @property
    def failed(self) -> bool:
        return self.declined is None and not self.passed

    def worst(self, gradients: bool) -> float:
        """The largest error over allowance, of the outputs or of the gradients."""
        return max((r for n, r in self.errors if n.startswith("d ") == gradients), default=0.0)

    def explain(self) -> str:
        wrong = ", ".join(f"{n}: {r:.3g} times the allowance" for n, r in self.errors if not r <= 1)
        dtype = str(self.dtype).removeprefix("torch.")
        where = "" if self.device == "cpu" else f", tensors on {self.device}"
        return f"{self.case.id} in {dtype} on {self.backend}{where}: {self.raised or wrong}"


def judge(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> Verdict:
    """Runs a case on a backend, its tensors on a device, and holds it to the rule."""
    try:
        found = run(case, dtype, backend, device)
    except ValueError as error:
        if "cannot take this call" not in str(error):
            raise
        return Verdict(case, dtype, backend, device, declined=str(error))
    truth, naive = baselines(case, dtype, device)
    errors = tuple((name, ratio(found[name], truth[name], naive[name], dtype)) for name in truth)
    return Verdict(case, dtype, backend, device, errors)


@functools.lru_cache(maxsize=4)
def baselines(
    case: Case, dtype: torch.dtype, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The fp64 truth, and the naive result in dtype. On the device itself, whose generator it is that
    dropout's seed is drawn from."""
    truth = run(case, dtype, "reference", device, exact=True)
    with arithmetic_in(dtype):
        return truth, run(case, dtype, "reference", device)


def run(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    exact: bool = False,
    gradients: bool = True,
) -> dict[str, Tensor]:
    """Outputs, and the gradients ("d name") of a fixed random function of them, on the CPU; exact: in
    fp64, from inputs rounded to dtype."""
    inputs = {}
    for name, x in case.inputs().items():
        x = x.to(device)
        if x.is_floating_point():
            x = x.to(torch.float32 if name in case.keep else dtype)
            x = (x.double() if exact else x).requires_grad_()
        inputs[name] = x
    with torch.set_grad_enabled(gradients):
        outputs = case.call(inputs, backend, torch.Generator(device).manual_seed(7))
    result = {f"output {i}": out.detach().cpu() for i, out in enumerate(outputs)}
    if not gradients:
        return result
    generator = torch.Generator().manual_seed(8)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for out in outputs:
        # by the truth's shape and seed: the same function for every backend
        weight = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(device)
        finite = torch.where(out.detach().isinf(), 0.0, out.double())
        loss = loss + (finite * weight).sum()
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, x), grad in zip(leaves.items(), grads, strict=True):
        result[f"d {name}"] = (torch.zeros_like(x) if grad is None else grad).detach().cpu()
    return result


def ratio(x: Tensor, truth: Tensor, naive: Tensor, dtype: torch.dtype) -> float:
    """Error over allowance; infinite where shapes or the places of NaN and infinities differ."""
    x, naive = x.double(), naive.double()
    if x.shape != truth.shape:
        return float("inf")
    finite = truth.isfinite()
    same = torch.allclose(x[~finite], truth[~finite], rtol=0, atol=0, equal_nan=True)
    if not same or not x[finite].isfinite().all():
        return float("inf")
    if not finite.any():
        return 0.0
    error = (x - truth)[finite].abs().max().item()
    naive_error = (naive - truth)[finite].abs()
    naive_error = naive_error[naive_error.isfinite()]
    baseline = naive_error.max().item() if naive_error.numel() else 0.0
    largest = truth[finite].abs().max().item()
    return error / (2 * baseline + ATOL[dtype] * max(1.0, largest))


@contextlib.contextmanager
def arithmetic_in(dtype: torch.dtype) -> Iterator[None]:
    """Inside the block the reference computes all through in dtype."""
    kernels = {name: registry.kernel(name, "reference") for name in DEFINITIONS}
    for name, define in DEFINITIONS.items():
        naive = kernels[name]._replace(forward=functools.partial(define, accumulate=dtype))
        registry.register(name, "reference", naive)
    try:
        yield
    finally:
        for name, kernel in kernels.items():
            registry.register(name, "reference", kernel)
