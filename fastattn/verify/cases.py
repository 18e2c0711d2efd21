"""The one table of cases: it drives `fastattn verify`, the tests and the benchmarks, on every backend.

A case makes its inputs in fp64 from a seed and calls one public function. Whoever runs it rounds the
inputs to a dtype first, so that the fp64 truth and the kernel see the same numbers. Shapes are small and
odd on purpose; a new feature is one more row here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fastattn as fa

from ..ops.linear import linear

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call. `feature` is its row in reports; `keep` names float inputs that stay fp32 beside a 16-bit
    dtype; every float input gets a gradient. `call(inputs, backend, generator)` returns tensors."""

    operator: str
    feature: str
    name: str
    make: Callable[[], Inputs] = field(repr=False)
    call: Callable[[Inputs, str | None, torch.Generator], tuple[Tensor, ...]] = field(repr=False)
    keep: frozenset[str] = frozenset()

    @property
    def id(self) -> str:
        return f"{self.operator}-{self.feature}-{self.name}".replace(" ", "_")

    def inputs(self) -> Inputs:
        """The same numbers every time, whatever else has been drawn."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(map(ord, self.id)))
            return self.make()


# ---- attention --------------------------------------------------------------------------------


def attention(
    feature: str,
    name: str = "",
    *,
    B: int = 2,
    Hq: int = 2,
    Hkv: int | None = None,
    Sq: int = 33,
    Sk: int = 67,
    D: int = 16,
    Dv: int | None = None,
    size: float = 1.0,
    layout: str = "bhsd",
    bias: str = "",
    mask: str = "",
    hole: float = 0.0,
    lengths: tuple[int, ...] = (),
    slopes: str = "",
    sinks: bool = False,
    seqlens: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    dark: bool = False,
    wide: bool = False,
    **options: Any,
) -> Case:
    """size: of the logits, in units of the usual; layout: bhsd, bshd, sliced, expanded or overlapping.
    bias, mask: dimensions as in "bhqk", 1 where they broadcast. hole: share of -inf in the bias. wide: a
    bias in float64. dark: a mask with whole rows of False. lengths: key_lengths, with NaN behind them.
    slopes: "h" or "bh". seqlens: packed, the lengths of queries and keys. options: keywords of the
    function."""
    Hkv, Dv = Hkv or Hq, Dv or D
    full = {"b": B, "h": Hq, "q": Sq, "k": Sk}

    def shape(dims: str) -> list[int]:
        return [1 if d == "1" else full[d] for d in dims]

    def make() -> Inputs:
        rand = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
        if seqlens is not None:
            total_q, total_k = sum(seqlens[0]), sum(seqlens[1])
            x = {
                "query": rand(total_q, Hq, D),
                "key": rand(total_k, Hkv, D),
                "value": rand(total_k, Hkv, Dv),
            }
        else:
            x = {
                "query": rand(B, Hq, Sq, D),
                "key": rand(B, Hkv, Sk, D),
                "value": rand(B, Hkv, Sk, Dv),
            }
        x["query"] *= size
        if bias:
            x["bias"] = rand(*shape(bias))
            if hole:
                x["bias"][torch.rand(shape(bias)) < hole] = -torch.inf
        if mask:
            x["mask"] = torch.rand(shape(mask)) > 0.3
            if dark and "q" in mask:
                x["mask"][..., ::3, :] = False
        if lengths:
            x["key_lengths"] = torch.tensor(lengths)
        if slopes:
            x["alibi_slopes"] = torch.rand(shape(slopes), dtype=torch.float64) * 0.2
        if sinks:
            x["sinks"] = rand(Hq)
        return x

    def call(x: Inputs, backend: str | None, generator: torch.Generator) -> tuple[Tensor, ...]:
        query, key, value = (laid_out(x[n], layout) for n in ("query", "key", "value"))
        rest = {n: t for n, t in x.items() if n not in ("query", "key", "value")}
        if wide and "bias" in rest:
            rest["bias"] = rest["bias"].double()
        if lengths:
            key, value = (poisoned(t, x["key_lengths"]) for t in (key, value))
        common = {**options, **rest, "return_lse": True, "generator": generator, "backend": backend}
        if seqlens is not None:
            starts = [torch.tensor((0, *s), device=query.device).cumsum(0) for s in seqlens]
            return fa.attention_varlen(query, key, value, starts[0], starts[1], **common)
        return fa.attention(query, key, value, **common)

    keep = frozenset({"alibi_slopes", "sinks"})
    return Case("attention", feature, name or "plain", make, call, keep)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers elsewhere in memory, or fewer that are read several times."""
    if layout == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if layout == "expanded":
        return x[:, :1].expand_as(x)
    if layout == "overlapping":  # row i + 1 is row i, one number on
        return x.flatten(2)[..., : x.shape[2] + x.shape[3] - 1].unfold(-1, x.shape[3], 1)
    return x


