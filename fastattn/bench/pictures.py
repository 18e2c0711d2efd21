"""The field's usual pictures, drawn with matplotlib: of a run of fastattn bench the speed over S of every
dtype and direction, memory over S, everyone else's time over ours, the roofline and the errors; of
fastattn verify the error over allowance of every backend.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from .harness import Row
from .results import Checks, Results, rate
from .summary import directions_shown, named
from .workload import OURS

# Okabe and Ito's, which the colour-blind tell apart; ours is always the first
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#000000", "#8C6BB1",
)  # fmt: skip
MARKERS = "os^DvP*Xh"
TITLES = {
    "forward": "forward",
    "backward": "backward",
    "both": "forward and backward",
}
PER_BAR = 36  # bars in a panel up to which each has its number over it
Look = dict[str, dict[str, Any]]
Pictures = dict[str, Callable[[], bytes]]


def pictures(results: Results) -> Pictures:
    """Name -> what draws it as PNG, of everything that the run has data for."""
    found: Pictures = {}
    for dtype in results.ceilings:
        own = [row for row in results.rows if row.dtype == dtype]
        rest = own
        for family in dict.fromkeys(row.family for row in own):
            series = over_lengths([row for row in own if row.family == family])
            rest = [row for row in rest if row not in series]
            for direction in dict.fromkeys(row.direction for row in series):
                rows = [row for row in series if row.direction == direction]
                found[f"{family}-{direction}-{dtype}"] = partial(speed, results, rows)
            heavy = [row for row in series if row.direction == series[-1].direction]
            if any(row.bytes for row in heavy):
                found[f"{family}-memory-{dtype}"] = partial(memory, results, heavy)
        if any(OURS in row.ratios for row in rest):
            found[f"peers-{dtype}"] = partial(peers, results, rest)
    if any(row.contestant == OURS for row in results.rows):
        found["roofline"] = partial(roofline, results)
    if results.rows:
        found["errors"] = partial(errors, results)
    return found


def over_lengths(rows: Sequence[Row]) -> list[Row]:
    """Those of calls that were made with several S."""
    lengths: dict[str, set[int]] = {}
    for row in rows:
        lengths.setdefault(kind(row), set()).add(row.sizes.get("S", 0))
    return [] if rows[0].family == "models" else [r for r in rows if len(lengths[kind(r)]) > 1]


def kind(row: Row) -> str:
    """What a panel has in common: everything but B and S."""
    return named(row.case, {n: size for n, size in row.sizes.items() if n not in ("B", "S")})


def style(names: Iterable[str]) -> Look:
    """A colour and a marker for everyone, the same in all pictures of a run."""
    ordered = sorted(dict.fromkeys(names), key=lambda name: (name != OURS, name))
    return {
        name: {
            "color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)], "label": name,
        }
        for at, name in enumerate(ordered)
    }  # fmt: skip


# ---- over S -------------------------------------------------------------------------------------


def speed(results: Results, rows: Sequence[Row]) -> bytes:
    """Bars: a group a length, a panel a kind of call."""
    row, look = rows[0], style(r.contestant for r in results.rows)
    unit = "GFLOP/s" if row.bound == "flops" else "GB/s"
    kinds = list(dict.fromkeys(map(kind, rows)))
    figure, axes = panels(len(kinds), f"{row.family} {TITLES[row.direction]}, {row.dtype}, {unit}")
    for ax, name in zip(axes, kinds, strict=True):
        bars(ax, [r for r in rows if kind(r) == name], look)
        ax.set_title(name, fontsize=9)
        ceiling = float(results.ceilings[row.dtype][row.bound]) / 1e9
        ax.axhline(ceiling, color="#888888", linewidth=1, linestyle="--", label="ceiling")
    legend(figure, axes)
    return png(figure)


def bars(ax: Any, rows: Sequence[Row], look: Look) -> None:
    lengths = sorted({r.sizes["S"] for r in rows})
    names = [name for name in look if any(r.contestant == name for r in rows)]
    width = 0.84 / len(names)
    for at, name in enumerate(names):
        found = {r.sizes["S"]: rate(r) / 1e9 for r in rows if r.contestant == name}
        x = [lengths.index(S) + (at - (len(names) - 1) / 2) * width for S in found]
        drawn = ax.bar(x, list(found.values()), width, color=look[name]["color"], label=name)
        if len(names) * len(lengths) <= PER_BAR:
            ax.bar_label(drawn, fmt=three_digits, fontsize=6, padding=1)
    ax.set_xticks(range(len(lengths)), [f"S {S}" for S in lengths])
    ax.grid(False, axis="x")


def three_digits(x: float) -> str:
    return f"{x:.0f}" if x >= 10 else f"{x:.2g}"


def memory(results: Results, rows: Sequence[Row]) -> bytes:
    """Lines, both axes logarithmic: what grows with S lies on a slope of 1, with its square on 2."""
    row, look = rows[0], style(r.contestant for r in results.rows)
    kinds = list(dict.fromkeys(map(kind, rows)))
    title = f"{row.family} {TITLES[row.direction]}, {row.dtype}, peak extra memory in MB"
    figure, axes = panels(len(kinds), title)
    for ax, name in zip(axes, kinds, strict=True):
        here = [r for r in rows if kind(r) == name]
        lengths = sorted({r.sizes["S"] for r in here})
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(lengths, [f"S {S}" for S in lengths], minor=False)
        ax.set_xticks([], minor=True)
        ax.yaxis.set_major_formatter(lambda y, at: f"{y:g}")
        ax.yaxis.set_minor_formatter("")
        ax.set_title(name, fontsize=9)
        for who in look:
            own = [r for r in here if r.contestant == who]
            points = [(r.sizes["S"], r.bytes / 1e6) for r in own if r.bytes]
            if points:
                ax.plot(*zip(*sorted(points), strict=True), **look[who], **thick(who))
    legend(figure, axes)
    return png(figure)


def thick(name: str) -> dict[str, float]:
    return {"linewidth": 2.4 if name == OURS else 1.3, "markersize": 5}


# ---- everyone against us, the roofline, the errors ----------------------------------------------


def peers(results: Results, rows: Sequence[Row]) -> bytes:
    """How many times as long as fastattn everyone took: a line a call, logarithmic."""
    look = style(r.contestant for r in results.rows)
    calls = list(dict.fromkeys(label(r) for r in rows))
    directions = directions_shown(rows)
    title = f"times as long as fastattn, {rows[0].dtype}: right of the line is slower"
    figure, axes = panels(len(directions), title, 0.24 * len(calls) + 0.5, share_y=True)
    for ax, direction in zip(axes, directions, strict=True):
        ax.axvline(1.0, color=look[OURS]["color"], linewidth=2.4, label=OURS)
        for name in look:
            found = [
                (1 / r.ratios[OURS], calls.index(label(r)))
                for r in rows
                if r.direction == direction and r.contestant == name and OURS in r.ratios
            ]
            if found:
                ax.plot(*zip(*found, strict=True), **look[name], linewidth=0, markersize=6)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, at: f"{x:g}")
        ax.set_yticks(range(len(calls)), calls)
        ax.set_title(TITLES[direction], fontsize=9)
    axes[0].invert_yaxis()
    legend(figure, axes)
    return png(figure)


def label(row: Row) -> str:
    family = "" if row.case.startswith(row.family) else f"{row.family} "
    return family + named(row.case, row.sizes)


def roofline(results: Results) -> bytes:
    """Ours alone, against operations a byte; over the lines is what caches hold."""
    figure, axes = panels(len(results.ceilings), "roofline of fastattn, GFLOP/s", 3.6)
    look = style(row.family for row in results.rows)
    for ax, (dtype, ceiling) in zip(axes, results.ceilings.items(), strict=True):
        rows = [r for r in results.rows if r.contestant == OURS and r.dtype == dtype and r.moved]
        for family in dict.fromkeys(r.family for r in rows):
            own = [r for r in rows if r.family == family]
            x, y = [r.flops / r.moved for r in own], [r.flops / r.seconds / 1e9 for r in own]
            ax.plot(x, y, **look[family], linewidth=0, markersize=5, alpha=0.8)
        flops, moved = float(ceiling["flops"]) / 1e9, float(ceiling["bytes"]) / 1e9
        x, y = [0.1, flops / moved, 1e4], [0.1 * moved, flops, flops]
        ax.plot(x, y, color="#888888", linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="operations a byte")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(lambda x, at: f"{x:g}")
        ax.set_title(f"{dtype}: {ceiling['by']}, and a copy", fontsize=9)
    legend(figure, axes, outside="right upper")
    return png(figure)


def errors(results: Results) -> bytes:
    """The worst error over the allowance of everyone, by family: at most 1 is right."""
    worst: dict[tuple[str, str], float] = {}
    for row in results.rows:
        at = (row.family, row.contestant)
        worst[at] = max(worst.get(at, 0.0), row.error)
    families = list(dict.fromkeys(row.family for row in results.rows))
    look = style(row.contestant for row in results.rows)
    figure, axes = panels(1, "worst error over the allowed one", 0.34 * len(families) + 0.5)
    strips(axes[0], families, [(*at, error) for at, error in worst.items()], look)
    legend(figure, axes, outside="right upper")
    return png(figure)


def accuracy(checks: Checks) -> bytes:
    """Of fastattn verify: every tensor's error over the allowance, by operator and backend."""
    operators = list(dict.fromkeys(c.operator for c in checks.cases))
    dtypes = list(dict.fromkeys(c.dtype for c in checks.cases))
    look = style(c.backend for c in checks.cases)
    height = 0.34 * len(operators) + 0.5
    figure, axes = panels(len(dtypes), "error over the allowed one, a point a case", height, True)
    for ax, dtype in zip(axes, dtypes, strict=True):
        points = [(c.operator, c.backend, c.worst) for c in checks.cases if c.dtype == dtype]
        strips(ax, operators, [p for p in points if p[2] is not None], look)
        ax.set_title(dtype, fontsize=9)
    legend(figure, axes)
    return png(figure)


