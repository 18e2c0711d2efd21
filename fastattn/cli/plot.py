"""fastattn plot: runs of fastattn bench as pictures and one HTML report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bench import read
from ..bench.pictures import pictures
from ..bench.report import report


def plot(
    results: Annotated[list[Path], typer.Argument(help="Files of fastattn bench --save.")],
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
        runs = [
            (path.stem, found, list(pictures(found))) for path in results for found in [read(path)]
        ]
        folder.mkdir(parents=True, exist_ok=True)
        for name, _, drawn in runs:
            for title, data in drawn:
                (folder / f"{name}-{title}.png").write_bytes(data)
        (folder / "report.html").write_text(report(runs), encoding="utf-8")
    except (ValueError, OSError) as error:
        typer.echo(f"fastattn plot: {error}", err=True)
        raise typer.Exit(2) from None
    count = sum(len(drawn) for _, _, drawn in runs)
    typer.echo(f"fastattn plot: {count} pictures and report.html in {folder}", err=True)
