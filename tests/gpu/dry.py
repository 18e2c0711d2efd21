"""Runs a module of Python as on a GPU that is not there: python -m tests.gpu.dry -m fastattn verify ...

Triton's kernels are compiled for sm_90, loaded and launched on driver.py's driver, which notes the launch;
the numbers that the launch would have left come from the interpreter. CUDA's are stood in for by the
CPU's. Everything is small: the commands are those of the day, and their sizes are not.
"""

import functools
import importlib
import itertools
import os
import runpy
import sys
from pathlib import Path

from fastattn import bench, registry, verify
from fastattn.bench import families
from fastattn.emulate import ahead
from fastattn.kernels import triton as kernels
from fastattn.kernels.triton import autotune, tune
from fastattn.ops import triton as ours

from . import driver


def launched_and_emulated(emulated, where, *arguments):
    kernels.launcher(where.rpartition(":")[2])(*arguments)
    return emulated(where, *arguments)


def kernels_on_a_gpu():
    driver.install("sm_90")
    ours.emulate.call = functools.partial(launched_and_emulated, ours.emulate.call)
    for operator in registry.operators("cpu"):
        registry.register(operator, "cuda", registry.kernel(operator, "cpu"))
    registry.ORDER["cpu"] = ("triton", "reference")


def small():
    softmaxes = [case for case in verify.CASES if case.operator == "softmax"]
    verify.selected = lambda operators, quick: softmaxes[:2]
    families.FAMILIES.clear()
    families.FAMILIES["norm"] = lambda s: [families.norm.workload(s, "rms_norm", 3, 33)]
    bench.SECONDS = 0.0
    bench.ceiling = lambda device, dtype: {"flops": 1e12, "bytes": 1e12, "by": "nothing"}
    calls = autotune.calls
    autotune.LENGTH, autotune.HEADS = 128, (64,)
    autotune.calls = lambda *form: itertools.islice(calls(*form), 1)
    autotune.agree = lambda found, wanted: True  # nothing was computed
    autotune.neighbours = lambda given: iter([given._replace(warps=12 - given.warps)])
    ahead.VARIANTS = ()  # processes of their own, which test_tune.py starts
    importlib.import_module("fastattn.cli.autotune").known_gpu = lambda device: None


def note_launches():
    """A line a kernel, for the test to read."""
    names = sorted({name for name, _ in driver.LAUNCHED})
    with Path(os.environ["DRY_LAUNCHES"]).open("a") as file:
        file.write("".join(f"{sys.argv[0]} {name}\n" for name in names))


def main():
    assert sys.argv[1] == "-m"
    module, sys.argv = sys.argv[2], sys.argv[2:]
    if module == "pytest":
        sys.argv[sys.argv.index("-k") + 1] = "append_turns and triton-False-12-None"
    kernels_on_a_gpu()
    small()
    assert tune.target() == "sm_90"
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        note_launches()


if __name__ == "__main__":
    main()
