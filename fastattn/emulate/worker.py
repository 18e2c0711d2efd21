"""The interpreting process: reads calls from stdin, runs them, answers on stdout until stdin ends."""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import traceback
from typing import Any

import torch
from torch import Tensor

from . import Options, dumps, stored


def run(target: str, arguments: tuple[Any, ...], options: Options) -> Any:
    from . import interpreter

    module, name = target.split(":")
    with interpreter.hardened(options):
        return getattr(importlib.import_module(module), name)(*arguments)


def answer(target: str, arguments: tuple[Any, ...], options: Options) -> Any:
    """(result, error, {position: argument that was written to}): only names that end in _ may write."""
    before = {at: stored(x).clone() for at, x in enumerate(arguments) if isinstance(x, Tensor)}
    try:
        result = run(target, arguments, options)
    except Exception as error:
        return None, sendable(error), {}
    written = {
        at: arguments[at]
        for at, old in before.items()
        if not torch.equal(stored(arguments[at]), old)
    }
    if written and not target.endswith("_"):
        return None, RuntimeError(f"{target}: wrote to its arguments {sorted(written)}"), {}
    return result, None, written


def sendable(error: Exception) -> Exception:
    """error with its traceback as a note, or a RuntimeError in its place if it does not survive pickling."""
    trace = "In the emulating process:\n" + traceback.format_exc()
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    vars(error)["__notes__"] = [trace]
    return error


def packed(target: str, reply: tuple[Any, Exception | None, dict[int, Any]]) -> bytes:
    try:
        return dumps(reply)
    except Exception as error:
        refused = RuntimeError(f"{target}: its result cannot be sent: {error}")
        return dumps((None, refused, {}))


def main() -> None:
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints must not look like an answer
    torch.set_num_threads(1)
    while True:
        try:
            target, arguments, options = pickle.load(calls)
        except EOFError:
            return
        answers.write(packed(target, answer(target, arguments, options)))
        answers.flush()


if __name__ == "__main__":
    main()
