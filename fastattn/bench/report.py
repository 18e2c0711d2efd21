"""Runs as one HTML file that needs no network: pictures inside, tables that sort, dark and light."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

from .harness import Row
from .results import Check, Checks, Growth, Results, rate
from .summary import digits, summary
from .workload import OURS, sizes_text

STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --soft: #f3f4f6; --text: #1a1a1a; --page: #ffffff;
  --ours: #0a58a8; --less: #595959; }
@media (prefers-color-scheme: dark) { :root { --line: #3a3a3a; --soft: #242628; --text: #e6e6e6;
  --page: #161616; --ours: #7ab8ff; --less: #a8a8a8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.2rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.8rem; padding-top: 0.8rem; border-top: 1px solid var(--line); }
.bar + h2 { border: 0; margin-top: 0; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 0.5rem; }
a { color: var(--ours); }
nav ul { list-style: none; padding: 0; margin: 0 0 0.8rem; display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; }
nav li:first-child { font-weight: 600; }
nav a { display: inline-block; padding: 0.2rem 0; }
.bar { position: sticky; top: 0; background: var(--page); padding: 0.5rem 0; z-index: 1;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: 0.3rem 0.8rem;
  align-items: center; }
input { font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--line);
  border-radius: 6px; padding: 0.35rem 0.6rem; width: 22rem; max-width: 100%; }
h2, h3 { scroll-margin-top: 4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.86rem; white-space: nowrap; }
th, td { padding: 0.25rem 0.6rem 0.25rem 0.4rem; border-bottom: 1px solid var(--line); text-align: left; }
th.number, td.number { text-align: right; }
td.number { font-variant-numeric: tabular-nums; }
td:last-child { min-width: 4rem; }
thead th { background: var(--soft); }
tbody tr:hover { background: var(--soft); }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0.2rem 0;
  cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tr.ours td { color: var(--ours); font-weight: 600; }
p, dd, summary, output, ::placeholder { color: var(--less); opacity: 1; }
figure { margin: 1.2rem 0; }
img { width: 100%; min-width: 40rem; max-width: 68rem; height: auto; background: #ffffff;
  border-radius: 6px; padding: 4px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; font-size: 0.9rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
"""
SCRIPT = """
for (const head of document.querySelectorAll("th")) head.querySelector("button").onclick = () => {
  const table = head.closest("table"), body = table.tBodies[0], at = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[at].dataset.value ?? row.cells[at].textContent;
  const compare = (a, b) => a === "" || b === "" ? (a === "") - (b === "") :
    (isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", {numeric: true}) : a - b) * (up ? 1 : -1);
  body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
};
const filter = document.querySelector("input"), count = document.querySelector("output");
filter.oninput = () => {
  const words = filter.value.toLowerCase().split(" ").filter(word => word), rows = [];
  for (const part of document.querySelectorAll("section.rows")) {
    const own = [...part.querySelectorAll("tbody tr")], name = part.querySelector("h3").textContent;
    for (const row of own) {
      const text = (name + " " + [...row.cells].map(cell => cell.textContent).join(" ")).toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
    }
    part.hidden = words.length > 0 && own.every(row => row.hidden);
    rows.push(...own);
  }
  const shown = rows.filter(row => !row.hidden).length;
  count.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
};
"""
# the browser itself holds the page to needing no network
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
HEADS = (
    "case", "sizes", "dtype", "direction", "who", "ms", "low", "high", "rate, 10⁹/s", "% of ceiling",
    "memory, MB", "times fastattn", "error / allowance",
)  # fmt: skip
EXPLAINED = (
    "ms: median and quartiles of interleaved rounds. rate: operations or bytes a second. Ceiling: what this "
    "machine did in this run; data that a cache holds can pass it. Memory: peak over what was there, results "
    "included. times fastattn: the median over rounds, over 1 is slower. Error: at most 1 is right. "
    "A click on a head sorts."
)
Drawn = Sequence[tuple[str, bytes]]
Run = tuple[str, Results | Checks, Drawn]


