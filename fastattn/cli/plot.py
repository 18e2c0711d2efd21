"""fastattn plot: runs of fastattn bench and verify as pictures and one HTML report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..bench import Results, read
from ..bench.pictures import accuracy, need_matplotlib, pictures
from ..bench.report import Run, report
from ..bench.results import read_checks


def plot(
    results: Annotated[
        list[Path], typer.Argument(help="Files of fastattn bench --save, or of verify --json.")
    ],
    folder: Annotated[
        Path, typer.Option("--to", help="Where pictures and report go.", metavar="FOLDER")
    ] = Path("plots"),
) -> None:
    """Draws runs of fastattn bench: PNG files, and report.html, which opens without a network.

    Exit code 0, or 2 when a file holds no results or matplotlib is missing.
    """
    try:
        names = [path.stem for path in results]
        if len(set(names)) < len(names):
            raise ValueError(f"files need names that differ, got {', '.join(map(str, results))}")
        runs = [drawn(path) for path in results]
        folder.mkdir(parents=True, exist_ok=True)
        for name, _, pngs in runs:
            for title, data in pngs:
                (folder / f"{name}-{title}.png").write_bytes(data)
        (folder / "report.html").write_text(report(runs), encoding="utf-8")
    except (ValueError, OSError) as error:
        typer.echo(f"fastattn plot: {error}", err=True)
        raise typer.Exit(2) from None
    count = sum(len(pngs) for _, _, pngs in runs)
    typer.echo(f"fastattn plot: {count} pictures and report.html in {folder}", err=True)


def drawn(path: Path) -> Run:
    found = read_checks(path) or read(path)
    need_matplotlib()
    draw = pictures(found) if isinstance(found, Results) else {"accuracy": partial(accuracy, found)}
    return path.stem, found, [(title, make()) for title, make in draw.items()]
