"""QuantizedLinear, a linear layer with its weight in int8 or bfloat16, and quantize(), which swaps them in.

Where few rows are multiplied, as a model writes one token after another, a linear layer takes the time
of reading its weight: half or a quarter of the bytes, half or a quarter of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..kernels.reference.linear import dequantized
from ..ops import checks
from ..ops.linear import GROUP, linear

DTYPES = {"int8": torch.int8, "bfloat16": torch.bfloat16}


class QuantizedLinear(nn.Module):
    """torch.nn.Linear with a constant weight (out_features, in_features).

    dtype "int8": integers of [-127, 127] times a scale for each output, or for each group_size inputs
    of an output, a multiple of 32. "bfloat16": rounded, no scale. x is not rounded, sums are fp32, and
    y has x's dtype. x and bias may have gradients, weight and scale have none. The state_dict holds weight,
    scale and bias; moving the module to another dtype leaves weight and scale as they are.
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: str | torch.dtype = "int8",
        group_size: int | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        kind = stored(type(self).__name__, dtype, group_size)
        shape = (out_features, in_features)
        self.register_buffer("weight", torch.zeros(shape, dtype=kind, device=device))
        groups = (-(-in_features // group_size),) if group_size else ()
        scale = torch.ones(out_features, *groups, device=device) if kind == torch.int8 else None
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    @classmethod
    def from_linear(
        cls,
        module: nn.Module,
        dtype: str | torch.dtype = "int8",
        *,
        group_size: int | None = None,
    ) -> QuantizedLinear:
        """Of a torch.nn.Linear, or a Conv1D as transformers' GPT-2 has, whose weight is (in, out). The
        bias is the same parameter."""
        reason = reason_against(module)
        if reason is not None:
            raise TypeError(f"QuantizedLinear: a {type(module).__name__} {reason}")
        weight = weight_of(module).detach()
        N, K = weight.shape
        result = cls(K, N, bias=False, dtype=dtype, group_size=group_size, device=weight.device)
        result.weight, result.scale = rounded(weight, result.weight.dtype, group_size)
        result.bias = module.bias  # type: ignore[assignment]
        return result.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) -> (..., out_features)"""
        return linear(x, self.weight, self.scale, bias=self.bias, group_size=self.group_size)

    def product(self, x: Tensor) -> Tensor:
        """forward without the bias, for whoever adds it later."""
        return linear(x, self.weight, self.scale, group_size=self.group_size)

    def dequantize(self) -> Tensor:
        """The weight as it multiplies: (out_features, in_features) float32."""
        return dequantized(self.weight, self.scale, self.group_size or 0, torch.float32)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        text += f", bias={self.bias is not None}, dtype={checks.dtype_name(self.weight.dtype)}"
        return text if self.group_size is None else f"{text}, group_size={self.group_size}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLinear:
        before = {name: x for name, x in self._buffers.items() if x is not None}
        super()._apply(fn, recurse)
        for name, x in before.items():  # to its device, never to its dtype
            now = self._buffers[name]
            assert now is not None
            if now.dtype != x.dtype:
                self._buffers[name] = x.to(now.device)
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        given = state_dict.get(f"{prefix}weight")
        if (
            given is not None and given.dtype != self.weight.dtype
        ):  # copying would cut off fractions
            names = [checks.dtype_name(x.dtype) for x in (self.weight, given)]
            errors.append(
                f"{prefix}weight must be {names[0]}, got {names[1]}: load it before quantize()"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )


def stored(owner: str, dtype: str | torch.dtype, group_size: int | None) -> torch.dtype:
    """The dtype that a weight is kept in."""
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if kind is None or kind not in DTYPES.values():
        raise ValueError(f"{owner}: dtype must be int8 or bfloat16, got {dtype!r}")
    if group_size is not None:
        checks.is_int(owner, "group_size", group_size, GROUP)
        if group_size % GROUP:
            raise ValueError(f"{owner}: group_size must be a multiple of {GROUP}, got {group_size}")
        if kind != torch.int8:
            raise ValueError(
                f"{owner}: group_size is of scales, which only int8 has, got {dtype!r}"
            )
    return kind


def rounded(
    weight: Tensor, dtype: torch.dtype, group_size: int | None
) -> tuple[Tensor, Tensor | None]:
    """weight (N, K) as it is kept, and scales such that the largest of each group is 127."""
    if dtype != torch.int8:
        return weight.to(dtype).contiguous(), None
    N, K = weight.shape
    size = group_size or max(K, 1)
    groups = -(-K // size) if group_size else 1
    padded = nn.functional.pad(weight.float(), (0, groups * size - K)).view(N, groups, size)
    scale = padded.abs().amax(-1, keepdim=True) / 127
    whole = (padded / scale.masked_fill(scale == 0, 1)).round().clamp(-127, 127)
    kept = whole.view(N, -1)[:, :K].to(torch.int8).contiguous()
    return kept, scale.view(N, groups) if group_size else scale.view(N)


# ---- a whole model ------------------------------------------------------------------------------


@dataclass
class QuantizationReport:
    """What quantize() did. swapped: names of layers; kept: names of those it left, and why; bytes of the
    swapped weights, before and after."""

    dtype: str
    swapped: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        lines = [
            f"{len(self.swapped)} linear layers in {self.dtype}: "
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB"
        ]
        return "\n".join(lines + [f"kept {name}: it {why}" for name, why in self.kept.items()])


def quantize(
    model: nn.Module,
    dtype: str | torch.dtype = "int8",
    *,
    group_size: int | None = None,
    skip: Iterable[str] = (),
) -> QuantizationReport:
    """Swaps the linear layers of a model for QuantizedLinear, in place.

    torch.nn.Linear, and Conv1D as GPT-2 has it; what is a subclass, parametrized, hooked or part of an
    adapter stays. dtype, group_size: as QuantizedLinear's. skip: names of modules, whole ("lm_head",
    "encoder.layer.0") or parts ("attn.c_proj"). A head that shares an embedding's weight gets a copy,
    and the embedding keeps its own. To undo it, load the model anew.
    """
    kind = stored("quantize", dtype, group_size)
    skip = (skip,) if isinstance(skip, str) else tuple(skip)
    check_skipped(model, skip)
    report = QuantizationReport(checks.dtype_name(kind))
    swaps: dict[nn.Module, QuantizedLinear] = {}
    for parent, name, path in linears(model):
        module = getattr(parent, name)
        reason = (
            "is named in skip" if named_in(skip, path)
            else reason_against(module) or reason_in(parent)
        )  # fmt: skip
        if reason is not None:
            report.kept[path] = reason
            continue
        if module not in swaps:
            swaps[module] = new = QuantizedLinear.from_linear(module, kind, group_size=group_size)
            report.bytes_before += weight_of(module).nbytes
            report.bytes_after += sum(x.nbytes for x in new.buffers())
        setattr(parent, name, swaps[module])
        report.swapped.append(path)
    return report


def linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, its name for the layer, the layer's whole name) of everything like a linear layer."""
    if is_like_linear(model):
        raise ValueError(
            f"quantize: the model is itself a {type(model).__name__}; use QuantizedLinear.from_linear"
        )
    found = []
    for path, parent in model.named_modules(remove_duplicate=True):
        for name, module in parent.named_children():
            if is_like_linear(module):
                found.append((parent, name, f"{path}.{name}" if path else name))
    return iter(found)


