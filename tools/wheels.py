"""One wheel, tried under every Python and every torch that installs here: a table of what passed.

    python tools/wheels.py                                  # each Python and each torch that there is
    python tools/wheels.py --python 3.11,3.14 --torch 2.10.0,2.13.0

A cell is a fresh virtual environment: that torch, the wheel, then away from the sources `fastattn verify
--quick` on the CPU kernels, and a forward and backward of attention. What does not install is a cell too,
with the installer's reason. Minutes and gigabytes a cell: environments are deleted one by one, and --save
lets a run go on where another stopped. uv installs where it is on PATH, since it links what environments
share; else pip does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

SOURCES = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
OLDEST_TORCH = (2, 10)
VERIFY = ("-m", "fastattn", "verify", "--quick", "--backend", "cpu", "--json")
# the rule of fastattn/verify/judge.py, for fp32
ATTENTION = """
import torch, fastattn

def gradients(dtype, backend):
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 33, 64).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    fastattn.attention(*inputs, causal=True, backend=backend).square().sum().backward()
    return [x.grad.double() for x in inputs]

exact, plain = gradients(torch.float64, "reference"), gradients(torch.float32, "reference")
for x64, x32, ours in zip(exact, plain, gradients(torch.float32, "cpu")):
    allowed = 2 * (x32 - x64).abs().max() + 2e-6 * x64.abs().max().clamp(min=1)
    error = (ours - x64).abs().max()
    assert error <= allowed, f"attention: gradient off by {error:.1e}, {allowed:.1e} is allowed"
"""


class Cell(NamedTuple):
    """passed and failed: checks of verify. reason: why there are none, or none more."""

    python: str
    torch: str
    installed: bool
    passed: int = 0
    failed: int = 0
    reason: str = ""
    seconds: float = 0.0

    @property
    def wrong(self) -> bool:
        return self.installed and (not self.passed or bool(self.failed or self.reason))


def main(
    python: Annotated[
        str, typer.Option(help="Versions, or paths of interpreters; separated by commas.")
    ] = ",".join(PYTHONS),
    torch: Annotated[
        str | None, typer.Option(help="Versions; else the last of every minor from 2.10 on.")
    ] = None,
    wheel: Annotated[Path | None, typer.Option(help="A wheel; else one is built.")] = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Keeps every cell there, and tries none again that is there already."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on stdout, all else on stderr.")
    ] = False,
) -> None:
    """Tries one wheel of fastattn on every Python and every torch that installs here.

    Exit code 0 when all that installs passes, 1 when something does not, 2 when no wheel can be built.
    """
    with tempfile.TemporaryDirectory(prefix="fastattn-wheels-") as name:
        folder = Path(name)
        try:
            built = (wheel or build(folder)).resolve(strict=True)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            typer.echo(
                f"wheels: no wheel: {why(getattr(error, 'stderr', '') or str(error))}", err=True
            )
            raise typer.Exit(2) from None
        pythons = {name: interpreter(name) for name in python.split(",")}
        versions = torch.split(",") if torch else known_torches(pythons.values())
        cells = kept(save)
        for cell in try_all(pythons, versions, built, folder, cells):
            cells.append(cell)
            if save:
                save.write_text(as_text(cells))
    print(as_text(cells) if as_json else as_markdown(cells))
    tried, wrong = sum(c.installed for c in cells), sum(c.wrong for c in cells)
    tell(f"{tried - wrong} of {tried} environments passed, {len(cells) - tried} did not install")
    raise typer.Exit(1 if wrong else 0)


def kept(save: Path | None) -> list[Cell]:
    return [Cell(**c) for c in json.loads(save.read_text())] if save and save.exists() else []


def as_text(cells: Sequence[Cell]) -> str:
    return json.dumps([cell._asdict() for cell in cells], indent=2)


def tell(line: str) -> None:
    typer.echo(f"wheels: {line}", err=True)


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """PYTHONPATH would let the sources, or another environment, stand in for what was installed."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=cwd, env=environment
    )


# ---- what there is ------------------------------------------------------------------------------


