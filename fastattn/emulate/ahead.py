"""Compiles what autotune is going to time, on all processors and without the GPU, into Triton's cache.

A GPU waits while one process compiles a configuration after the other: 400 of them, at seconds each. A
process of its own takes each neighbour of every configuration, in the order in which autotune will ask:

    python -m fastattn.emulate.ahead sm_90 bfloat16 3 128,64,256
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from . import offline

VARIANTS = range(8)  # the configurations of the table, and at most 7 neighbours


def compile_ahead(
    target: str, dtypes: Sequence[str], head_dims: Sequence[int], seconds: float = float("inf")
) -> float:
    """Ends after `seconds`, whatever is done. Returns how long it took."""
    start = time.monotonic()
    widths = ",".join(map(str, head_dims))
    jobs = [(target, dtype, str(at), widths) for dtype in dtypes for at in VARIANTS]
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda job: run(job, start + seconds), jobs))
    return time.monotonic() - start


def run(job: tuple[str, ...], end: float) -> None:
    """A compiler that fails or is ended leaves less in the cache, and nothing else."""
    left = end - time.monotonic()
    if left > 0:
        command = [sys.executable, "-m", __name__, *job]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(None if left == float("inf") else left)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(target: str, dtype: str, variant: str, widths: str) -> None:
    import triton

    from ..kernels.triton import autotune, tune

    triton.runtime.driver.set_active(offline.NamesTarget(offline.gpu_target(target)))
    table = tune.configs()
    for key, given in table.items():
        choices = [given, *autotune.neighbours(given)]
        table[key] = choices[min(int(variant), len(choices) - 1)]
    for width in widths.split(","):
        with offline.launches_compile([]):
            device = torch.device("cuda")
            for _, _, call in autotune.calls(device, getattr(torch, dtype), int(width)):
                call()


if __name__ == "__main__":
    main(*sys.argv[1:])
