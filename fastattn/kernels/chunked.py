"""linear_cross_entropy in chunks of rows, so that the logits never exist whole.

A chunk's logits are one product, its loss and gradient are the cross_entropy kernel's, the gradient
written over the logits. Products are torch's, save on a CPU in fp32, where a BLAS sums in an order that
depends on threads and on the other rows. When the sum of the losses is what is
wanted (`ahead`), the gradients are taken at once: three products in all, as without chunks, where
taking them later would need the logits a second time. `ops`: the namespace of a backend's kernels,
torch.ops.fastattn_cpu for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Logits a chunk: 52 MB in fp32. Half as many cost 6 % at 1024 x 768 -> 50257, in passes over dweight.
CHUNK = 12_900_000


# Rows a chunk in fp16, whose products end at 65504: gradients of at most 1 by hidden of at most 255.
HALF_ROWS = 256


def chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    R, V = hidden.shape[0], weight.shape[0]
    rows = max(CHUNK // max(V, 1), 16)
    if hidden.dtype == torch.float16:
        rows = min(rows, HALF_ROWS)
    rows = -(-R // max(-(-R // rows), 1))  # equal ones: a few rows more pass over weight as often
    return (slice(start, min(start + rows, R)) for start in range(0, R, max(rows, 1)))


class Gradients:
    """Sums of a chunk's gradients, in fp32 for 16-bit inputs; `needs`: hidden, weight, bias."""

    def __init__(
        self, ops: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: int
    ) -> None:
        acc = torch.promote_types(weight.dtype, torch.float32)
        self.ops, self.inputs = ops, (hidden, weight, bias)
        # an operator's results share no memory, so that each nothing is one of its own
        self.hidden, self.weight, self.bias = (hidden.new_empty(0) for _ in range(3))
        if needs & 1:
            self.hidden = torch.empty_like(hidden)
        if needs & 2:
            self.weight = weight.new_zeros(weight.shape, dtype=acc)
        if needs & 4 and bias is not None:
            self.bias = bias.new_zeros(bias.shape, dtype=acc)

    def add(self, rows: slice, dlogits: Tensor) -> None:
        hidden, weight, _ = self.inputs
        if self.hidden.numel():
            self.hidden[rows] = product(self.ops, dlogits, weight)
        if self.weight.numel():
            add_product(self.ops, self.weight, dlogits.t(), hidden[rows])
        if self.bias.numel():
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        _, weight, bias = self.inputs
        dbias = self.bias if bias is None else self.bias.to(bias.dtype)
        return self.hidden, self.weight.to(weight.dtype), dbias

    def unscaled(self) -> tuple[Tensor, Tensor, Tensor]:
        """For the sum of the losses: sums over rows stay fp32, which fp16 may not hold before a mean."""
        return self.hidden, self.weight, self.bias


def forward(
    ops: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *scalars: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *spec, ahead = scalars
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    gradients = Gradients(ops, hidden, weight, bias, ahead)
    for rows in chunks(hidden, weight):
        logits = product(ops, hidden[rows], weight.t(), bias)
        loss[rows], lse = ops.cross_entropy_fwd(logits, target[rows], *spec)
        if ahead:
            ones = torch.ones((), device=loss.device).expand(len(logits))
            ops.cross_entropy_bwd_(ones, logits, target[rows], lse, *spec)
            gradients.add(rows, logits)
    return loss, *gradients.unscaled()


def backward(
    ops: Any,
    dloss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ahead_hidden: Tensor,
    ahead_weight: Tensor,
    ahead_bias: Tensor,
    *scalars: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *spec, ahead, needs = scalars
    if ahead:  # of the sum of the losses: every row has the same dloss, and no rows have 0
        # where all targets are ignored, dloss is that of a mean over none: infinite
        none = (target == spec[0]).all()
        scale = dloss[:1].sum().masked_fill(none, 0.0)
        ready = (ahead_hidden, ahead_weight, ahead_bias)
        inputs = (hidden, weight, hidden if bias is None else bias)
        return tuple((g * scale).to(x.dtype) for g, x in zip(ready, inputs, strict=True))  # type: ignore[return-value]
    gradients = Gradients(ops, hidden, weight, bias, needs)
    for rows in chunks(hidden, weight):
        logits = product(ops, hidden[rows], weight.t(), bias)
        _, lse = ops.cross_entropy_fwd(logits, target[rows], *spec)
        ops.cross_entropy_bwd_(dloss[rows], logits, target[rows], lse, *spec)
        gradients.add(rows, logits)
    return gradients.results()


def product(ops: Any, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    if is_ours(ops, a):
        return ops.matmul(a, b, bias)
    return a @ b if bias is None else torch.addmm(bias.to(a.dtype), a, b)


def add_product(ops: Any, out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b; out is a sum in fp32."""
    if is_ours(ops, a):
        ops.matmul_add_(out, a, b)
    elif out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out += a @ b


def is_ours(ops: Any, a: Tensor) -> bool:
    """Only the CPU's kernels have a product, of fp32."""
    return a.dtype == torch.float32 and hasattr(ops, "matmul")
