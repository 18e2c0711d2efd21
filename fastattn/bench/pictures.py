"""The field's usual pictures of a run, drawn with matplotlib: speed and memory over S, the roofline,
and error over allowance.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .harness import Row
from .results import Results, rate
from .workload import OURS

# Okabe and Ito's, which the colour-blind tell apart; ours is always the first
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#000000", "#8C6BB1",
)  # fmt: skip
MARKERS = "os^DvP*Xh"


def pictures(results: Results) -> Iterator[tuple[str, bytes]]:
    """(name, PNG) of everything that the run has data for."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install 'fastattn[bench]'")
    for family in dict.fromkeys(row.family for row in results.rows):
        own = [row for row in results.rows if row.family == family]
        series = [row for row in own if "S" in row.sizes]
        if len({row.sizes["S"] for row in series}) > 1:
            yield f"{family}-speed", over_length(results, series, speed)
            if any(row.bytes for row in series):
                yield f"{family}-memory", over_length(results, series, memory)
    yield "roofline", roofline(results)
    yield "error", errors(results)


def style(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for everyone, the same in all pictures of a run."""
    ordered = sorted(dict.fromkeys(names), key=lambda name: (name != OURS, name))
    return {
        name: {
            "color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)],
            "linewidth": 2.2 if name == OURS else 1.2, "markersize": 5, "label": name,
        }
        for at, name in enumerate(ordered)
    }  # fmt: skip


def speed(ax: Any, row: Row) -> float:
    ax.set_ylabel("GFLOP/s" if row.bound == "flops" else "GB/s")
    return rate(row) / 1e9


def memory(ax: Any, row: Row) -> float | None:
    ax.set_ylabel("peak extra memory, MB")
    ax.set_yscale("log")
    return row.bytes / 1e6 if row.bytes else None


def over_length(
    results: Results, rows: Sequence[Row], value: Callable[[Any, Row], float | None]
) -> bytes:
    """A panel a case and dtype, across, and direction, down."""
    across = list(dict.fromkeys(kind(row) for row in rows))
    down = list(dict.fromkeys(row.direction for row in rows))
    figure, axes = panels(len(down), len(across))
    look = style([row.contestant for row in results.rows])
    for i, direction in enumerate(down):
        for j, case in enumerate(across):
            ax = axes[i][j]
            ax.set_title(f"{case}, {direction}", fontsize=9)
            here = [r for r in rows if r.direction == direction and kind(r) == case]
            lengths = sorted({r.sizes["S"] for r in here})
            ax.set_xscale("log", base=2)
            ax.set_xticks(lengths, [str(S) for S in lengths])
            ax.set_xlabel("S")
            for name in dict.fromkeys(r.contestant for r in here):
                points = [(r.sizes["S"], value(ax, r)) for r in here if r.contestant == name]
                points = sorted((s, y) for s, y in points if y is not None)
                if points:
                    ax.plot(*zip(*points, strict=True), **look[name])
            if value is speed:
                ax.set_ylim(bottom=0)
    legend(figure, axes)
    return png(figure)


def kind(row: Row) -> str:
    """What a panel has in common: everything but B and S."""
    sizes = " ".join(f"{n}{s}" for n, s in row.sizes.items() if n not in ("B", "S", "C"))
    return f"{row.case} {sizes} {row.dtype}"


def roofline(results: Results) -> bytes:
    """Ours alone, against operations a byte; over the lines is what caches hold."""
    figure, axes = panels(1, len(results.ceilings))
    look = style([row.family for row in results.rows])
    for ax, (dtype, ceiling) in zip(axes[0], results.ceilings.items(), strict=True):
        rows = [r for r in results.rows if r.contestant == OURS and r.dtype == dtype and r.moved]
        for family in dict.fromkeys(r.family for r in rows):
            own = [r for r in rows if r.family == family]
            x = [r.flops / r.moved for r in own]
            ax.plot(
                x, [r.flops / r.seconds / 1e9 for r in own], **(look[family] | {"linewidth": 0})
            )
        flops, moved = float(ceiling["flops"]) / 1e9, float(ceiling["bytes"]) / 1e9
        bend = flops / moved
        ax.plot([0.1, bend, 1e4], [0.1 * moved, flops, flops], color="#888888", linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="GFLOP/s")
        ax.set_title(f"fastattn, {dtype}: {ceiling['by']}, and a copy", fontsize=9)
    legend(figure, axes)
    return png(figure)


def errors(results: Results) -> bytes:
    """The worst error over the allowance of everyone, by family: at most 1 is right."""
    worst: dict[tuple[str, str], float] = {}
    for row in results.rows:
        at = (row.family, row.contestant)
        worst[at] = max(worst.get(at, 0.0), row.error)
    families = list(dict.fromkeys(family for family, _ in worst))
    look = style([row.contestant for row in results.rows])
    figure, axes = panels(1, 1)
    ax = axes[0][0]
    names = list(look)
    for (family, name), error in worst.items():
        # everyone a little higher than the one before, or equal errors would hide each other
        height = families.index(family) + 0.6 * (names.index(name) / len(names) - 0.5)
        ax.plot([error], [height], **(look[name] | {"linewidth": 0}))
    ax.axvline(1.0, color="#888888", linewidth=1)
    ax.set_yticks(range(len(families)), families)
    ax.set_xlabel("worst error over allowance: right of the line is wrong")
    ax.set_xlim(left=0)
    legend(figure, axes)
    return png(figure)


# ---- matplotlib ---------------------------------------------------------------------------------


def panels(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns + 1.4, 3.0 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend(figure: Any, axes: Any) -> None:
    """One for all panels."""
    found: dict[str, Any] = {}
    for ax in axes.flat:
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    if found:
        figure.legend(found.values(), found.keys(), loc="outside right upper", fontsize=8)


def png(figure: Any) -> bytes:
    """Without a date or a version: the same run gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return file.getvalue()
