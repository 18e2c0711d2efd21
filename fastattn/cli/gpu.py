"""fastattn gpu (make gpu): all that there is to do on the day when a GPU is at hand, in one command."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import registry
from ..bench.results import about
from ..kernels import native
from ..kernels.triton import tune
from ..verify import CASES
from .autotune import known_gpu
from .stages import SECONDS, Command, Outcome, Stage, run_stages
from .verify import NAMED

ROOT = Path(__file__).parents[2]
CHECKOUT = (ROOT / "setup.py").is_file() and (ROOT / "tests").is_dir()
PYTHON = (sys.executable,)


def gpu(
    device: Annotated[str, typer.Option(help="The GPU.")] = "cuda",
    minutes: Annotated[float, typer.Option(help="For everything together.", min=0.1)] = 7.5,
    folder: Annotated[
        Path | None,
        typer.Option("--to", help="Else results/gpu-NAME.", metavar="FOLDER"),
    ] = None,
) -> None:
    """Tests, verifies, tunes and measures on this GPU, and leaves what is to be committed.

    In a folder: log.txt, summary.json, junit.xml, verify.json, bench.json and the tables that were
    measured. Stages have processes and time of their own; where one fails the next goes on. Needs no
    network. Exit code 0; 1 when a stage failed or had to be stopped; 2 when there is no GPU.
    """
    try:
        known_gpu(device)
    except ValueError as error:
        typer.echo(f"fastattn gpu: {error}", err=True)
        raise typer.Exit(2) from None
    facts = about(device, quick=False) | {"target": tune.target()}
    folder = folder or Path("results") / f"gpu-{slug(facts['device'])}"
    folder.mkdir(parents=True, exist_ok=True)
    folder, building = folder.absolute(), build(device)
    stages = plan(device, folder, judged(building), building)
    found = run_all(stages, folder, 60 * minutes, facts)
    raise typer.Exit(1 if any(o.state in ("failed", "stopped") for o in found) else 0)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---- the stages ---------------------------------------------------------------------------------


def plan(
    device: str,
    folder: Path,
    backends: Sequence[str],
    building: Stage,
    python: Sequence[str] = PYTHON,
) -> list[Stage]:
    """In order. Weights are about the seconds that each should need on a machine of 16 processors."""
    fastattn = (*python, "-m", "fastattn")
    measure = (*fastattn, "bench", "--device", device, "--seconds", SECONDS, "--save")
    tables = ("blocks", "backends") if "cuda" in backends else ("blocks",)
    tune = (*fastattn, "autotune", *tables, "--device", device, "--seconds", SECONDS)
    stages = [
        building,
        tests(device, folder, python),
        Stage("verify", 90, list(verifying(device, folder, backends, fastattn))),
        Stage("autotune", 110, [Command((*tune, "--save", str(folder)))]),
        Stage("bench", 100, [Command((*measure, str(folder / "bench.json"), "--no-energy"))]),
        # FlexAttention and torch.compile take 10 s and more a shape, energy 1 s and more a contestant
        Stage("bench-slow", 60, [
            Command((*measure, str(folder / "bench-slow.json"), "--compile", "attention", "norm"))
        ]),
    ]  # fmt: skip
    return [s._replace(commands=[here(c) for c in s.commands]) for s in stages]


def here(command: Command) -> Command:
    """Finds this package, wherever it lies, and Python's output at once in the log."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = (("PYTHONPATH", path), ("PYTHONUNBUFFERED", "1"))
    return command._replace(environment=(*own, *command.environment))


def build(device: str) -> Stage:
    """The CUDA kernels for this GPU alone, where they are not there and there is an nvcc."""
    if torch.version.hip or torch.device(device).type != "cuda":
        return Stage("build", 110, [], "the CUDA kernels are for NVIDIA's GPUs")
    major, minor = torch.cuda.get_device_capability(device)
    number = 10 * major + minor
    if runs_on(number):
        return Stage("build", 110, [], f"there are CUDA kernels for sm_{number} already")
    if not CHECKOUT:
        return Stage("build", 110, [], "there are no sources to build CUDA kernels from")
    if not (shutil.which("nvcc") or os.environ.get("CUDA_HOME")):
        return Stage("build", 110, [], "there is no nvcc: only Triton's kernels run")
    arch = max((a for a in ARCHITECTURES if a <= number), default=ARCHITECTURES[0])
    wanted = (("FASTATTN_BUILD_CUDA", "1"), ("FASTATTN_CUDA_ARCHS", str(arch)))
    words = (sys.executable, "setup.py", "build_ext", "--inplace")
    return Stage("build", 110, [Command(words, environment=wanted, folder=ROOT)])


ARCHITECTURES = (80, 90, 100, 120)  # that setup.py knows


