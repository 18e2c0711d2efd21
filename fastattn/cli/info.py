"""fastattn info: versions, and what can run here."""

from __future__ import annotations

import json
import platform
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import __version__, backends, registry
from ..kernels import native


def gather() -> dict[str, Any]:
    built = registry.usable()["cpu"] is None
    return {
        "fastattn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "backends": [b._asdict() for b in backends()],
        "instruction_sets": [
            # one source makes every set, so each has every kernel
            {
                **i._asdict(),
                "in_use": i.name == native.isa(),
                "operators": registry.operators("cpu"),
            }
            for i in (native.isas() if built else [])
        ],
        "operators": {name: registry.operators(name) for name in registry.BACKENDS},
    }


def info(
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.")] = False,
) -> None:
    """Versions, backends and instruction sets, and why one is not usable."""
    found = gather()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = Console()
    console.print(
        f"fastattn {found['fastattn']}, torch {found['torch']}, Python {found['python']}, "
        f"{found['machine']}, {found['threads']} threads"
    )
    table = Table("backend", "usable", "what", "operators")
    for row in found["backends"]:
        names = ", ".join(found["operators"][row["name"]])
        table.add_row(row["name"], "yes" if row["usable"] else "no", row["detail"], names)
    console.print(table)
    table = Table("instruction set", "floats a vector", "on this processor", "in use", "operators")
    for row in found["instruction_sets"]:
        runs = "runs" if row["runs_here"] else "compiled only"
        same = row["operators"] == found["operators"]["cpu"]
        names = "all of the above" if same else ", ".join(row["operators"])
        table.add_row(row["name"], str(row["lanes"]), runs, "yes" if row["in_use"] else "", names)
    console.print(table)
