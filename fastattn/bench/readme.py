"""The README's section on performance, of committed runs: fastattn plot results --readme README.md"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .pictures import pictures
from .results import Check, Checks, Results, rate
from .summary import digits, named, summary
from .workload import NAIVE, OURS

NOTHING = "No results are published yet.\n"
OPEN = ("attention-", "peers-")  # pictures that are seen at once; the others open on a click
Found = Results | Checks


def performance(runs: Sequence[tuple[str, Found]]) -> str:
    """runs: (its file as seen from the README, of bench or verify). Pictures lie beside the files."""
    return (
        "\n".join(
            accuracy(file, run) if isinstance(run, Checks) else of(file, run) for file, run in runs
        )
        or NOTHING
    )


def title(file: str) -> str:
    """results/gpu/bench.json is known as gpu/bench."""
    return file.removesuffix(".json").partition("/")[2] or file.removesuffix(".json")


def picture(file: str, name: str) -> str:
    return f"![{name.replace('-', ', ')}]({file.removesuffix('.json')}-{name}.png)"


def of(file: str, results: Results) -> str:
    rows = [row for row in results.rows if row.contestant == OURS]
    groups = dict.fromkeys((row.family, row.dtype) for row in rows)
    parts = [
        f"**{title(file)}**: {where(results)}",
        reproduce(file, results),
        "Times as long as fastattn that each took, so that over 1 is slower: the geometric mean over the "
        "shapes of a family, from rounds in which all took turns.",
        target_table(results),
        summary_table(results),
        growth_table(results),
        *shown_pictures(file, results),
        *(
            details(f"{family}, {dtype}", family_table(results, family, dtype))
            for family, dtype in groups
        ),
        left_out(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def where(results: Results) -> str:
    """Machine, versions, date and commit, in a sentence."""
    about = results.about
    machine, versions = about.get("machine", {}), about.get("versions", {})
    device = machine.get("processor") if about.get("device") == "cpu" else about.get("device")
    flags = " ".join(machine.get("flags", []))
    ceilings = "; ".join(
        f"{float(c['flops']) / 1e9:.0f} GFLOP/s in {dtype} ({c['by']}), "
        f"{float(c['bytes']) / 1e9:.0f} GB/s (a copy)"
        for dtype, c in results.ceilings.items()
    )
    return (
        f"{device}, {about.get('threads')} threads of {machine.get('cores')} cores, "
        f"{about.get('instruction_set')} ({flags}). fastattn {about.get('fastattn')}, "
        f"commit {about.get('commit')}; {', '.join(f'{n} {v}' for n, v in versions.items())}; "
        f"Python {about.get('python')}; {str(about.get('date'))[:10]}. Ceilings of that run: {ceilings}."
    )


def reproduce(file: str, results: Results) -> str:
    command = results.about.get("command")
    minutes = float(results.about.get("seconds", 0.0)) / 60
    return (
        f"All of it is in [`{file}`]({file}). To make the run again, {minutes:.0f} minutes there, and see "
        "what differs, in a clone:\n\n"
        f"```sh\npip install '.[bench]' && {command} --save mine.json; "
        f"fastattn bench --compare {file} mine.json\n```"
    )


def summary_table(results: Results) -> str:
    lines = summary(results.rows)
    names = dict.fromkeys(name for line in lines for name in line.peers)
    rows = (
        (*line[:4], *(ratio(line.peers[n][0]) if n in line.peers else "" for n in names))
        for line in lines
    )
    return markdown(("family", "dtype", "direction", "shapes", *names), rows, words=3)


def target_table(results: Results) -> str:
    """Of a run of --targets: the mean and the least ratio to torch's best beside what was asked for."""
    if not results.targets:
        return ""
    rows = (
        (t["work"], t["dtype"], t["direction"], f"{t['target']:g}", ratio(t["mean"]), ratio(t["least"]),
         "yes" if t["reached"] else "no")
        for t in results.targets
    )  # fmt: skip
    heads = ("work", "dtype", "direction", "target", "times fastattn", "least", "reached")
    return (
        "Held against the fastest of torch's own ways, shape by shape:\n\n"
        + markdown(heads, rows, words=3)
        + "\n\nWhat is known of why a target is not reached stands in "
        "[benchmarks/LOG.md](benchmarks/LOG.md)."
    )