def runs_on(number: int) -> bool:
    """Machine code runs on later minor versions of its major one; of the last there is PTX as well."""
    built = [int(a) for a in native.cuda_architectures()]
    same = any(a // 10 == number // 10 and a <= number for a in built)
    return same or (bool(built) and number > max(built))


def judged(building: Stage) -> tuple[str, ...]:
    """The backends that this GPU is going to have."""
    return ("triton", "cuda") if building.commands or native.cuda_architectures() else ("triton",)


def tests(device: str, folder: Path, python: Sequence[str]) -> Stage:
    """What the kernels are held to beside the table of cases, which is verify's."""
    reason = None
    if importlib.util.find_spec("pytest") is None:
        reason = "pytest is not installed"
    elif not CHECKOUT:
        reason = "an installed package has no tests"
    # they compile most of the time
    beside = ("-n", str(min(8, processes()))) if importlib.util.find_spec("xdist") else ()
    words = (
        *python, "-m", "pytest", *beside, str(ROOT / "tests/kernels"), "--rootdir", str(ROOT),
        "--device", device, "-m", "not slow", "-k", "not test_case", "-W", "default",
        "-p", "no:cacheprovider", "--seconds", SECONDS, "--junitxml", str(folder / "junit.xml"),
    )  # fmt: skip
    return Stage("tests", 70, [Command(words)], reason)


def verifying(
    device: str, folder: Path, backends: Sequence[str], fastattn: Sequence[str]
) -> Iterator[Command]:
    """A process a backend, dtype and half of the cases: they compile side by side, and one that loses the
    GPU loses it for itself alone."""
    others = sorted({case.operator for case in CASES} - {"attention"})
    halves = {"attention": ["attention"], "others": others}
    for backend, dtype, half in itertools.product(backends, NAMED, halves):
        which = ["--backend", backend, "--dtype", dtype]
        which += [word for name in halves[half] for word in ("--operator", name)]
        words = (*fastattn, "verify", "--device", device, *which, "--seconds", SECONDS, "--json")
        yield Command(words, folder / f"verify-{backend}-{dtype}-{half}.json")


# ---- running them -------------------------------------------------------------------------------


def processes() -> int:
    """Side by side, with something left for the GPU's driver."""
    return max(1, (os.cpu_count() or 1) - 2)


def run_all(
    stages: Sequence[Stage], folder: Path, seconds: float, facts: dict[str, Any]
) -> list[Outcome]:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    say = lambda text: console.print(text, markup=False)  # noqa: E731
    say(f"fastattn gpu: {facts['device']}, {facts['target']}, results in {folder}")
    (folder / "log.txt").write_text("")
    found: list[Outcome] = []
    for outcome in run_stages(stages, folder / "log.txt", seconds, say, processes()):
        found.append(outcome)
        say(f"{outcome.stage}: {outcome.state}, {outcome.seconds:.0f} s. {outcome.detail}")
        join_reports(folder)
        record = {**facts, "stages": [o._asdict() for o in found]}
        (folder / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    summary(found, folder, commit_tables(folder, facts["target"]))
    return found


def join_reports(folder: Path) -> None:
    """Those of verify, a process each, as one of the same form, which fastattn plot reads."""
    paths = sorted(folder.glob("verify-*.json"))
    if not paths:
        return
    joined: dict[str, Any] = {name: [] for name in ("operators", "models", "failures")}
    for path in paths:
        try:
            report = json.loads(path.read_text())
        except ValueError:  # of a process that was stopped
            report = {"failed": 1, "failures": [f"{path.stem}: it wrote no report"]}
        for name, found in report.items():
            adds = isinstance(found, list) or name in COUNTS
            joined[name] = joined.get(name, 0) + found if adds else found
        path.unlink()
    (folder / "verify.json").write_text(json.dumps(joined, indent=1) + "\n")


COUNTS = ("passed", "failed", "declined", "not_reached", "seconds")


def commit_tables(folder: Path, target: str) -> list[Path]:
    """Puts what was measured where the library reads it; the copies in this checkout."""
    names = (tune.table_name(target), registry.backends_name(target))
    there = [folder / name for name in names if (folder / name).is_file()]
    if not CHECKOUT or not there:
        return []
    tune.MEASURED.mkdir(exist_ok=True)
    return [Path(shutil.copy(path, tune.MEASURED)) for path in there]


def summary(found: Sequence[Outcome], folder: Path, tables: Sequence[Path]) -> None:
    table = Table("stage", "state", "s", "last words", title="fastattn gpu")
    for o in found:
        table.add_row(o.stage, o.state, f"{o.seconds:.0f}", o.detail)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(table, markup=False)
    say = lambda text: console.print(text, markup=False, soft_wrap=True)  # noqa: E731
    say(f"to commit: git add {' '.join(map(str, (folder, *tables)))}")
    if any(path.name.startswith("tune-") for path in tables):
        say("and, for blocks that changed: fastattn compile --record fastattn/emulate/budgets.json")
    count = {state: sum(o.state == state for o in found) for state in STATES}
    say("fastattn gpu: " + ", ".join(f"{n} {state}" for state, n in count.items()))


STATES = ("passed", "failed", "stopped", "left out")
