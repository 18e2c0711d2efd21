"""fastattn autotune: the fastest blocks for Triton's kernels on this GPU, and whether cuda or triton
serves a call, into tables that later processes read."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import bench, registry
from ..bench import backends as rivals
from ..bench.backends import Compared
from ..bench.ceiling import device_clock
from ..emulate import ahead
from ..kernels.triton import tune
from .progress import progress
from .verify import known_device, known_dtype

TABLES = ("blocks", "backends")
SHARE = {"blocks": 0.7, "backends": 1.0}  # of the time that is left when a table is begun
AHEAD = 0.4  # of the blocks' time: for compiling


def autotune(
    table: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(TABLES)}; else both.")
    ] = None,
    device: Annotated[str, typer.Option(help="The GPU.")] = "cuda",
    dtype: Annotated[
        list[str] | None, typer.Option(help="May repeat; else bfloat16 and float32.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="bfloat16, heads of 64 and 128; small sizes.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="End after so long; what was found until then is kept.", min=1)
    ] = 300.0,
    save: Annotated[
        Path | None,
        typer.Option(help="Write the tables there too: fastattn/measured is what is committed."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout, all else on stderr.")
    ] = False,
) -> None:
    """Times the kernels on this GPU, and writes what was fastest into your cache folder.

    blocks: configurations of Triton's attention, each with results that agree with those of the one it
    replaces. backends: whether cuda or triton goes first, an operator at a time. Both change the order of
    sums, and so the last bits of results. Exit code 0; 1 when nothing could be timed; 2 when the command
    is wrong or there is no GPU.
    """
    try:
        wanted = known_tables(table or TABLES)
        known_gpu(device)
        names = dtype or (["bfloat16"] if quick else ["bfloat16", "float32"])
        dtypes = [known_dtype(name) for name in names]
        found = run_autotune(wanted, device, dtypes, quick, seconds, save)
    except ValueError as error:
        typer.echo(f"fastattn autotune: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        show(found)
    console = Console(stderr=as_json, soft_wrap=True, highlight=False)
    changed = sum(row["before"] != row["after"] for row in found["blocks"])
    console.print(
        f"fastattn autotune: {len(found['blocks'])} rows of blocks, {changed} changed, "
        f"{len(found['backends'])} of backends, {found['seconds']:.0f} s, in {found['folder']}"
    )
    raise typer.Exit(0 if any(row["after"] for row in found["blocks"]) or found["backends"] else 1)


def known_tables(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in TABLES:
            raise ValueError(f"table must be one of {', '.join(TABLES)}, got {name!r}")
    return [name for name in TABLES if name in names]


def known_gpu(device: str) -> None:
    """Raises ValueError, in one sentence, where this is no GPU that can be used."""
    if torch.device(device).type == "cpu":
        raise ValueError(f"device must be a GPU, got {device!r}")
    known_device(device)
    if importlib.util.find_spec("triton") is None:
        raise ValueError("Triton is not installed: pip install 'fastattn[triton]'")


def run_autotune(
    wanted: Sequence[str], device: str, dtypes: Sequence[torch.dtype], quick: bool, seconds: float,
    save: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """As JSON has it."""
    start = time.monotonic()
    folders = [tune.cache_folder(), *([save] if save else [])]
    about = {"target": tune.target(), "where": where(device), "folder": str(folders[-1])}
    found: dict[str, Any] = {**about, "blocks": [], "backends": []}
    for name in wanted:
        left = (seconds - (time.monotonic() - start)) * (SHARE[name] if len(wanted) > 1 else 1.0)
        run = blocks if name == "blocks" else backends
        found[name] = run(device, dtypes, quick, left, folders, about)
    return found | {"seconds": time.monotonic() - start}


def where(device: str) -> str:
    """Of a table's rows."""
    kind = torch.device(device).type
    name = "a CPU" if kind == "cpu" else torch.get_device_module(kind).get_device_name(device)
    versions = ", ".join(f"{x} {importlib.metadata.version(x)}" for x in ("torch", "triton"))
    return f"{name}, {versions}, {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"


def blocks(
    device: str, dtypes: Sequence[torch.dtype], quick: bool, seconds: float, folders: Sequence[Path],
    about: dict[str, str],
) -> list[dict[str, Any]]:  # fmt: skip
    from ..kernels.triton import autotune as tuner

    heads = tuner.HEADS[:2] if quick else tuner.HEADS
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    with progress(45) as tell:
        tell("compiling", 0.0)
        spent = ahead.compile_ahead(about["target"], names, heads, AHEAD * seconds)
        rows = tuner.autotune(
            device, dtypes=dtypes, head_dims=heads, seconds=seconds - spent, where=about["where"],
            paths=[folder / tune.table_name(about["target"]) for folder in folders[1:]], progress=tell,
        )  # fmt: skip
    return [
        {
            "row": str(row.key), "before": list(row.before),
            "after": list(row.after) if row.milliseconds < float("inf") else None,
            "milliseconds_before": finite(row.milliseconds_before),
            "milliseconds": finite(row.milliseconds), "refused": list(row.refused),
        }
        for row in rows
    ]  # fmt: skip


def finite(x: float) -> float | None:
    return x if x < float("inf") else None


def backends(
    device: str, dtypes: Sequence[torch.dtype], quick: bool, seconds: float, folders: Sequence[Path],
    about: dict[str, str],
) -> list[dict[str, Any]]:  # fmt: skip
    chosen = bench.in_turns(rivals.workloads(device, dtypes, quick))
    clock = device_clock(device)
    measure = lambda workload, budget: bench.measured(workload, clock, budget)  # noqa: E731
    with progress(45) as tell:
        found: list[Compared] = rivals.compare_backends(chosen, measure, seconds, tell)
    for folder in folders if found else []:
        path = folder / registry.backends_name(about["target"])
        rows = {**registry.read_backends(path), **rivals.as_rows(found)}
        rows.pop("where", None)
        tune.write_rows(path, rows, about["where"])
    registry.measured.cache_clear()
    return [c._asdict() for c in found]


def show(found: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(f"{found['target']}: {found['where']}")
    if found["blocks"]:
        table = Table("row", "before", "after", title="blocks: block_m, block_n, warps, stages")
        for head in ("ms before", "ms", "refused"):
            table.add_column(head, justify="right")
        for row in found["blocks"]:
            times = (shown(row[name]) for name in ("milliseconds_before", "milliseconds"))
            configs = (row["before"], row["after"] or "does not run")
            table.add_row(row["row"], *map(str, configs), *times, str(len(row["refused"])))
        console.print(table)
    if found["backends"]:
        table = Table(
            "row", "goes first", "cuda's time over triton's", "workloads", title="backends"
        )
        for row in found["backends"]:
            longer = shown(row["cuda_over_triton"])
            table.add_row(row["row"], row["first"], longer, str(row["workloads"]))
        console.print(table)
    for row in [*found["blocks"], *found["backends"]]:
        for sentence in row.get("refused", row.get("reasons", ())):
            console.print(f"{row['row']}: {sentence}", markup=False, soft_wrap=True)


def shown(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}"
