"""What nvcc makes of csrc/cuda: registers, stack and instructions of each kernel of a file."""

import functools
import re
import shutil
import subprocess
from collections import Counter
from typing import NamedTuple

import pytest

from fastattn.emulate import cuda_host
from fastattn.emulate.machine_code import SASS, cuobjdump

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc here: CUDA's machine code is not checked"
)


class Kernel(NamedTuple):
    """name: as mangled; stack: bytes; code: counts of instructions, "LDG.E.128" for one."""

    name: str
    registers: int
    stack: int
    code: Counter

    def count(self, *words):
        """Instructions whose name has all of these parts: ("LDG", "128")."""
        return sum(n for name, n in self.code.items() if set(words) <= set(name.split(".")))

    @property
    def spills(self):
        return self.stack or self.count("LDL") or self.count("STL")


@functools.cache
def compiled(file, architecture, folder):
    """The kernels of csrc/cuda/<file>; folder is for the cubin."""
    source, cubin = cuda_host.csrc() / "cuda" / file, folder / f"{file}-{architecture}.cubin"
    nvcc = ["nvcc", "-O3", "-std=c++20", f"-arch={architecture}", "-cubin", "-o", cubin, source]
    subprocess.run(nvcc, check=True, capture_output=True)
    command = [cuobjdump(), "--dump-resource-usage", "-sass", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name = part.split()[0]
        used = re.search(rf"Function {re.escape(name)}:\s*REG:(\d+) STACK:(\d+)", text)
        found.append(
            Kernel(name, int(used[1]), int(used[2]), Counter(m[2] for m in SASS.finditer(part)))
        )
    return found
