"""Loads fastattn._C, the C++ extension; its operators are torch.ops.fastattn_cpu."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple


class InstructionSet(NamedTuple):
    name: str
    lanes: int  # floats in a vector
    runs_here: bool


def load() -> str | None:
    """None once the extension is loaded, else the sentence that says why it is not."""
    try:
        import fastattn._C  # noqa: F401
    except ImportError as error:
        advice = "unset it" if "FASTATTN_ISA" in str(error) else "install with: pip install ."
        return f"the extension fastattn._C could not be loaded ({error}); {advice}"
    return None


def isa() -> str:
    """The instruction set that the CPU kernels use."""
    import fastattn._C

    return str(fastattn._C.isa())


def isas() -> list[InstructionSet]:
    """Every instruction set that was built, in the order of preference."""
    import fastattn._C

    return [InstructionSet(*row) for row in fastattn._C.isas()]


def fma_loop(tasks: int, steps: int) -> float:
    """Runs tasks of nothing but multiply-adds on torch's threads; the operations that it took."""
    import fastattn._C

    return float(fastattn._C.fma_loop(tasks, steps))


def cuda_architectures() -> list[str]:
    """What the CUDA kernels of this build were compiled for, as "80" or "120"; none without them."""
    try:
        import fastattn._C
    except ImportError:
        return []
    return str(fastattn._C.cuda_architectures()).split()


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Inside the block the CPU kernels of this process use another instruction set."""
    import fastattn._C

    before = isa()
    if not fastattn._C.use_isa(name):
        known = ", ".join(i.name for i in isas() if i.runs_here)
        raise ValueError(f"instruction set must be one that runs here ({known}), got {name!r}")
    try:
        yield
    finally:
        fastattn._C.use_isa(before)
