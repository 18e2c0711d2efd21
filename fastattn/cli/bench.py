"""fastattn bench: what is measured, as tables; who was left out, and why."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..bench import FAMILIES, OURS, Results, Row, compare, read, run_bench, run_targets
from ..bench.results import NOISE, Change, rate
from ..bench.summary import digits, named
from .progress import progress
from .verify import known_device, known_dtype

CAPTION = (
    "ms: median and quartiles of interleaved rounds. ceiling: percent of what this machine did in this run, "
    "{ceiling}; data that a cache holds can pass it. memory: peak over what was there, results included. "
    "times fastattn: how many times as long as fastattn it took, the median over rounds."
)
OF_THEIR_OWN = (
    "--targets has dtypes, sizes and times of its own, on a CPU, and takes no --device, --dtype, --quick, "
    "--compile or --seconds"
)
WIDTH = 160  # of a table that no terminal shows


def bench(
    family: Annotated[
        list[str] | None,
        typer.Argument(
            help=f"Of {', '.join(FAMILIES)}, or words of --targets and growth; else all."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where tensors lie.")] = "cpu",
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="May repeat; else float32 on a CPU and bfloat16 elsewhere."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, under 3 minutes.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile of the naive form too; minutes more.")
    ] = False,
    targets: Annotated[
        bool,
        typer.Option("--targets", help="What fastattn sets itself over torch's best on a CPU."),
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Of a CPU; else torch's.", min=1)] = None,
    energy: Annotated[bool, typer.Option(help="Joules of a call, where the machine tells.")] = True,
    seconds: Annotated[
        float | None, typer.Option(help="End after so long; families take turns.", min=1)
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the results there, as JSON.", metavar="FILE")
    ] = None,
    compared: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", help="Measure nothing; what changed from A to B.", metavar="A B"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout, all else on stderr.")
    ] = False,
) -> None:
    """Times every operator and whole models against everyone who can make the same call.

    Whoever is not right by the error rule is not timed. Exit code 0; 1 when a result is wrong, or with
    --compare when fastattn became slower beyond noise; 2 when the command is wrong.
    """
    try:
        if compared:
            raise typer.Exit(show_changes(*compared, as_json))
        known_device(device)
        default = "float32" if torch.device(device).type == "cpu" else "bfloat16"
        dtypes = [known_dtype(name) for name in dtype or [default]]
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            with progress(60) as tell:
                if targets:
                    if dtype or quick or compiled or seconds or device != "cpu":
                        raise ValueError(OF_THEIR_OWN)
                    results = run_targets(family or [], progress=tell)
                else:
                    results = run_bench(
                        family or [], dtypes=dtypes, device=device, quick=quick, compile=compiled,
                        energy=energy, seconds=seconds, progress=tell,
                    )  # fmt: skip
        finally:
            torch.set_num_threads(before)
        text = json.dumps(results.as_json(), indent=1, allow_nan=False)
        if save:
            save.write_text(text + "\n")
    except (ValueError, OSError) as error:
        typer.echo(f"fastattn bench: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        print(text)
    else:
        show(results)
    console = Console(stderr=as_json, soft_wrap=True, highlight=False)
    for a in results.wrong:
        call = f"{a.family} {named(a.case, a.sizes)} {a.contestant}"
        console.print(f"wrong: {call}: {a.reason}", markup=False)
    console.print(
        f"fastattn bench: {len(results.rows)} results, {len(results.wrong)} wrong, "
        f"{results.about['threads']} threads, {results.about['date']}"
    )
    raise typer.Exit(1 if results.wrong else 0)


def show(results: Results) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    for family in dict.fromkeys(row.family for row in results.rows):
        rows = [row for row in results.rows if row.family == family]
        console.print(family_table(family, rows, results))
    show_growth(console, results)
    left = results.about.get("not_reached", [])
    if left:
        console.print(f"not reached: {'; '.join(left)}", markup=False, soft_wrap=True)
    if results.targets:
        console.print(target_table(results))
    for sentence in absences(results):
        console.print(sentence, markup=False, soft_wrap=True)


def family_table(family: str, rows: Sequence[Row], results: Results) -> Table:
    ceiling = results.ceilings[rows[0].dtype]
    bound = rows[0].bound
    what = {"flops": str(ceiling["by"]), "bytes": "a copy", "read": "reading"}[bound]
    size = f"{float(ceiling[bound]) / 1e9:.0f} {unit(bound)} ({what})"
    table = Table(title=family, caption=CAPTION.format(ceiling=size))
    for head in ("case", "dtype", "direction", "who"):
        table.add_column(head, no_wrap=True)
    counted = any(row.joules is not None for row in rows)
    floor = bound == "read"  # and there is a time that nobody can pass
    heads = ("ms", "spread", unit(bound), "ceiling", "memory MB", "times fastattn")
    for head in (*heads, *["J"] * counted, *["floor ms"] * floor):
        table.add_column(head, justify="right", no_wrap=True)
    last: tuple[str, ...] = ()
    for row in rows:
        at = (named(row.case, row.sizes), row.dtype, row.direction)
        if last and at != last:
            table.add_section()
        joules = "" if row.joules is None else digits(row.joules)
        at_ceiling = digits(1e3 * row.moved / float(ceiling[bound]))
        own = (*cells(row, results), *[joules] * counted, *[at_ceiling] * floor)
        table.add_row(*(at if at != last else ("", "", "")), *own)
        last = at
    return table


def cells(row: Row, results: Results) -> tuple[str, ...]:
    name = f"[bold]{row.contestant}[/bold]" if row.contestant == OURS else row.contestant
    slower = 1 / row.ratios[OURS] if OURS in row.ratios else None
    return (
        name, digits(1e3 * row.seconds), f"{digits(1e3 * row.low)}-{digits(1e3 * row.high)}",
        digits(rate(row) / 1e9), f"{results.percent(row):.0f} %",
        "" if row.bytes is None else f"{row.bytes / 1e6:.1f}", "" if slower is None else f"{slower:.2f}",
    )  # fmt: skip


def unit(bound: str) -> str:
    return "GFLOP/s" if bound == "flops" else "GB/s"


def show_growth(console: Console, results: Results) -> None:
    growth = results.growth()
    if not growth:
        return
    table = Table(title="growth over S of one sequence: the exponent", caption="blank: too little")
    for head in ("case", "dtype", "direction", "who"):
        table.add_column(head, no_wrap=True)
    for head in ("time", "memory"):
        table.add_column(head, justify="right")
    for g in growth:
        exponents = ("" if x is None else f"{x:.2f}" for x in (g.time, g.memory))
        case = f"{g.family} {named(g.case, g.sizes)}"
        table.add_row(case, g.dtype, g.direction, g.contestant, *exponents)
    console.print(table)


def target_table(results: Results) -> Table:
    caption = (
        "times fastattn: how many times as long torch's best takes, the geometric mean over shapes "
        "and the least of them. Reached: the target, and no shape below 1."
    )
    table = Table(title="what fastattn sets itself over torch's best", caption=caption)
    for head in ("work", "dtype", "direction"):
        table.add_column(head, no_wrap=True)
    for head in ("target", "times fastattn", "least", "reached"):
        table.add_column(head, justify="right")
    for t in results.targets:
        found = (f"{t['target']:g}", f"{t['mean']:.2f}", f"{t['least']:.2f}")
        reached = "yes" if t["reached"] else "no"
        table.add_row(t["work"], t["dtype"], t["direction"], *found, reached)
    return table


def absences(results: Results) -> list[str]:
    """A sentence for everyone who was left out of something; the same reason once a family."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for a in results.absent:
        if not a.wrong:
            forms = named(a.case, a.sizes)
            where.setdefault((a.family, a.contestant, a.reason), []).append(forms)
    timed = {(row.family, row.contestant) for row in results.rows}
    return [
        f"left out: {family}, {name}"
        + (f", {'; '.join(dict.fromkeys(forms))}" if (family, name) in timed else "")
        + f": {reason}"
        for (family, name, reason), forms in where.items()
    ]


