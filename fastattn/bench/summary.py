"""A run in few numbers: how many times as long as fastattn everyone took, over all shapes of a family."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import geometric_mean
from typing import NamedTuple

from .harness import Row
from .workload import OURS, sizes_text


class Summary(NamedTuple):
    """peers: name -> (geometric mean, lowest, highest, shapes) of their time over ours."""

    family: str
    dtype: str
    direction: str
    shapes: int
    peers: dict[str, tuple[float, float, float, int]]


def summary(rows: Sequence[Row]) -> list[Summary]:
    """A line a family, dtype and direction; backward alone is left to the full tables."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.contestant == OURS:
            groups.setdefault((row.family, row.dtype, row.direction), []).append(row)
    return [
        Summary(family, dtype, direction, len(own), means(own))
        for (family, dtype, direction), own in groups.items()
        if direction != "backward"
    ]


def means(own: Sequence[Row]) -> dict[str, tuple[float, float, float, int]]:
    names = dict.fromkeys(name for row in own for name in row.ratios)
    found = {name: [row.ratios[name] for row in own if name in row.ratios] for name in names}
    return {n: (geometric_mean(x), min(x), max(x), len(x)) for n, x in found.items()}


def directions_shown(rows: Iterable[Row]) -> list[str]:
    """Without backward alone: forward and both have it in them."""
    return [d for d in dict.fromkeys(row.direction for row in rows) if d != "backward"]


def named(case: str, sizes: dict[str, int]) -> str:
    return " ".join([case, sizes_text(sizes)]).rstrip()


def digits(x: float) -> str:
    """Three of them, and no exponent for what is large."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"
