"""What is measured: a call of some size, and everyone who can make it.

A family's file yields workloads. One has its inputs, its cost in floating-point operations and bytes,
and its contestants, of whom the first is this library and `naive` is the definition as one writes it in
PyTorch: run in fp64 it is also the truth that all are judged by.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Call = Callable[[], Tensor]
OURS, NAIVE = "fastattn", "naive"
DIRECTIONS = ("forward", "backward", "both")


class Refusal(Exception):
    """Why a contestant does not take part: it is not installed, or cannot make this call."""


@dataclass(frozen=True)
class Contestant:
    """bind(inputs) gets everything ready, untimed, and returns the call that is timed. It raises Refusal
    where the contestant cannot take part. Calls are made inside context(), which is not timed.
    weighs: not where memory is kept from call to call and so cannot be seen. judged: another bind, for
    a call that draws random numbers, of which everyone draws others: the same call without them."""

    name: str
    bind: Callable[[Inputs], Call] = field(repr=False)
    backward: bool = True
    weighs: bool = True
    context: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext, repr=False)
    judged: Callable[[Inputs], Call] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Cost:
    """Of the forward pass; the backward is so many times that (attention: 5 products for 2, linear: 2
    for 1). bytes: what must be read and written at least once."""

    flops: float
    bytes: float
    backward_flops: float
    backward_bytes: float

    def of(self, direction: str) -> tuple[float, float]:
        forward, backward = direction != "backward", direction != "forward"
        return (
            self.flops * forward + self.backward_flops * backward,
            self.bytes * forward + self.backward_bytes * backward,
        )


@dataclass(frozen=True)
class Workload:
    """sizes are what a row of results is known by; `S` and `B` among them give the growth over S.
    make() gives inputs in fp64, make_judged() fewer of them (fewer heads, say) where the truth of all
    would not fit into memory. keep: inputs that stay in fp32. bound: what the work is
    measured in: flops, bytes, or read, bytes of which hardly any are written."""

    family: str
    case: str
    sizes: dict[str, int]
    dtype: torch.dtype
    device: str
    cost: Cost
    bound: str
    make: Callable[[], Inputs] = field(repr=False)
    contestants: tuple[Contestant, ...] = field(repr=False)
    make_judged: Callable[[], Inputs] | None = field(default=None, repr=False)
    judged_naive: Callable[[Inputs], Tensor] | None = field(default=None, repr=False)
    keep: frozenset[str] = frozenset()
    directions: tuple[str, ...] = DIRECTIONS

    @property
    def name(self) -> str:
        return f"{self.family} {self.case} {sizes_text(self.sizes)}"

    def inputs(self, judged: bool = False) -> Inputs:
        """The same numbers every time, whatever else has been drawn. A GPU draws its own: the billion
        logits of a large vocabulary would take a CPU half a minute."""
        make = self.make_judged if judged and self.make_judged else self.make
        with torch.random.fork_rng(devices=[]), torch.device(self.device):
            torch.manual_seed(0)
            return make()


@dataclass(frozen=True)
class Setting:
    """What a family is asked for. tokens and width are the field's conventions on a GPU, 16k tokens a
    batch and a width of 2048, and a quarter of each on a CPU, so that a run ends."""

    dtype: torch.dtype
    device: str = "cpu"
    quick: bool = False
    compile: bool = False

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type != "cpu"

    def pick(self, quick: Any, cpu: Any, gpu: Any) -> Any:
        """The sizes of a quick run, of a full one on a CPU, and of a full one on a GPU."""
        return quick if self.quick else gpu if self.on_gpu else cpu


def sizes_text(sizes: dict[str, int]) -> str:
    return " ".join(f"{letter}{size}" for letter, size in sizes.items())


def direct(function: Callable[..., Tensor], **options: Any) -> Callable[[Inputs], Call]:
    """Binds a function that takes the inputs by name."""
    return lambda x: lambda: function(**x, **options)