def is_like_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's, transformers' or ours: known by name, for transformers need not be installed."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


def weight_of(module: nn.Module) -> Tensor:
    """(out, in)"""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.t() if is_conv1d(module) else weight


def reason_against(module: nn.Module) -> str | None:
    """Why a layer cannot be swapped, or None."""
    if not is_like_linear(module):
        return "is no linear layer"
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "computes its weight from others"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return "is a class of its own, which may do more than a Linear"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "has hooks, which a swap would lose"
    if "forward" in vars(module):
        return "has a forward of its own"
    weight = weight_of(module)
    if weight.is_meta or not weight.is_floating_point():
        return f"has no numbers to round: its weight is {weight.dtype} on {weight.device}"
    if not math.isfinite(weight.detach().abs().amax().item() if weight.numel() else 0.0):
        return "has a weight that is not finite"
    return None


def reason_in(parent: nn.Module) -> str | None:
    """Why a layer must stay for its parent's sake, or None."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "belongs to a TransformerEncoderLayer, which reads the weight itself"
    if hasattr(parent, "base_layer"):
        return "belongs to an adapter, which may merge itself into the weight"
    return None


def named_in(skip: tuple[str, ...], path: str) -> bool:
    return any(f".{name}." in f".{path}." for name in skip)


def check_skipped(model: nn.Module, skip: tuple[str, ...]) -> None:
    paths = [path for path, _ in model.named_modules()]
    for name in skip:
        if not any(named_in((name,), path) for path in paths):
            raise ValueError(
                f"quantize: skip names {name!r}, and no module of the model is called so"
            )
