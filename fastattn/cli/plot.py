"""fastattn plot: runs of fastattn bench and verify as pictures and one HTML report, or in the README."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..bench import Results, read
from ..bench.pictures import Pictures, accuracy, need_matplotlib, pictures
from ..bench.readme import chosen, performance
from ..bench.report import report
from ..bench.results import Checks, holds_run, read_checks
from .parts import read_part, write_part

Found = Results | Checks


def plot(
    results: Annotated[
        list[Path] | None,
        typer.Argument(help="Files of fastattn bench --save or verify --json, or folders of them."),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--to", help="Where pictures and report go.", metavar="FOLDER")
    ] = Path("plots"),
    readme: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a report, write these runs into this README, and pictures beside the files.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Draws runs of fastattn bench: PNG files, and report.html, which opens without a network.

    Exit code 0, or 2 when a file holds no results or matplotlib is missing.
    """
    try:
        runs = read_runs(results or ())
        count = write_readme(readme, runs) if readme else write_report(folder, runs)
    except (ValueError, OSError) as error:
        typer.echo(f"fastattn plot: {error}", err=True)
        raise typer.Exit(2) from None
    where = readme or f"report.html in {folder}"
    typer.echo(f"fastattn plot: {count} pictures and {where}", err=True)


def write_report(folder: Path, runs: dict[Path, Found]) -> int:
    if not runs:
        raise ValueError("name files or folders that hold results")
    names = report_names(list(runs))
    need_matplotlib()
    drawn = {
        path: [(title, draw()) for title, draw in drawings(run).items()]
        for path, run in runs.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    for path, pngs in drawn.items():
        for title, data in pngs:
            (folder / f"{names[path]}-{title}.png").write_bytes(data)
    page = report([(names[path], run, drawn[path]) for path, run in runs.items()])
    (folder / "report.html").write_text(page, encoding="utf-8")
    return sum(map(len, drawn.values()))


def report_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A file's own name, with its folder's where another has the same."""
    stems = [path.stem for path in paths]
    names = {p: p.stem if stems.count(p.stem) == 1 else f"{p.parent.name}-{p.stem}" for p in paths}
    if len(set(names.values())) < len(names):
        raise ValueError(f"files need names that differ, got {', '.join(map(str, paths))}")
    return names


def write_readme(readme: Path, runs: dict[Path, Found]) -> int:
    """The pictures of an earlier run of the same name go."""
    read_part(readme, "performance")
    if runs:
        need_matplotlib()
    drawn = {
        path.with_name(f"{path.stem}-{title}.png"): draw()
        for path, run in runs.items()
        for title, draw in drawings(run).items()
        if isinstance(run, Checks) or title in chosen(run)
    }
    for path in runs:
        for old in path.parent.glob(f"{path.stem}-*.png"):
            old.unlink()
    for file, data in drawn.items():
        file.write_bytes(data)
    write_part(readme, "performance", section(readme, runs))
    return len(drawn)


def section(readme: Path, runs: dict[Path, Found]) -> str:
    """The text alone, for which nothing is drawn."""
    seen = {
        Path(os.path.relpath(path, readme.parent)).as_posix(): run for path, run in runs.items()
    }
    return performance(list(seen.items()))


def read_runs(paths: Iterable[Path]) -> dict[Path, Found]:
    runs: dict[Path, Found] = {}
    for path in paths:
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            found = read_checks(file)
            if found is None and path.is_dir() and not holds_run(file):
                continue  # tables and summaries lie there too
            runs[file] = found or read(file)
    return runs


def drawings(found: Found) -> Pictures:
    return pictures(found) if isinstance(found, Results) else {"accuracy": partial(accuracy, found)}