def poisoned(x: Tensor, lengths: Tensor) -> Tensor:
    """NaN in keys past the lengths: nothing may leak."""
    past = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]
    return x.masked_fill(past[:, None, :, None], torch.nan)


def attention_cases() -> Iterator[Case]:
    yield attention("plain")
    for Sq, Sk in ((1, 1), (1, 67), (67, 1), (131, 67), (300, 520), (16, 16), (48, 129)):
        yield attention("plain", f"{Sq}x{Sk}", Sq=Sq, Sk=Sk)
        yield attention("causal", f"{Sq}x{Sk}", Sq=Sq, Sk=Sk, causal=True)
    for D in (1, 3, 8, 59, 64, 111, 128, 320):
        yield attention("head dimension", f"D={D}", D=D)
    yield attention("head dimension", "D=64 Dv=16", D=64, Dv=16)
    yield attention("head dimension", "D=16 Dv=130", D=16, Dv=130)
    for Hq, Hkv in ((4, 2), (6, 1), (8, 2)):
        for Sq in (1, 5, 33):
            yield attention(
                "grouped queries", f"{Hq}:{Hkv} Sq={Sq}", Hq=Hq, Hkv=Hkv, Sq=Sq, causal=True
            )
    for window in ((3, 5), (7, 0), (0, 0), (None, 4), (9, None)):
        yield attention("window", f"{window}", window=window)
        yield attention("window", f"{window} causal", window=window, causal=True, Sq=140, Sk=130)
    for dims in ("k", "qk", "b11k", "b1qk", "1hqk", "bhqk", "bhq1", "1"):
        yield attention("mask", dims, mask=dims)
        yield attention("bias", dims, bias=dims)
    yield attention("mask", "rows of nothing", mask="qk", dark=True)
    yield attention("mask", "several tiles", mask="bhqk", Sq=200, Sk=300, causal=True)
    yield attention("bias", "several tiles", bias="1hqk", Sq=200, Sk=300, causal=True)
    yield attention("bias", "with -inf", bias="bhqk", hole=0.5)
    yield attention("bias", "float64", bias="1hqk", wide=True)
    yield attention("key_lengths", "", lengths=(67, 20))
    yield attention("key_lengths", "with 0", lengths=(0, 5), causal=True)
    yield attention("key_lengths", "several tiles", lengths=(300, 130), Sk=300, window=(50, 20))
    yield attention("alibi", "(Hq,)", slopes="h")
    yield attention("alibi", "(B, Hq)", slopes="bh", Sq=70, causal=True)
    yield attention("softcap", "2", softcap=2.0, size=5.0)
    yield attention("softcap", "30", softcap=30.0, size=10.0, causal=True)
    yield attention("sinks", "", sinks=True)
    yield attention("sinks", "rows of nothing", sinks=True, Sq=80, Sk=40, causal=True)
    for p in (0.1, 0.5, 1.0):
        yield attention("dropout", f"p={p}", dropout_p=p, Sq=70, Sk=130)
    yield attention("large logits", "30", size=30.0)
    yield attention("large logits", "30 causal", size=30.0, causal=True, Sq=67)
    yield attention("scale", "0", scale=0.0)
    yield attention("scale", "-0.5", scale=-0.5)
    for scale in (30.0, 100.0, 1000.0):
        yield attention("large logits", f"scale={scale}", scale=scale, causal=True, Sq=67)
    for layout in ("bshd", "sliced", "expanded", "overlapping"):
        yield attention("layout", layout, layout=layout, causal=True)
    for name, q, k in (
        ("self", (5, 40, 1), (5, 40, 1)),
        ("cross", (5, 40, 1), (40, 3, 130)),
        ("empty ones", (0, 7, 0, 20), (3, 0, 0, 20)),
        ("all empty", (0, 0), (0, 0)),
    ):
        yield attention("packed", name, seqlens=(q, k), causal=True)
        yield attention("packed", f"{name}, all", seqlens=(q, k), Hq=4, Hkv=2, window=(20, 3), softcap=5.0,
                        slopes="h", sinks=True, dropout_p=0.2)  # fmt: skip
    yield attention("few queries", "Sq=1 Sk=1500", Sq=1, Sk=1500)
    yield attention("few queries", "grouped", Sq=3, Sk=1100, Hq=8, Hkv=2, causal=True, sinks=True)
    yield from combined_cases()


