"""flash_attn.modules.mlp: two linear layers with an activation, or a gate, between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ....ops.activation import geglu, gelu, swiglu
from .._parallel import alone
from ..ops.fused_dense import (  # noqa: F401  (flash-attn exports them here too)
    ColumnParallelLinear,
    FusedMLP,
    ParallelFusedMLP,
    RowParallelLinear,
)

Activation = Callable[[Tensor], Tensor]


class Mlp(nn.Module):
    """fc2(activation(fc1(x))); hidden_features None is 4 in_features. F.gelu is computed by fastattn's."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.gelu,
        bias1: bool = True,
        bias2: bool = True,
        return_residual: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        hidden = 4 * in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.return_residual, self.activation = return_residual, activation
        self.fc1 = nn.Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        """x (..., in_features): (..., out_features), or that and x with return_residual."""
        activation = gelu if self.activation is F.gelu else self.activation
        y = self.fc2(activation(self.fc1(x)))
        return (y, x) if self.return_residual else y


class GatedMlp(nn.Module):
    """fc2(y * activation(gate)) for y, gate = fc1(x), in this order; F.silu is SwiGLU, F.sigmoid GLU.

    hidden_features None is 8/3 in_features; it is rounded up to a multiple of multiple_of.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        return_residual: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        out = in_features if out_features is None else out_features
        self.return_residual, self.activation = return_residual, activation
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        """x (..., in_features): (..., out_features), or that and x with return_residual."""
        y, gate = self.fc1(x).chunk(2, -1)
        y = self.fc2(gated(self.activation, gate, y))
        return (y, x) if self.return_residual else y


def gated(activation: Activation, gate: Tensor, y: Tensor) -> Tensor:
    fused = {F.silu: swiglu, F.gelu: geglu}.get(activation)
    return y * activation(gate) if fused is None else fused(gate, y)


class ParallelMLP(Mlp):
    """Mlp of a process group of one process."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.gelu,
        process_group: Any = None,
        sequence_parallel: bool = True,
        bias1: bool = True,
        bias2: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_features,
            hidden_features,
            out_features,
            activation,
            bias1,
            bias2,
            device=device,
            dtype=dtype,
        )
        shard(self, process_group, sequence_parallel)


class ParallelGatedMlp(GatedMlp):
    """GatedMlp of a process group of one process."""

    def __init__(
        self,
        in_features: int,
        process_group: Any,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Activation = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_features, hidden_features, out_features, activation, bias1, bias2, multiple_of,
            device=device, dtype=dtype,
        )  # fmt: skip
        shard(self, process_group, sequence_parallel)


def shard(module: Any, process_group: Any, sequence_parallel: bool) -> None:
    alone(type(module).__name__, process_group)
    module.process_group, module.sequence_parallel = process_group, sequence_parallel
