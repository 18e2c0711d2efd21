"""How far a long command is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

EVERY = 20.0  # seconds from one line of a log to the next


@contextlib.contextmanager
def progress(width: int) -> Iterator[Callable[[str, float], None]]:
    """Gives a function of what is being done, shown `width` characters wide, and of the share done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lines()
        return
    columns = (TextColumn(f"{{task.description:{width}}}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def lines() -> Callable[[str, float], None]:
    last = time.monotonic()

    def tell(what: str, share: float) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(f"{share:4.0%}  {what}", file=sys.stderr, flush=True)

    return tell