# ---- two runs -----------------------------------------------------------------------------------


def show_changes(first: Path, second: Path, as_json: bool) -> int:
    a, b = read(first), read(second)
    changes = compare(a, b)
    beyond = [c for c in changes if c.beyond_noise]
    slower = [c for c in beyond if c.row.contestant == OURS and (c.relative or c.factor) > 1]
    if as_json:
        print(json.dumps([as_dict(c) for c in changes], indent=1, allow_nan=False))
    else:
        Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH).print(
            change_table(beyond)
        )
    console = Console(stderr=as_json, soft_wrap=True, highlight=False)
    for name in ("machine", "device", "threads", "instruction_set", "versions"):
        if a.about.get(name) != b.about.get(name):
            console.print(f"not the same {name}: times may differ for that reason", markup=False)
    if changes:
        factor = median(c.factor for c in changes)
        console.print(f"half of all results took {factor:.2f} times as long as before, or longer")
    console.print(
        f"fastattn bench: {len(changes)} results in both, {len(beyond)} changed beyond noise, "
        f"fastattn slower in {len(slower)}"
    )
    return 1 if slower else 0


def change_table(changes: Sequence[Change]) -> Table:
    caption = (
        f"Beyond noise: the quartiles of the two runs do not meet, and the change is over {NOISE:.0%}; for "
        "fastattn, of its time over that of every other in the same rounds, and for another, of its time and "
        "of that over fastattn's. against others: the mean change over them, without what the machine did."
    )
    table = Table(title="changes beyond noise", caption=caption)
    for head in ("case", "dtype", "direction", "who"):
        table.add_column(head, no_wrap=True)
    for head in ("ms before", "ms", "times as long", "against others"):
        table.add_column(head, justify="right")
    for c in changes:
        row = c.row
        table.add_row(
            f"{row.family} {named(row.case, row.sizes)}", row.dtype, row.direction,
            row.contestant, digits(1e3 * c.before.seconds), digits(1e3 * row.seconds),
            f"{c.factor:.2f}", "" if c.relative is None else f"{c.relative:.2f}",
        )  # fmt: skip
    return table


def as_dict(c: Change) -> dict[str, object]:
    row = c.row
    return {
        "family": row.family, "case": row.case, "sizes": row.sizes, "dtype": row.dtype,
        "direction": row.direction, "contestant": row.contestant, "seconds_before": c.before.seconds,
        "seconds": row.seconds, "times_as_long": c.factor, "against_others": c.relative,
        "beyond_noise": c.beyond_noise,
    }  # fmt: skip