def combined_cases() -> Iterator[Case]:
    """Features that meet: each of these pairs occurs, and one call has them all."""
    parts: dict[str, dict[str, Any]] = {
        "causal": {"causal": True},
        "window": {"window": (20, 6)},
        "mask": {"mask": "b1qk"},
        "bias": {"bias": "1hqk"},
        "lengths": {"lengths": (67, 40)},
        "alibi": {"slopes": "h"},
        "softcap": {"softcap": 3.0},
        "sinks": {"sinks": True},
        "dropout": {"dropout_p": 0.3},
        "grouped": {"Hq": 4, "Hkv": 2},
        "bshd": {"layout": "bshd"},
        "Dv": {"Dv": 24},
    }
    names = list(parts)
    for at, first in enumerate(names):
        # four at a time, so that the rows cover every pair within a few dozen calls
        for step in (1, 2, 5):
            chosen = [first, *(names[(at + step * k) % len(names)] for k in (1, 2, 3))]
            options: dict[str, Any] = {}
            for name in chosen:
                options |= parts[name]
            yield attention("combined", " ".join(dict.fromkeys(chosen)), **options)
    everything: dict[str, Any] = {}
    for options in parts.values():
        everything |= options
    yield attention("combined", "everything", **everything)


# ---- rows -------------------------------------------------------------------------------------


def rows_case(
    operator: str,
    feature: str,
    name: str,
    shapes: dict[str, tuple[int, ...]],
    function: Callable[..., Any],
    keep: frozenset[str] = frozenset(),
    size: float = 1.0,
    shift: float = 0.0,
) -> Case:
    """A row operator: `function(inputs, backend, generator)` over normal inputs of these shapes."""

    def make() -> Inputs:
        x = {n: torch.randn(s, dtype=torch.float64) for n, s in shapes.items()}
        first = next(iter(x))
        x[first] = x[first] * size + shift
        return x

    def call(x: Inputs, backend: str | None, generator: torch.Generator) -> tuple[Tensor, ...]:
        out = function(x, backend, generator)
        return out if isinstance(out, tuple) else (out,)

    return Case(operator, feature, name, make, call, keep)


def norm_cases() -> Iterator[Case]:
    for operator in ("layer_norm", "rms_norm"):
        function = getattr(fa, operator)
        affine = ("weight", "bias") if operator == "layer_norm" else ("weight",)

        def run(
            x: Inputs, backend: Any, generator: Any, function: Any = function, **options: Any
        ) -> Any:
            return function(**x, **options, backend=backend, generator=generator)

        def case(
            feature: str, name: str, C: int = 33, names: tuple[str, ...] = (), keep: Any = frozenset(),
            operator: str = operator, run: Any = run, shift: float = 0.0, **options: Any,
        ) -> Case:  # fmt: skip
            shapes: dict[str, tuple[int, ...]] = {"x": (3, 7, C)}
            shapes |= {n: (3, 7, C) if n == "residual" else (C,) for n in names}
            call = lambda x, b, g: run(x, b, g, **options)  # noqa: E731
            return rows_case(operator, feature, name, shapes, call, frozenset(keep), shift=shift)

        for C in (1, 7, 16, 33, 768, 1000):
            yield case("plain", f"C={C}", C)
            yield case("affine", f"C={C}", C, affine)
            yield case("residual", f"C={C}", C, (*affine, "residual"), return_residual=True)
        yield case("affine", "fp32 weights", 96, affine, keep=affine)
        yield case("residual", "not returned", 96, ("residual",))
        yield case(
            "residual", "fp32", 96, (*affine, "residual"), keep=("residual",), return_residual=True
        )
        for p in (0.3, 1.0):
            yield case(
                "dropout", f"p={p}", 70, (*affine, "residual"), return_residual=True, dropout_p=p
            )
        yield case("large mean", "100", 768, affine, shift=100.0)
        if operator == "rms_norm":
            yield case("weight_offset", "1", 70, affine, weight_offset=1.0)


