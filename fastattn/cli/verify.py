"""fastattn verify: runs the checks with a progress bar, prints tables, closes with one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import registry
from ..verify import DTYPES, ModelReport, Report, run_verify
from .progress import progress

NAMED = {str(d).removeprefix("torch."): d for d in DTYPES}


def verify(
    quick: Annotated[bool, typer.Option("--quick", help="Every fourth case, no models.")] = False,
    backend: Annotated[
        list[str] | None, typer.Option(help="Only this backend; may repeat.")
    ] = None,
    operator: Annotated[
        list[str] | None, typer.Option(help="Only this operator; may repeat.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(NAMED)}; may repeat.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where tensors lie; on the CPU, GPU kernels are emulated.")
    ] = "cpu",
    text: Annotated[
        str | None, typer.Option(help="Text to train on; else Python's documentation.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="End after so long, without models; says what is left.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout, all else on stderr.")
    ] = False,
) -> None:
    """Proves every operator, BERT and GPT-2 against fp64 and naive PyTorch on this machine.

    Exit code 0 when all is right, 1 when anything is wrong, 2 when the command is.
    """
    try:
        dtypes = [known_dtype(name) for name in dtype or NAMED]
        for name in backend or ():
            registry.check_name("verify", name)
        known_device(device)
        if text is not None and not Path(text).is_file():
            raise ValueError(f"there is no file {text}")
        with progress(45) as tell:
            report = run_verify(
                operators=operator or [], backends=backend or [], dtypes=dtypes, quick=quick,
                text=text, device=device, seconds=seconds, progress=tell,
            )  # fmt: skip
    except ValueError as error:
        sentence = str(error).removeprefix("verify: ")
        typer.echo(f"fastattn verify: {sentence}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        print(json.dumps(report.as_json(), indent=2, allow_nan=False))
    else:
        show(report, dtypes)
    console = Console(stderr=as_json, soft_wrap=True, highlight=False)
    for sentence in report.failures:
        console.print(f"wrong: {sentence}", markup=False)
    counts = ", ".join(f"{n} {what}" for what, n in report.counts.items())
    left = f", {report.unreached} not reached" if report.unreached else ""
    console.print(f"fastattn verify: {counts}{left}, {report.seconds:.0f} s")
    raise typer.Exit(1 if report.counts["failed"] or not report.counts["passed"] else 0)


def known_dtype(name: str) -> torch.dtype:
    if name not in NAMED:
        raise ValueError(f"dtype must be one of {', '.join(NAMED)}, got {name!r}")
    return NAMED[name]


def known_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from None


def show(report: Report, dtypes: list[torch.dtype]) -> None:
    console = Console(highlight=False)
    table = Table(
        "operator", "feature", "backend", title="worst error over allowance: outputs / gradients"
    )
    for dtype in dtypes:
        table.add_column(str(dtype).removeprefix("torch."), justify="right")
    for (operator, feature, backend), row in report.rows().items():
        cells = [mark(*row[d]) if d in row else "" for d in dtypes]
        table.add_row(operator, feature, backend, *cells)
    console.print(table)
    declined = {(v.backend, v.declined) for v in report.verdicts if v.declined}
    for name, sentence in sorted(declined, key=str):
        console.print(f"declined by {name}: {sentence}", markup=False)
    for model in report.models:
        show_model(console, model)


def mark(output: float, gradient: float) -> str:
    cell = f"{output:.2f} / {gradient:.2f}"
    return f"[red]{cell}[/red]" if max(output, gradient) > 1 else cell


def show_model(console: Console, model: ModelReport) -> None:
    table = Table(
        "", "fused", "naive", title=f"{model.name}, {model.parameters / 1e6:.1f} M parameters"
    )
    for name, error in (
        ("logits", model.logits_error),
        ("loss", model.loss_error),
        (f"gradients (worst: {model.worst_gradient})", model.gradient_error),
    ):
        table.add_row(f"{name}: error over allowance", f"{error:.2f}", "")
    first, last = ([model.losses[f][i] for f in ("fused", "naive")] for i in (0, -1))
    table.add_row("loss at the first step", *(f"{x:.4f}" for x in first))
    table.add_row(f"loss after {len(model.losses['fused'])} steps", *(f"{x:.4f}" for x in last))
    for name, seconds in (
        ("forward", model.forward_seconds),
        ("forward and backward", model.step_seconds),
    ):
        table.add_row(f"{name}, ms", *(f"{1e3 * seconds[f]:.0f}" for f in ("fused", "naive")))
    table.add_row(
        "memory of a step, MB", *(f"{model.step_bytes[f] / 1e6:.0f}" for f in ("fused", "naive"))
    )
    console.print(table)
    console.print(plot(model.losses), markup=False)
    console.print(f"largest relative difference of the two curves: {model.curve_difference:.1e}\n")


def plot(losses: dict[str, list[float]], height: int = 8) -> str:
    """Both curves over each other: f fused, n naive, * where they coincide."""
    low, high = (f(min(c) if f is min else max(c) for c in losses.values()) for f in (min, max))
    step = (high - low) / (height - 1) or 1.0
    lines = []
    for level in range(height - 1, -1, -1):
        cells = ""
        for fused, naive in zip(losses["fused"], losses["naive"], strict=True):
            here = [round((x - low) / step) == level for x in (fused, naive)]
            cells += "*" if all(here) else "f" if here[0] else "n" if here[1] else " "
        lines.append(f"{low + level * step:8.3f} |{cells}")
    return "\n".join(
        [*lines, " " * 9 + "+" + "-" * len(losses["fused"]) + "  loss over steps; * both"]
    )
