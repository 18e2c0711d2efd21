"""GPU kernels on a CPU: the same kernels, interpreted in a process of their own, every access checked.

Triton fixes whether it interprets or compiles when a kernel is decorated, so a process can do one or
the other. Interpreting happens in a worker that this module starts when it is first needed:

    emulate.call("fastattn.kernels.triton.softmax:softmax_fwd", x, None, False, 1.0)

runs that function there and returns what it returns. Tensors travel as they lie in memory, strides and
storage included, and what the function wrote to its arguments is written to the caller's. An error in
the worker is raised here. A process that has TRITON_INTERPRET=1 set is itself such a worker.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """How the interpreter runs a kernel. Addresses, undefined lanes and overflows are always checked.

    races: keep a log of every access and raise where two programs conflict (slow: small shapes).
    order: of the programs, "forward", "reverse" or the seed of a shuffle.
    tf32: round the inputs of fp32 products that allow it, as tensor cores do.
    """

    races: bool = False
    order: str | int = "forward"
    tf32: bool = False


_options = Options()
_lock = threading.RLock()
_worker: Worker | None = None


@contextlib.contextmanager
def options(**changes: Any) -> Iterator[None]:
    """Inside the block kernels are interpreted with these Options."""
    global _options
    before, _options = _options, _options._replace(**changes)
    try:
        yield
    finally:
        _options = before


def interprets_here() -> bool:
    """True in a process whose Triton kernels are interpreted, as the worker's are."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def call(target: str, *arguments: Any) -> Any:
    """target, "module:function", of these arguments, in the interpreting process."""
    if interprets_here():
        from .worker import run

        return run(target, arguments, _options)
    global _worker
    with _lock:
        if _worker is None or not _worker.alive():
            _worker = Worker()
        return _worker.call(target, arguments)


class Worker:
    """One interpreting process, and the pipe to it."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        self.owner = os.getpid()  # a forked child must not share the pipe
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastattn.emulate.worker"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.to, self.back = self.process.stdin, self.process.stdout
        atexit.register(self.close)

    def alive(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def close(self) -> None:
        if self.owner == os.getpid():
            with contextlib.suppress(BrokenPipeError):  # it died with a call half written
                self.to.close()
            self.process.wait()
            self.back.close()

    def call(self, target: str, arguments: tuple[Any, ...]) -> Any:
        message = dumps((target, arguments, _options))
        try:
            self.to.write(message)
            self.to.flush()
            result, error, written = pickle.load(self.back)
        except (EOFError, BrokenPipeError):
            code = self.process.wait()
            raise RuntimeError(f"{target}: the emulating process died, exit code {code}") from None
        except (
            BaseException
        ):  # interrupted: the rest of this answer would be read as the next one's
            self.process.kill()
            self.process.wait()
            raise
        if error is not None:
            raise error
        with torch.no_grad():
            for at, value in written.items():
                arguments[at].copy_(value)
        return result


def dumps(message: Any) -> bytes:
    stream = io.BytesIO()
    Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(message)
    return stream.getvalue()


class Pickler(pickle.Pickler):
    """Sends a tensor as its memory, once for all views of it, and where it lies there. torch's own way
    takes ten times as long, and refuses fp8."""

    def __init__(self, stream: io.BytesIO, protocol: int) -> None:
        super().__init__(stream, protocol)
        self.sent: dict[int, bytearray] = {}

    def reducer_override(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return NotImplemented
        memory = stored(x)
        if memory.data_ptr() not in self.sent:
            self.sent[memory.data_ptr()] = bytearray(memory.numpy())
        at = (x.dtype, x.storage_offset(), tuple(x.shape), x.stride())
        return received, (self.sent[memory.data_ptr()], *at)


def stored(x: Tensor) -> Tensor:
    """The bytes of the memory that x is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def received(
    memory: bytearray,
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> Tensor:
    x = torch.empty(0, dtype=dtype)
    if not memory:
        return x.as_strided(shape, strides)
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return x.set_(storage, offset, shape, strides)