def softmax_cases() -> Iterator[Case]:
    def case(
        feature: str, name: str, shape: tuple[int, ...], mask: Tensor | None = None, **options: Any
    ) -> Case:
        def call(x: Inputs, b: Any, g: Any) -> Any:
            there = None if mask is None else mask.to(x["x"].device)
            return fa.softmax(x["x"], mask=there, backend=b, **options)

        return rows_case("softmax", feature, name, {"x": shape}, call)

    generator = torch.Generator().manual_seed(0)
    for C in (1, 7, 16, 33, 1000):
        yield case("plain", f"C={C}", (5, C))
    yield case("plain", "dim=0", (5, 33), dim=0)
    for shape in ((33,), (20, 33), (1, 2, 20, 33), (3, 1, 1, 33), (20, 1)):
        mask = torch.rand(shape, generator=generator) > 0.4
        yield case("mask", f"{shape}", (3, 2, 20, 33), mask)
    dark = (torch.arange(20) % 3 > 0)[:, None].expand(20, 33)
    yield case("mask", "rows of nothing", (2, 20, 33), dark)
    for Sq, Sk in ((20, 20), (20, 33), (33, 20)):
        yield case("causal", f"{Sq}x{Sk}", (2, Sq, Sk), causal=True, scale=0.3)


def loss_cases() -> Iterator[Case]:
    def case(
        feature: str, name: str, V: int = 50, R: int = 6, size: float = 3.0, shift: float = 0.0,
        **options: Any,
    ) -> Case:  # fmt: skip
        target = torch.randint(0, V, (R,), generator=torch.Generator().manual_seed(V))
        target[R // 2] = options.get("ignore_index", -100)

        def call(x: Inputs, b: Any, g: Any) -> Any:
            logits = x["logits"]
            return fa.cross_entropy(logits, target.to(logits.device), backend=b, **options)

        return rows_case(
            "cross_entropy", feature, name, {"logits": (R, V)}, call, size=size, shift=shift
        )

    for V in (1, 7, 50, 1000, 50257):
        yield case("plain", f"V={V}", V)
    for reduction in ("sum", "none"):
        yield case("reduction", reduction, reduction=reduction)
    yield case("ignore_index", "3", ignore_index=3)
    yield case("label_smoothing", "0.1", label_smoothing=0.1)
    yield case("z_loss", "0.01", z_loss=0.01, label_smoothing=0.2)
    yield case("large logits", "x 100", size=100.0)
    yield case("large logits", "around 10000", shift=1e4, label_smoothing=0.1)

    def linear(feature: str, name: str, bias: bool = False, **options: Any) -> Case:
        target = torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(1))
        target[4] = -100
        shapes: dict[str, tuple[int, ...]] = {"hidden": (9, 16), "weight": (50, 16)}
        shapes |= {"bias": (50,)} if bias else {}

        def call(x: Inputs, b: Any, g: Any) -> Any:
            there = target.to(x["hidden"].device)
            named: dict[str, Any] = {**x, "target": there, "backend": b}
            return fa.linear_cross_entropy(**named, **options)

        return rows_case("linear_cross_entropy", feature, name, shapes, call)

    yield linear("plain", "mean")
    yield linear("bias", "mean", bias=True)
    for reduction in ("sum", "none"):
        yield linear("reduction", reduction, reduction=reduction, label_smoothing=0.1, z_loss=0.01)