def growth_table(results: Results) -> str:
    """The exponents of fastattn over at least a factor of 8 in S."""
    rows = []
    for g in results.growth():
        lengths = [
            row.sizes["S"]
            for row in results.rows
            if (row.family, row.case, row.contestant) == (g.family, g.case, OURS)
            and row.sizes.items() >= g.sizes.items()
        ]
        if g.contestant != OURS or not lengths or max(lengths) < 8 * min(lengths):
            continue
        exponents = ("" if x is None else f"{x:.2f}" for x in (g.time, g.memory))
        span = f"{min(lengths)} to {max(lengths)}"
        rows.append(
            (f"{g.family} {named(g.case, g.sizes)}", g.dtype, g.direction, span, *exponents)
        )
    if not rows:
        return ""
    heads = ("growth with S, exponent", "dtype", "direction", "S", "time", "memory")
    return markdown(heads, rows, words=4)


def family_table(results: Results, family: str, dtype: str) -> str:
    """A line a shape and direction: ours, and everyone's time over it."""
    here = [row for row in results.rows if (row.family, row.dtype) == (family, dtype)]
    naive = {
        (row.case, *row.sizes.items(), row.direction): row
        for row in here
        if row.contestant == NAIVE
    }
    ours = [row for row in here if row.contestant == OURS and row.direction != "backward"]
    names = dict.fromkeys(name for row in ours for name in row.ratios)
    unit = "GFLOP/s" if ours[0].bound == "flops" else "GB/s"
    metered = any(row.joules for row in ours)
    rows = []
    for row in ours:
        other = naive.get((row.case, *row.sizes.items(), row.direction))
        rows.append((
            named(row.case, row.sizes), row.direction, digits(1e3 * row.seconds), digits(rate(row) / 1e9),
            f"{results.percent(row):.0f} %",
            *(ratio(row.ratios[name]) if name in row.ratios else "" for name in names),
            megabytes(row.bytes), megabytes(other.bytes if other else None),
            *([digits(row.joules) if row.joules else ""] if metered else []),
        ))  # fmt: skip
    heads = (
        "shape",
        "direction",
        "ms",
        unit,
        "of ceiling",
        *names,
        "MB",
        "naive MB",
        *["J"] * metered,
    )
    return markdown(heads, rows, words=2)


def shown_pictures(file: str, results: Results) -> list[str]:
    names = chosen(results)
    seen = [picture(file, name) for name in names if name.startswith(OPEN)]
    rest = [picture(file, name) for name in names if not name.startswith(OPEN)]
    return [*seen, details("more pictures", "\n\n".join(rest)) if rest else ""]


def chosen(results: Results) -> list[str]:
    """Backward alone is left to fastattn plot: both has it in it."""
    return [name for name in pictures(results) if "-backward-" not in name]


def left_out(results: Results) -> str:
    """Who was not timed, by reason; forward only is seen in the tables."""
    reasons: dict[str, list[str]] = {}
    for a in results.absent:
        if a.reason != "forward only":
            reasons.setdefault(a.reason, []).append(a.contestant)
    told = [f"{', '.join(dict.fromkeys(names))} ({reason})" for reason, names in reasons.items()]
    return f"Not timed: {'; '.join(told)}." if told else ""


# ---- fastattn verify ----------------------------------------------------------------------------


def accuracy(file: str, checks: Checks) -> str:
    """The worst error over the allowance by operator and backend, of every dtype."""
    backends = dict.fromkeys(c.backend for c in checks.cases if c.declined is None)
    operators = dict.fromkeys(c.operator for c in checks.cases)
    rows = (
        (operator, *(worst(c for c in checks.cases if (c.operator, c.backend) == (operator, backend))
                     for backend in backends))
        for operator in operators
    )  # fmt: skip
    about = checks.about
    return (
        f"**{title(file)}**: the worst error over the allowed one, of all outputs, gradients and dtypes: "
        f"at most 1 is right; in brackets, of how many cases. `fastattn verify --json` on {about['device']}, "
        f"torch {about['torch']}, {about['instruction_set']}: {about['passed']} passed, "
        f"{about['failed']} failed, {about['declined']} declined ([`{file}`]({file})).\n\n"
        + markdown(("operator", *backends), rows, words=1)
        + f"\n\n{picture(file, 'accuracy')}\n"
    )


def worst(own: Iterable[Check]) -> str:
    judged = [c.worst for c in own if c.declined is None]
    if not judged:
        return ""
    largest = max(float("inf") if x is None else x for x in judged)
    return f"{largest:.2f} ({len(judged)})"


# ---- Markdown -----------------------------------------------------------------------------------


def markdown(heads: Sequence[str], rows: Iterable[Sequence[Any]], words: int) -> str:
    """words: how many columns are no numbers."""
    rule = "|" + "---|" * words + "---:|" * (len(heads) - words)
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]])


def details(title: str, inside: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{inside}\n\n</details>"


def ratio(x: float) -> str:
    return f"{x:.1f}" if x >= 9.95 else f"{x:.2f}"


def megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"