def report(runs: Sequence[Run]) -> str:
    """runs: (name, of bench or verify, pictures)."""
    body = "".join(section(*run) for run in runs)
    links = "".join(contents(name, found) for name, found, _ in runs)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fastattn</title><style>{STYLE}</style></head>\n"
        f"<body><h1>fastattn: what was measured</h1>\n<nav>{links}</nav>\n"
        '<div class="bar"><input type="search" aria-label="filter rows" '
        'placeholder="filter rows: attention forward S2048"><output></output></div>\n'
        f"{body}<script>{SCRIPT}</script></body></html>\n"
    )


def contents(name: str, found: Results | Checks) -> str:
    parts = list(tables(found)) if isinstance(found, Results) else []
    links = [(anchor(name), name), *((anchor(name, part), part) for part in parts)]
    items = "".join(f'<li><a href="#{text(at)}">{text(what)}</a></li>' for at, what in links)
    return f"<ul>{items}</ul>"


def anchor(*names: str) -> str:
    return "-".join(name.replace(" ", "-") for name in names)


def section(name: str, found: Results | Checks, drawn: Drawn) -> str:
    whole = {"cases": check_table(found)} if isinstance(found, Checks) else tables(found)
    parts = [rows_of(part, inside, anchor(name, part)) for part, inside in whole.items()]
    pngs = [picture(title, data) for title, data in drawn]
    shown = [facts(found), *parts[:1], *pngs, *parts[1:]]
    return f'<h2 id="{text(anchor(name))}">{text(name)}</h2>' + "\n".join(shown) + "\n"


def rows_of(title: str, inside: str, at: str) -> str:
    return f'<section class="rows"><h3 id="{text(at)}">{text(title)}</h3>{inside}</section>'


def picture(title: str, data: bytes) -> str:
    code, name = base64.b64encode(data).decode(), text(title.replace("-", ", "))
    return f'<figure class="wide"><img alt="{name}" src="data:image/png;base64,{code}"></figure>'


# ---- tables -------------------------------------------------------------------------------------


def tables(results: Results) -> dict[str, str]:
    """Heading -> table: the summary, a family each, growth, and who was left out."""
    found = {"summary": summary_table(results)}
    for family in dict.fromkeys(row.family for row in results.rows):
        rows = [row for row in results.rows if row.family == family]
        joules = ("J",) if any(row.joules is not None for row in rows) else ()
        lines = (cells(row, results, joules) for row in rows)
        note = f"{EXPLAINED} J: joules of a call, idle power included." if joules else EXPLAINED
        found[family] = table((*HEADS, *joules), lines) + f"<p>{note}</p>"
    if growth := results.growth():
        found["growth over S"] = growth_table(growth)
    found["left out"] = left_out(results)
    return found


def summary_table(results: Results) -> str:
    lines = summary(results.rows)
    names = list(dict.fromkeys(name for line in lines for name in line.peers))
    heads = ("family", "dtype", "direction", "shapes", *names)
    rows = (
        (*line[:4], *(line.peers[n][0] if n in line.peers else None for n in names))
        for line in lines
    )
    note = "Times as long as fastattn that each took: the geometric mean over a family's shapes."
    return table(heads, rows) + f"<p>{note}</p>"


def growth_table(growth: Sequence[Growth]) -> str:
    rows = (
        (
            g.family,
            g.case,
            sizes_text(g.sizes),
            g.dtype,
            g.direction,
            g.contestant,
            g.time,
            g.memory,
        )
        for g in growth
    )
    heads = ("family", "case", "sizes", "dtype", "direction", "who", "time", "memory")
    note = "The exponent p of S^p, for one sequence; blank: too little to tell."
    return table(heads, rows) + f"<p>{note}</p>"


