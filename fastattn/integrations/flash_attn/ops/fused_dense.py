"""flash_attn.ops.fused_dense: linear layers and the MLP, on torch's products and fastattn's gelu.

Matrix products are torch's: what is fused here is the bias of the first with its gelu. Tensor parallelism is
declined: a process group of more than one process raises.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ....ops import checks
from .._attend import raises_runtime_errors
from .._parallel import alone
from .activations import bias_gelu, gelu_fwd, sqrelu_fwd

ACTIVATIONS = ("gelu_approx", "relu", "sqrelu")


@raises_runtime_errors
def fused_dense_func(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    return_residual: bool = False,
    process_group: Any = None,
    sequence_parallel: bool = True,
) -> Any:
    """x (..., I), weight (O, I), bias (O,): out (..., O), or (out, x). process_group: of one process."""
    alone("fused_dense_func", process_group)
    checks.is_flag("fused_dense_func", sequence_parallel=sequence_parallel)
    out = F.linear(x, weight, bias)
    return (out, x) if return_residual else out


class FusedDense(nn.Linear):
    """nn.Linear that returns (out, x) with return_residual."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x: Tensor, process_group: Any = None) -> Any:
        return fused_dense_func(
            x, self.weight, self.bias, self.return_residual, process_group=process_group
        )


class ColumnParallelLinear(nn.Linear):
    """nn.Linear, whose rows a process group of one process has all."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        process_group: Any,
        bias: bool = True,
        sequence_parallel: bool = True,
        multiple_of: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        alone(type(self).__name__, process_group)
        feature = out_features if type(self) is ColumnParallelLinear else in_features
        if feature % multiple_of:
            raise ValueError(
                f"{type(self).__name__}: {feature} features are no multiple of {multiple_of}"
            )
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.process_group, self.sequence_parallel = process_group, sequence_parallel


class RowParallelLinear(ColumnParallelLinear):
    """nn.Linear, whose columns a process group of one process has all."""


@raises_runtime_errors
def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: int | str = 0,
    process_group: Any = None,
    sequence_parallel: bool = True,
) -> Any:
    """activation(x weight1^T + bias1) weight2^T + bias2; x (..., I), weights (F, I) and (O, F): (..., O).

    activation: gelu_approx (tanh form), relu or sqrelu. checkpoint_lvl 1 keeps what enters the activation
    for the backward, 2 (also without save_pre_act) only x; 0 keeps what comes out, too. heuristic: any, as
    torch chooses its products. return_residual: (out, x). process_group, sequence_parallel: of one process.
    """
    name = "fused_mlp_func"
    alone(name, process_group)
    checks.one_of(name, "activation", activation, ACTIVATIONS)
    checks.is_flag(name, save_pre_act=save_pre_act, sequence_parallel=sequence_parallel)
    if checkpoint_lvl not in (0, 1, 2):
        raise ValueError(f"{name}: checkpoint_lvl must be 0, 1 or 2, got {checkpoint_lvl}")

    def second(pre_act: Tensor) -> Tensor:
        return F.linear(activated(activation, pre_act, bias1), weight2, bias2)

    def whole(x: Tensor) -> Tensor:
        return second(F.linear(x, weight1))

    level = checkpoint_lvl if save_pre_act else 2
    if level == 0 or not torch.is_grad_enabled():
        out = whole(x)
    elif level == 1:
        out = checkpoint(second, F.linear(x, weight1), use_reentrant=False)
    else:
        out = checkpoint(whole, x, use_reentrant=False)
    return (out, x) if return_residual else out


def activated(activation: str, x: Tensor, bias: Tensor | None) -> Tensor:
    """activation(x + bias), the sum fused into gelu."""
    if activation == "gelu_approx":
        return gelu_fwd(x) if bias is None else bias_gelu(x, bias)
    x = x if bias is None else x + bias.to(x.dtype)
    return F.relu(x) if activation == "relu" else sqrelu_fwd(x)


class FusedMLP(nn.Module):
    """fused_mlp_func as a module: fc1, fc2 are nn.Linear. hidden_features: None is 4 in_features."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        checks.one_of(type(self).__name__, "activation", activation, ACTIVATIONS)
        hidden = 4 * in_features if hidden_features is None else hidden_features
        out = in_features if out_features is None else out_features
        self.activation, self.return_residual = activation, return_residual
        self.checkpoint_lvl, self.heuristic = checkpoint_lvl, heuristic
        self.fc1 = nn.Linear(in_features, hidden, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, out, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor, process_group: Any = None) -> Any:
        """(..., out_features), or that and x."""
        return fused_mlp_func(
            x,
            self.fc1.weight,
            self.fc2.weight,
            self.fc1.bias,
            self.fc2.bias,
            activation=self.activation,
            return_residual=self.return_residual,
            checkpoint_lvl=self.checkpoint_lvl,
            heuristic=self.heuristic,
            process_group=process_group,
        )


class ParallelFusedMLP(FusedMLP):
    """FusedMLP of a process group of one process."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: str = "gelu_approx",
        process_group: Any = None,
        bias1: bool = True,
        bias2: bool = True,
        sequence_parallel: bool = True,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        alone(type(self).__name__, process_group)
        super().__init__(
            in_features, hidden_features, out_features, bias1, bias2, activation,
            checkpoint_lvl=checkpoint_lvl, heuristic=heuristic, device=device, dtype=dtype,
        )  # fmt: skip
        self.process_group, self.sequence_parallel = process_group, sequence_parallel
