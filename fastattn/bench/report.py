"""A run as one HTML file that needs no network: pictures inside, tables that sort, dark and light."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

from .harness import Row
from .results import Results, rate
from .workload import OURS

STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --soft: #f4f4f4; --text: #1a1a1a; --page: #ffffff;
  --ours: #0a58a8; }
@media (prefers-color-scheme: dark) { :root { --line: #3a3a3a; --soft: #232323; --text: #e6e6e6;
  --page: #161616; --ours: #7ab8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.86rem; white-space: nowrap; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
thead th { background: var(--soft); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.ours td { color: var(--ours); font-weight: 600; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; padding: 4px; }
dt { font-weight: 600; } dd { margin: 0 0 0.4rem; overflow-wrap: anywhere; }
"""
SCRIPT = """
for (const head of document.querySelectorAll("th")) head.querySelector("button").onclick = () => {
  const table = head.closest("table"), body = table.tBodies[0], at = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[at].dataset.value ?? row.cells[at].textContent;
  const compare = (a, b) => a === "" || b === "" ? (a === "") - (b === "") :
    (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b) * (up ? 1 : -1);
  body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
};
"""
HEADS = (
    "case", "sizes", "dtype", "direction", "who", "ms", "low", "high", "rate, 10⁹/s", "% of ceiling",
    "memory, MB", "times fastattn", "error / allowance",
)  # fmt: skip


def report(runs: Sequence[tuple[str, Results, Sequence[tuple[str, bytes]]]]) -> str:
    """runs: (name, results, pictures)."""
    body = "".join(section(*run) for run in runs)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fastattn bench</title><style>{STYLE}</style></head>\n"
        f"<body><h1>fastattn bench</h1>\n{body}<script>{SCRIPT}</script></body></html>\n"
    )


def section(name: str, results: Results, pictures: Sequence[tuple[str, bytes]]) -> str:
    parts = [f"<h2>{text(name)}</h2>", facts(results)]
    for title, data in pictures:
        code = base64.b64encode(data).decode()
        parts.append(
            f'<figure><img alt="{text(title)}" src="data:image/png;base64,{code}"></figure>'
        )
    for family in dict.fromkeys(row.family for row in results.rows):
        rows = [row for row in results.rows if row.family == family]
        parts.append(f"<h3>{text(family)}</h3>")
        parts.append(table(HEADS, (cells(row, results) for row in rows)))
    parts.append("<h3>left out</h3>")
    heads = ("family", "case", "sizes", "dtype", "who", "directions", "reason")
    left_out = (
        (a.family, a.case, sizes(a.sizes), a.dtype, a.contestant, ", ".join(a.directions), a.reason)
        for a in results.absent
    )
    parts.append(table(heads, left_out))
    return "\n".join(parts) + "\n"


def facts(results: Results) -> str:
    """Machine, versions and ceilings, as a list."""
    machine = results.about.get("machine", {})
    flat: dict[str, Any] = {
        **{n: v for n, v in results.about.items() if n not in ("machine", "versions")},
        **machine,
        "flags": " ".join(machine.get("flags", [])),
        "versions": ", ".join(f"{n} {v}" for n, v in results.about.get("versions", {}).items()),
    }
    for dtype, found in results.ceilings.items():
        flops, moved = float(found["flops"]) / 1e9, float(found["bytes"]) / 1e9
        flat[f"ceiling, {dtype}"] = (
            f"{flops:.0f} GFLOP/s ({found['by']}), {moved:.0f} GB/s (a copy)"
        )
    items = "".join(f"<dt>{text(n)}</dt><dd>{text(v)}</dd>" for n, v in flat.items())
    return f"<details open><summary>where and with what</summary><dl>{items}</dl></details>"


def cells(row: Row, results: Results) -> tuple[Any, ...]:
    return (
        row.case, sizes(row.sizes), row.dtype, row.direction, row.contestant, 1e3 * row.seconds,
        1e3 * row.low, 1e3 * row.high, rate(row) / 1e9, results.percent(row),
        None if row.bytes is None else row.bytes / 1e6,
        1 / row.ratios[OURS] if OURS in row.ratios else None, row.error,
    )  # fmt: skip


def sizes(found: dict[str, int]) -> str:
    return " ".join(f"{letter}{size}" for letter, size in found.items())


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f'<th scope="col"><button>{text(h)}</button></th>' for h in heads)
    lines = []
    for row in rows:
        ours = ' class="ours"' if OURS in row else ""
        lines.append(f"<tr{ours}>" + "".join(cell(x) for x in row) + "</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def cell(x: Any) -> str:
    """Numbers sort by their value, of which three digits are shown."""
    if not isinstance(x, float):
        return f"<td>{'' if x is None else text(x)}</td>"
    shown = f"{x:.0f}" if x >= 100 else f"{x:.3g}"
    return f'<td class="number" data-value="{x!r}">{shown}</td>'


def text(x: Any) -> str:
    return html.escape(str(x))
