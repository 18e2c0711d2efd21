"""Commands one after the other, each in processes of its own and within its share of the time: one that
fails, crashes or hangs is named, and the next ones run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

# Of a stage's time is what its command is told; then it has time to write what it found.
OWN_TIME = 0.8
SECONDS = "{seconds}"  # in a command: that time


class Command(NamedTuple):
    """output: a file for what it prints, which else goes to the log like what it says on stderr."""

    words: Sequence[str]
    output: Path | None = None
    environment: tuple[tuple[str, str], ...] = ()
    folder: Path | None = None  # where it runs


class Stage(NamedTuple):
    """weight: the share of the time that is left, among those of the stages from this one on. Commands
    run side by side, as many as there are processors for. left_out: why it does not run here."""

    name: str
    weight: float
    commands: Sequence[Command]
    left_out: str | None = None


class Outcome(NamedTuple):
    stage: str
    state: str  # passed, failed, stopped or left out
    seconds: float
    detail: str = ""


def run_stages(
    stages: Sequence[Stage], log: Path, seconds: float, tell: Callable[[str], None], beside: int
) -> Iterator[Outcome]:
    """All of them within `seconds`. beside: how many commands of a stage may run side by side."""
    end = time.monotonic() + seconds
    for at, stage in enumerate(stages):
        if stage.left_out:
            yield Outcome(stage.name, "left out", 0.0, stage.left_out)
            continue
        weights = [s.weight for s in stages[at:] if not s.left_out]
        budget = (end - time.monotonic()) * stage.weight / sum(weights)
        tell(f"{stage.name}: at most {budget:.0f} s")
        yield run_stage(stage, log, budget, beside)


def run_stage(stage: Stage, log: Path, budget: float, beside: int) -> Outcome:
    start, count = time.monotonic(), len(stage.commands)
    workers = max(1, min(count, beside))
    each = budget / -(-count // workers)  # as many turns as it takes
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(lambda command: run(command, each), stage.commands))
    with log.open("a") as file:
        for command, (_, said) in zip(stage.commands, found, strict=True):
            file.write(f"==== {stage.name}: {' '.join(command.words)}\n{said}\n")
    codes = [code for code, _ in found]
    wrong = [(code, said) for code, said in found if code != 0]
    seconds = time.monotonic() - start
    if not wrong:
        return Outcome(stage.name, "passed", seconds, last_line(found[-1][1]))
    code, said = wrong[0]
    if code is None:
        return Outcome(stage.name, "stopped", seconds, f"after {each:.0f} s: {last_line(said)}")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    many = f", {len(wrong)} of {count} commands" if count > 1 and len(codes) > 1 else ""
    return Outcome(stage.name, "failed", seconds, f"{how}{many}: {last_line(said)}")


def run(command: Command, seconds: float) -> tuple[int | None, str]:
    """The exit code, or None where it was stopped; and what it said."""
    words = [word.replace(SECONDS, f"{OWN_TIME * seconds:.0f}") for word in command.words]
    environment = {**os.environ, **dict(command.environment)}
    with contextlib.ExitStack() as files:
        output = files.enter_context(command.output.open("w")) if command.output else None
        try:
            process = subprocess.Popen(
                words, env=environment, text=True, errors="replace", stdin=subprocess.DEVNULL,
                stdout=output or subprocess.PIPE, start_new_session=True,
                stderr=subprocess.PIPE if output else subprocess.STDOUT, cwd=command.folder,
            )  # fmt: skip
        except OSError as error:
            return 127, str(error)
        try:
            out, err = process.communicate(timeout=seconds)
            return process.returncode, (err if output else out) or ""
        except subprocess.TimeoutExpired:
            # its own children too: a compiler, a worker that holds the GPU
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            return None, (err if output else out) or ""


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