def build(folder: Path) -> Path:
    """Against the torch of this interpreter, so that none is downloaded to compile against."""
    tell("building the wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, SOURCES).check_returncode()
    return next(folder.glob("fastattn-*.whl"))


def interpreter(name: str) -> str | None:
    """The path of Python `name`, if it starts: a shim may stand for a version that is not chosen."""
    path = name if os.sep in name else shutil.which(f"python{name}")
    return path if path and run(path, "-c", "import venv, ensurepip").returncode == 0 else None


def known_torches(pythons: Collection[str | None]) -> list[str]:
    """The last release of every minor that pip offers to one of them, oldest first."""
    last: dict[tuple[int, ...], tuple[int, ...]] = {}
    for python in filter(None, pythons):
        said = run(
            sys.executable, "-m", "pip", "--python", python, "index", "versions", "torch"
        ).stdout
        for found in re.findall(r"\b(\d+\.\d+\.\d+)(?=,|$)", said, re.MULTILINE):
            version = tuple(map(int, found.split(".")))
            if version[:2] >= OLDEST_TORCH:
                last[version[:2]] = max(version, last.get(version[:2], version))
    return [".".join(map(str, version)) for _, version in sorted(last.items())]


# ---- a cell -------------------------------------------------------------------------------------


def try_all(
    pythons: dict[str, str | None],
    versions: Sequence[str],
    wheel: Path,
    folder: Path,
    already: Sequence[Cell] = (),
) -> Iterator[Cell]:
    """A torch at a time, since its environments share the most."""
    done = {(cell.python, cell.torch) for cell in already}
    for version in versions:
        for name, path in pythons.items():
            if (name, version) not in done:
                start = time.perf_counter()
                with tempfile.TemporaryDirectory(dir=folder) as inside:
                    cell = try_one(name, path, version, wheel, Path(inside))
                seconds = time.perf_counter() - start
                tell(f"Python {name}, torch {version}: {seconds:.0f} s, {outcome(cell)}")
                yield cell._replace(seconds=round(seconds, 1))


def try_one(name: str, path: str | None, version: str, wheel: Path, folder: Path) -> Cell:
    cell = Cell(name, version, installed=False)
    if path is None:
        return cell._replace(reason=f"there is no Python {name} here")
    python = folder / "env" / "bin" / "python"
    steps = [(path, "-m", "venv", folder / "env"), install(python, f"torch=={version}"),
             install(python, str(wheel))]  # fmt: skip
    for step in steps:
        if (done := run(*step)).returncode:
            return cell._replace(reason=why(done.stderr))
    return check(cell._replace(installed=True), python, folder)


def install(python: Path, what: str) -> tuple[str | Path, ...]:
    """uv takes pip's index as PyPI's, and its own settings; pip takes pip's."""
    if shutil.which("uv"):
        return "uv", "pip", "install", "--quiet", "--python", python, what
    return python, "-m", "pip", "install", "--quiet", "--no-compile", what


def check(cell: Cell, python: Path, folder: Path) -> Cell:
    done = run(python, *VERIFY, cwd=folder)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        return cell._replace(reason=why(done.stderr))
    call = run(python, "-c", ATTENTION, cwd=folder)
    reason = why(call.stderr) if call.returncode else ""
    return cell._replace(passed=found["passed"], failed=found["failed"], reason=reason)


def why(said: str) -> str:
    """The sentence that matters: uv's cause, pip's last ERROR, or the last line."""
    text = said.strip()
    for mark in ("cause: ", "╰─▶ "):
        if mark in text:
            text = " ".join(text.split(mark)[-1].split("\n\n")[0].split())
            return re.split(r" and you require|, we can conclude", text)[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no word of it"]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return (errors or lines)[-1].removeprefix("ERROR: ")


# ---- the table ----------------------------------------------------------------------------------


def outcome(cell: Cell) -> str:
    if not cell.installed or not cell.passed:
        return cell.reason
    count = f"{cell.passed} passed" + (f", {cell.failed} failed" if cell.failed else "")
    return f"{count}; {cell.reason}" if cell.reason else count


def as_markdown(cells: Sequence[Cell]) -> str:
    """A line a Python, a column a torch; a number in place of a count has its reason beneath."""
    versions = sorted({cell.torch for cell in cells}, key=by_number)
    pythons = sorted({cell.python for cell in cells}, key=by_number)
    found = {(cell.python, cell.torch): cell for cell in cells}
    reasons = list(dict.fromkeys(outcome(cell) for cell in cells if cell.reason))

    def mark(cell: Cell | None) -> str:
        if cell is None:
            return "not tried"
        return f"({reasons.index(outcome(cell)) + 1})" if cell.reason else outcome(cell)

    lines = [f"| Python | torch {' | '.join(versions)} |", "|---|" + "---:|" * len(versions)]
    for python in pythons:
        row = [mark(found.get((python, version))) for version in versions]
        lines.append(f"| {python} | {' | '.join(row)} |")
    notes = [f"{at}. {reason}" for at, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes] if notes else lines)


def by_number(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version)]


if __name__ == "__main__":
    typer.run(main)
