"""The commands of `fastattn`, a file each. Results on stdout, everything else on stderr."""

from __future__ import annotations

import typer

from .autotune import autotune
from .bench import bench
from .compile import compile_
from .gpu import gpu
from .info import info
from .plot import plot
from .verify import verify

app = typer.Typer(
    help="Fused attention, normalisation, softmax and cross-entropy for PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(info)
app.command()(verify)
app.command()(bench)
app.command()(plot)
app.command("compile")(compile_)
app.command()(autotune)
app.command()(gpu)
