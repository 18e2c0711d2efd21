"""fastattn compile: every GPU kernel compiled without a GPU, and what the compilers made of it."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..emulate import cuda_code, offline
from ..emulate.offline import Compiled, Job
from .parts import read_part, write_part
from .progress import progress

CAPTION = (
    "Compiled only: nothing here was timed or run. From `spills` on, counts are of one turn of the main "
    "loop. Cycles are estimated from rates in data sheets, for 64 x 64 scores on one multiprocessor: they "
    "rank configurations and are no measurement."
)
CUDA_CAPTION = (
    "Compiled only: nothing here was timed or run. From `tensor cores` on, counts are of the main loop, or "
    "of the whole kernel where it has no tensor cores; spills and 16-byte accesses are of the whole."
)
WIDTH = 180  # of a table that no terminal shows
MARKDOWN = (
    "target", "kernel", "D", "blocks", "registers", "spills", "shared KiB", "tensor memory",
    "tensor cores", "copies", "cycles",
)  # fmt: skip


def compile_(
    backend: Annotated[
        str, typer.Option(help="Whose kernels: triton, or cuda, which needs nvcc.")
    ] = "triton",
    target: Annotated[
        str | None, typer.Option(help="Targets, separated by commas; else all of the backend's.")
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="Only these operators, e.g. attention_fwd,norm_bwd.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help=f"Of {', '.join(offline.DTYPES)}, separated by commas.")
    ] = ",".join(offline.DTYPES),
    quick: Annotated[
        bool, typer.Option("--quick", help="Attention in bf16 with heads of 64 and 128.")
    ] = False,
    form: Annotated[
        str | None, typer.Option(help=f"Only these calls, of {', '.join(offline.ATTENTION_FORMS)}.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Write what was found there, as budgets.", metavar="FILE")
    ] = None,
    readme: Annotated[
        Path | None,
        typer.Option(help="Write attention's main loops into this README.", metavar="FILE"),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout, all else on stderr.")
    ] = False,
) -> None:
    """Compiles the GPU kernels for GPUs that need not be here, and checks what came out.

    Registers, spills, memory and the instructions of each main loop, against committed budgets. Exit
    code 0 when all compile and keep to them, 1 when one does not, 2 when the command is wrong.
    """
    try:
        known("backend", backend, ("triton", "cuda"))
        if backend == "cuda":
            raise typer.Exit(compile_cuda(target, kernel, record, as_json))
        targets = known("target", target or ",".join(offline.TARGETS), offline.TARGETS)
        dtypes = known("dtype", dtype, offline.DTYPES)
        everything = offline.jobs(dtypes=dtypes, quick=quick)
        names = sorted({job.operator for job in everything})
        operators = known("kernel", kernel, names) if kernel else names
        forms = known("form", form, offline.ATTENTION_FORMS) if form else None
        version = importlib.metadata.version("triton")
        if readme:
            read_part(readme, "compiled")
    except importlib.metadata.PackageNotFoundError:
        typer.echo(
            "fastattn compile: Triton is not installed: pip install 'fastattn[triton]'", err=True
        )
        raise typer.Exit(2) from None
    except (ValueError, OSError) as error:
        typer.echo(f"fastattn compile: {error}", err=True)
        raise typer.Exit(2) from None
    wanted = [job for job in everything if job.operator in operators]
    wanted = [job for job in wanted if forms is None or job.form in forms]
    with progress(60) as tell:
        rows = offline.compile_all(targets, wanted, tell)
    wrong = offline.broken(rows, offline.budgets(), version)
    if record:
        record.write_text(offline.as_text(offline.recorded(rows, version)))
    if readme:
        write_part(readme, "compiled", as_markdown(rows))
    if as_json:
        print(
            json.dumps(
                {"triton": version, "kernels": [as_dict(r) for r in rows], "wrong": wrong}, indent=2
            )
        )
    else:
        show(rows)
    console = Console(stderr=as_json, soft_wrap=True, highlight=False)
    for sentence in wrong:
        console.print(f"wrong: {sentence}", markup=False)
    failed = sum(bool(r.error) for r in rows)
    console.print(
        f"fastattn compile: {len(rows) - failed} compiled, {failed} failed, "
        f"{len(wrong) - failed} over budget, Triton {version}"
    )
    raise typer.Exit(1 if wrong else 0)


def compile_cuda(target: str | None, kernel: str | None, record: Path | None, as_json: bool) -> int:
    """The same of csrc/cuda. kernel: the stems of its files. Returns the exit code."""
    targets = known("target", target or ",".join(cuda_code.TARGETS), cuda_code.TARGETS)
    stems = cuda_code.sources()
    if cuda_code.nvcc() is None:
        raise ValueError("backend cuda needs nvcc, and there is none on PATH or in CUDA_HOME")
    wanted = known("kernel", kernel, stems) if kernel else stems
    with progress(60) as tell:
        rows = cuda_code.compile_all(targets, wanted, tell)
    wrong = cuda_code.broken(rows, cuda_code.budgets())
    if record:
        record.write_text(cuda_code.as_text(cuda_code.recorded(rows)))
    if as_json:
        found = [row._asdict() for row in rows]
        print(
            json.dumps(
                {"nvcc": cuda_code.nvcc_version(), "kernels": found, "wrong": wrong}, indent=2
            )
        )
    else:
        show_cuda(rows)
    console = Console(stderr=as_json, soft_wrap=True, highlight=False)
    for sentence in wrong:
        console.print(f"wrong: {sentence}", markup=False)
    console.print(
        f"fastattn compile: {len(rows)} CUDA kernels compiled, {len(wrong)} budgets not kept, "
        f"nvcc {cuda_code.nvcc_version()}"
    )
    return 1 if wrong else 0


def show_cuda(rows: Sequence[cuda_code.Kernel]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    for target in dict.fromkeys(row.target for row in rows):
        table = Table(title=target, caption=CUDA_CAPTION)
        table.add_column("kernel", no_wrap=True)
        heads = (
            "registers", "stack", "spills", "16-byte", "tensor cores", "copies", "LDSM", "MUFU", "FP32",
            "all",
        )  # fmt: skip
        for head in heads:
            table.add_column(head, justify="right")
        for row in rows:
            if row.target == target:
                table.add_row(row.name, *(str(n) for n in row[2:]))
        console.print(table)


def known(option: str, given: str, names: Sequence[str]) -> list[str]:
    found = [name.strip() for name in given.split(",") if name.strip()]
    for name in found:
        if name not in names:
            raise ValueError(f"{option} must be of {', '.join(names)}, got {name!r}")
    if not found:
        raise ValueError(f"{option} names nothing, of {', '.join(names)}")
    return found


def as_dict(row: Compiled) -> dict[str, object]:
    return {**row._asdict(), "job": row.job._asdict()}


def show(rows: Sequence[Compiled]) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    for target in dict.fromkeys(row.target for row in rows):
        table = Table(title=target, caption=CAPTION)
        for head in ("kernel", "call", "blocks"):
            table.add_column(head, no_wrap=True)
        for head in (
            "registers", "stack", "shared", "tensor memory", "spills", "tensor cores", "copies", "MUFU",
            "FP32", "barriers", "all", "cycles",
        ):  # fmt: skip
            table.add_column(head, justify="right")
        for row in rows:
            if row.target == target:
                table.add_row(row.kernel.removesuffix("_kernel"), call(row.job), *cells(row))
        console.print(table)


def as_markdown(rows: Sequence[Compiled]) -> str:
    """A line a main loop of products; the word for a call is left to the text around it."""
    lines = ["| " + " | ".join(MARKDOWN) + " |", "|---|---|" + "---:|" * (len(MARKDOWN) - 2)]
    for row in rows:
        if row.kernel in offline.PRODUCTS and not row.error:
            name = row.kernel.removeprefix("attention_").removesuffix("_kernel")
            found = (
                row.target, name, row.job.width, row.config, row.registers, row.loop["local"],
                f"{row.shared / 1024:.0f}", row.tensor_memory or "", counted(row.mma), counted(row.copies),
                f"{row.cycles:.0f}",
            )  # fmt: skip
            lines.append("| " + " | ".join(map(str, found)) + " |")
    return "\n".join(lines)


def call(job: Job) -> str:
    return f"{job.dtype} {job.width} {job.form}".strip()


def cells(row: Compiled) -> list[str]:
    if row.error:
        return ["[red]failed[/red]"]
    spills = row.loop["local"]
    return [
        row.config, str(row.registers), str(row.stack), str(row.shared), str(row.tensor_memory or ""),
        f"[red]{spills}[/red]" if spills else "0",
        counted(row.mma), counted(row.copies),
        *(str(row.loop[kind]) for kind in ("special", "fp32", "barrier", "total")),
        f"{row.cycles:.0f}" if row.cycles else "",
    ]  # fmt: skip


def counted(found: dict[str, int]) -> str:
    return " ".join(f"{n} {name}" for name, n in found.items())