def activation_cases() -> Iterator[Case]:
    for C in (1, 7, 33, 1000):
        for form in ("none", "tanh"):
            plain = lambda x, b, g, form=form: fa.gelu(x["x"], approximate=form, backend=b)  # noqa: E731
            biased = lambda x, b, g, form=form: fa.gelu(**x, approximate=form, backend=b)  # noqa: E731
            gated = lambda x, b, g, form=form: fa.geglu(**x, approximate=form, backend=b)  # noqa: E731
            yield rows_case("gelu", form, f"C={C}", {"x": (3, 7, C)}, plain, size=3.0)
            yield rows_case(
                "gelu",
                f"{form} and bias",
                f"C={C}",
                {"x": (3, 7, C), "bias": (C,)},
                biased,
                size=3.0,
            )
            yield rows_case(
                "geglu", form, f"C={C}", {"gate": (3, 7, C), "up": (3, 7, C)}, gated, size=3.0
            )
        swiglu = lambda x, b, g: fa.swiglu(**x, backend=b)  # noqa: E731
        yield rows_case(
            "swiglu", "plain", f"C={C}", {"gate": (3, 7, C), "up": (3, 7, C)}, swiglu, size=3.0
        )
    halves = lambda x, b, g: fa.swiglu(*x["x"].chunk(2, -1), backend=b)  # noqa: E731
    yield rows_case("swiglu", "halves of one tensor", "C=33", {"x": (3, 7, 66)}, halves)


def rotary_cases() -> Iterator[Case]:
    angles = torch.outer(torch.arange(40.0), 10.0 ** -torch.arange(6.0))
    cos, sin = angles.cos(), angles.sin()
    positions = torch.tensor([[3, 30, 31, 32, 0], [1, 2, 3, 4, 39]])
    for interleaved in (False, True):
        kind = "interleaved" if interleaved else "halves"
        for name, D, at in (
            ("D=12", 12, None),
            ("part of D=17", 17, None),
            ("positions", 12, positions),
        ):

            def call(
                x: Inputs, b: Any, g: Any, interleaved: bool = interleaved, at: Any = at
            ) -> Any:
                device = x["x"].device
                there = None if at is None else at.to(device)
                return fa.rotary(x["x"], cos.to(device), sin.to(device), interleaved=interleaved,
                                 positions=there, backend=b)  # fmt: skip

            yield rows_case("rotary", kind, name, {"x": (2, 3, 5, D)}, call)

            def learned(
                x: Inputs, b: Any, g: Any, interleaved: bool = interleaved, at: Any = at
            ) -> Any:
                there = None if at is None else at.to(x["x"].device)
                return fa.rotary(**x, interleaved=interleaved, positions=there, backend=b)

            shapes = {"x": (2, 3, 5, D), "cos": (40, 6), "sin": (40, 6)}
            yield rows_case("rotary", f"{kind}, learned", name, shapes, learned)


def linear_cases() -> Iterator[Case]:
    def case(
        feature: str, name: str, R: int = 5, K: int = 100, N: int = 37, bias: bool = True,
        group: int | None = None,
    ) -> Case:  # fmt: skip
        def make() -> Inputs:
            x = {"x": torch.randn(R, K, dtype=torch.float64)}
            if feature == "bfloat16":
                x["weight"] = torch.randn(N, K, dtype=torch.float64)
            else:
                x["weight"] = torch.randint(-127, 128, (N, K), dtype=torch.int8)
                groups = () if group is None else (-(-K // group),)
                x["scale"] = torch.rand(N, *groups, dtype=torch.float64) / 64
            return x | ({"bias": torch.randn(N, dtype=torch.float64)} if bias else {})

        def call(x: Inputs, b: Any, g: Any) -> tuple[Tensor, ...]:
            weight = x["weight"].detach()
            if feature == "bfloat16":
                weight = weight.to(torch.bfloat16)
            scale = x["scale"].detach() if "scale" in x else None
            return (linear(x["x"], weight, scale, bias=x.get("bias"), group_size=group, backend=b),)

        return Case("linear", feature, name, make, call, keep=frozenset({"scale"}))

    for feature in ("int8", "bfloat16"):
        for R, K, N in ((1, 1, 1), (1, 768, 96), (4, 65, 50), (9, 1030, 7), (50, 31, 49)):
            yield case(feature, f"{R}x{K}->{N}", R, K, N)
        yield case(feature, "no bias", bias=False)
    for R, K, group in ((1, 256, 64), (6, 100, 32), (60, 2100, 96), (3, 20, 32)):
        yield case("int8 in groups", f"{R}x{K} by {group}", R, K, group=group)


CASES: tuple[Case, ...] = (
    *attention_cases(),
    *norm_cases(),
    *softmax_cases(),
    *loss_cases(),
    *activation_cases(),
    *rotary_cases(),
    *linear_cases(),
)