def left_out(results: Results) -> str:
    heads = ("family", "case", "sizes", "dtype", "who", "directions", "reason")
    rows = (
        (
            a.family,
            a.case,
            sizes_text(a.sizes),
            a.dtype,
            a.contestant,
            ", ".join(a.directions),
            a.reason,
        )
        for a in results.absent
    )
    return table(heads, rows)


def check_table(checks: Checks) -> str:
    """A line an operator, feature, backend and dtype."""
    groups: dict[tuple[str, str, str, str], list[Check]] = {}
    for c in checks.cases:
        groups.setdefault((c.operator, c.feature, c.backend, c.dtype), []).append(c)
    heads = (
        "operator", "feature", "backend", "dtype", "passed", "failed", "declined", "worst error",
    )  # fmt: skip
    rows = (
        (
            *at, sum(c.passed for c in own), sum(not c.passed and not c.declined for c in own),
            sum(c.declined is not None for c in own), worst(own),
        )
        for at, own in groups.items()
    )  # fmt: skip
    note = "Error over the allowed one, of outputs and gradients: at most 1 is right."
    return table(heads, rows) + f"<p>{note}</p>"


def worst(own: Sequence[Check]) -> float | str | None:
    judged = [c.worst for c in own if c.declined is None]
    return "infinite" if None in judged else max((x for x in judged if x is not None), default=None)


def facts(found: Results | Checks) -> str:
    """Machine, versions and ceilings: in a line, and all of it behind a click."""
    about = found.about
    machine = about.get("machine", {})
    flat: dict[str, Any] = {
        **{n: v for n, v in about.items() if n not in ("machine", "versions")},
        **machine,
        "flags": " ".join(machine.get("flags", [])),
        "versions": ", ".join(f"{n} {v}" for n, v in about.get("versions", {}).items()),
    }
    for dtype, ceiling in found.ceilings.items() if isinstance(found, Results) else ():
        flops, moved = float(ceiling["flops"]) / 1e9, float(ceiling["bytes"]) / 1e9
        flat[f"ceiling, {dtype}"] = (
            f"{flops:.0f} GFLOP/s ({ceiling['by']}), {moved:.0f} GB/s (a copy)"
        )
    flat = {n.replace("_", " "): v for n, v in flat.items() if v not in ("", None)}
    items = "".join(f"<dt>{text(n)}</dt><dd>{text(v)}</dd>" for n, v in flat.items())
    first = ("processor", "instruction set", "threads", "versions", "date", "commit")
    line = ", ".join(
        f"{flat[n]} {n}" if n == "threads" else str(flat[n]) for n in first if n in flat
    )
    return f"<details><summary>{text(line)}</summary><dl>{items}</dl></details>"


def cells(row: Row, results: Results, more: tuple[str, ...] = ()) -> tuple[Any, ...]:
    return (
        row.case, sizes_text(row.sizes), row.dtype, row.direction, row.contestant, 1e3 * row.seconds,
        1e3 * row.low, 1e3 * row.high, rate(row) / 1e9, results.percent(row),
        None if row.bytes is None else row.bytes / 1e6,
        1 / row.ratios[OURS] if OURS in row.ratios else None, row.error, *[row.joules for _ in more],
    )  # fmt: skip


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = list(rows)
    numeric = {at for line in lines for at, x in enumerate(line) if isinstance(x, (int, float))}
    head = "".join(
        f'<th scope="col"{" class=number" * (at in numeric)}><button>{text(h)}</button></th>'
        for at, h in enumerate(heads)
    )
    ours = [" class=ours" * (OURS in line) for line in lines]
    body = "\n".join(
        f"<tr{mark}>{''.join(map(cell, line))}</tr>" for mark, line in zip(ours, lines, strict=True)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def cell(x: Any) -> str:
    """Numbers sort by their value, of which three digits are shown."""
    if not isinstance(x, (int, float)):
        return f"<td>{'' if x is None else text(x)}</td>"
    shown = str(x) if isinstance(x, int) else digits(x)
    return f'<td class="number" data-value="{x!r}">{shown}</td>'


def text(x: Any) -> str:
    return html.escape(str(x))
