"""Attention with what torch's own fused kernel lacks: it falls back to whole scores, or to padding.

Operations are those of the scores that count, so that skipping the others shows as speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn as fa

from ..workload import NAIVE, OURS, Call, Contestant, Cost, Inputs, Setting, Workload, direct
from .attention import with_room

NAMES = ("query", "key", "value")
WINDOW, LONG_WINDOW = 256, 4096
LENGTHS = (512, 64, 128, 320, 32, 448, 96, 192)  # of the packed sequences, times S / 512


@dataclass(frozen=True)
class Form:
    """ours(query, key, value, **extra), as naive() and torchs() are called too. extra(B, H, S): more inputs.
    visible(S): how many of S² scores a head are not masked, where that is known. biases: of S² numbers
    each, with a gradient. dropout_p: of the weights, for all but the judges."""

    ours: Callable[..., Tensor] = fa.attention
    extra: Callable[[int, int, int], Inputs] = lambda B, H, S: {}
    visible: Callable[[int], float] = lambda S: float(S * S)
    biases: Callable[[int], int] = lambda H: 0
    dropout_p: float = 0.0


def naive(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None,
    bias: Tensor | None = None, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def torchs(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None,
    bias: Tensor | None = None, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    chosen = mask if bias is None else bias
    return F.scaled_dot_product_attention(query, key, value, chosen, dropout_p)


def windowed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return fa.attention(query, key, value, causal=True, window=(WINDOW, 0))


def band(S: int, window: int) -> Tensor:
    """The window as a mask, for those who have no other word for it."""
    back = torch.arange(S)[:, None] - torch.arange(S)
    return (back >= 0) & (back <= window)


def in_band(S: int, window: int) -> float:
    """How many True it has."""
    return S * (window + 1) - window * (window + 1) / 2


FORMS = {
    "mask": Form(extra=lambda B, H, S: {"mask": torch.rand(B, 1, S, S) > 0.3}),
    "bias": Form(
        extra=lambda B, H, S: {"bias": torch.randn(H, S, S, dtype=torch.float64)},
        biases=lambda H: H,
    ),
    "dropout": Form(dropout_p=0.1),
    "window": Form(
        windowed, lambda B, H, S: {"mask": band(S, WINDOW)}, lambda S: in_band(S, WINDOW)
    ),
    "narrow values": Form(),
}


def workloads(setting: Setting) -> Iterator[Workload]:
    B, H, S = setting.pick((1, 4, 512), (2, 12, 512), (8, 32, 2048))
    for case in ("mask", "bias", "dropout"):
        yield workload(setting, case, B, H, S, 64, 64)
    yield workload(setting, "window", 1, H, setting.pick(1024, 4096, 16384), 64, 64)
    yield workload(setting, "narrow values", B, H, S, 192, 128)
    yield packed(setting, H, S, 64)


def workload(setting: Setting, case: str, B: int, H: int, S: int, D: int, Dv: int) -> Workload:
    form = FORMS[case]

    def make(B: int = B, H: int = H) -> Inputs:
        tensors = {n: torch.randn(B, H, S, D, dtype=torch.float64) for n in NAMES[:2]}
        tensors["value"] = torch.randn(B, H, S, Dv, dtype=torch.float64)
        return tensors | form.extra(B, H, S)

    drop = {"dropout_p": form.dropout_p} if form.dropout_p else {}
    contestants = []
    for name, function in ((OURS, form.ours), (NAIVE, naive), ("sdpa", torchs)):
        bind = direct(function, **drop)
        bind = bind if name == OURS else with_room(setting, bind)
        contestants.append(Contestant(name, bind, judged=direct(function) if drop else None))
    tensor = B * H * S * (D + Dv) * setting.dtype.itemsize
    size = form.biases(H) * S * S * setting.dtype.itemsize
    flops = 2.0 * B * H * form.visible(S) * (D + Dv)
    return Workload(
        "attention_features", case, {"B": B, "H": H, "S": S, "D": D, "Dv": Dv}, setting.dtype,
        setting.device, Cost(flops, 2 * tensor + size, 2.5 * flops, 4 * tensor + 2 * size), "flops",
        make, tuple(contestants), make_judged=lambda: make(1, 2),
    )  # fmt: skip


def long_window(setting: Setting, S: int, D: int) -> Workload:
    """One head of a sequence so long that only a window of it can be looked at: nobody else has a word for
    it. Judged where it is 8192 long."""

    def make(S: int = S) -> Inputs:
        return {n: torch.randn(1, 1, S, D, dtype=torch.float64) for n in NAMES}

    def banded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return naive(query, key, value, mask=band(query.shape[2], LONG_WINDOW))

    tensor = S * D * setting.dtype.itemsize
    flops = 4.0 * D * in_band(S, LONG_WINDOW)
    return Workload(
        "attention_features", f"window {LONG_WINDOW}", {"B": 1, "H": 1, "S": S, "D": D}, setting.dtype,
        setting.device, Cost(flops, 4 * tensor, 2.5 * flops, 8 * tensor), "flops", make,
        (
            Contestant(OURS, direct(fa.attention, causal=True, window=(LONG_WINDOW, 0))),
            Contestant(NAIVE, with_room(setting, direct(banded))),
        ),
        make_judged=lambda: make(8192),
    )  # fmt: skip


# ---- packed sequences -----------------------------------------------------------------------------


def packed(setting: Setting, H: int, S: int, D: int) -> Workload:
    """Everyone is given the packed rows; who needs padding gets it made beforehand, untimed."""
    lengths = [max(length * S // 512, 1) for length in LENGTHS]
    ends = [0, *accumulate(lengths)]
    total = ends[-1]

    def make() -> Inputs:
        return {n: torch.randn(total, H, D, dtype=torch.float64) for n in NAMES}

    def ours(x: Inputs) -> Call:
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=x["query"].device)
        return lambda: fa.attention_varlen(
            x["query"], x["key"], x["value"], cu_seqlens, cu_seqlens, S, S
        )

    def one_by_one(x: Inputs) -> Call:
        return lambda: torch.cat([
            naive(*(x[n][first:last].transpose(0, 1) for n in NAMES)).transpose(0, 1)
            for first, last in pairwise(ends)
        ])  # fmt: skip

    work = sum(length**2 for length in lengths)
    tensor, flops = total * H * D * setting.dtype.itemsize, 4.0 * H * work * D
    return Workload(
        "attention_features", "packed", {"H": H, "S": S, "D": D, "rows": total}, setting.dtype,
        setting.device, Cost(flops, 4 * tensor, 2.5 * flops, 8 * tensor), "flops", make,
        (
            Contestant(OURS, ours),
            Contestant(NAIVE, one_by_one),
            Contestant("sdpa padded", partial(padded, lengths=lengths)),
        ),
    )  # fmt: skip


def padded(x: Inputs, lengths: list[int]) -> Call:
    longest = max(lengths)
    # not pad_sequence, whose graph serves only once
    q, k, v = (
        torch.stack([F.pad(rows, (0, 0, 0, 0, 0, longest - len(rows))) for rows in x[n].split(lengths)])
        .transpose(1, 2)
        .contiguous()
        for n in NAMES
    )  # fmt: skip
    past = torch.arange(q.shape[2], device=q.device)
    visible = (past < torch.tensor(lengths, device=q.device)[:, None])[:, None, None]

    def call() -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2)
        return torch.cat([rows[:n] for rows, n in zip(out, lengths, strict=True)])

    return call