def strips(
    ax: Any, lines: Sequence[str], points: Sequence[tuple[str, str, Any]], look: Look
) -> None:
    """Everyone a little lower than the one before, or equal errors would hide each other."""
    names = list(look)
    for name in names:
        own = [(x, line) for line, who, x in points if who == name]
        shift = 0.7 * ((names.index(name) + 0.5) / len(names) - 0.5)
        y = [lines.index(line) + shift for _, line in own]
        ax.plot([x for x, _ in own], y, **look[name], linewidth=0, markersize=4.5, alpha=0.7)
    ax.axvline(1.0, color="#888888", linewidth=1)
    ax.set_yticks(range(len(lines)), lines)
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.set_xlim(0, max([1.05, *(1.05 * x for _, _, x in points)]))
    ax.set_xlabel("right of the line is wrong")


# ---- matplotlib ---------------------------------------------------------------------------------


def panels(
    count: int, title: str, height: float = 2.6, share_y: bool = False
) -> tuple[Any, list[Any]]:
    """Two a line, or all on one line where they share the labels of their y axis."""
    from matplotlib.figure import Figure

    columns = count if share_y else min(count, 2)
    lines = -(-count // columns)
    width = 5.0 if share_y and count < 3 else 10.0 / columns
    figure = Figure(figsize=(max(7.0, width * columns), height * lines + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=10, fontweight="bold")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharey=share_y).flat)
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[:count]:
        ax.grid(True, color="#e4e4e4", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
        ax.xaxis.label.set_fontsize(8)
    return figure, axes[:count]


def legend(figure: Any, axes: Sequence[Any], outside: str = "lower center") -> None:
    """One for all panels."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    columns = min(len(found), 8) if outside == "lower center" else 1
    figure.legend(
        found.values(), found.keys(), loc=f"outside {outside}", ncols=columns, fontsize=8,
        frameon=False,
    )  # fmt: skip


def png(figure: Any) -> bytes:
    """In 128 colours, a third of the bytes. No date or version: the same run gives the same bytes."""
    from PIL import Image  # matplotlib cannot be without it

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=110, metadata={"Software": None})
    picture = Image.open(full).convert("RGB")
    # by coverage, which keeps the few points of a rare colour
    picture.quantize(128, Image.Quantize.MAXCOVERAGE).save(small, "PNG", optimize=True)
    return small.getvalue()


def need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install 'fastattn[bench]'")
