"""csrc/cuda as machine code: what nvcc makes of every kernel, held to committed budgets.

    rows = cuda_code.compile_all(["sm_80"])
    cuda_code.broken(rows, cuda_code.budgets())    sentences, none if all is well

Compiled, not run, and no GPU is needed: nvcc compiles and the cuobjdump inside Triton's wheel (or CUDA's
own) reads. Cubins are kept in the user's cache by sources, flags and nvcc. Counted is the main loop of a
kernel with tensor cores, found as machine_code.py says, and the whole of any other.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from . import cuda_host, machine_code
from .machine_code import Instruction

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
FLAGS = ["-cubin", "-O3", "-std=c++20"]  # as setup.py's
# what may grow by ALLOWED_GROWTH before it is an error, and what may not grow at all
LOOP = ("mma", "async", "matrices", "special", "fp32", "total")
HELD = ("registers", "stack", "local")
ALLOWED_GROWTH = 1.05


class Kernel(NamedTuple):
    """registers a thread, bytes of stack; local: spills and other accesses to local memory, of the whole
    kernel; wide: its accesses of 16 bytes to global memory; the rest counts the main loop, or the whole of
    a kernel without tensor cores."""

    target: str
    name: str
    registers: int
    stack: int
    local: int
    wide: int
    mma: int
    async_: int
    matrices: int  # LDSM
    special: int
    fp32: int
    total: int

    @property
    def id(self) -> str:
        return f"{self.target} {self.name}"

    def counts(self, kinds: Sequence[str]) -> dict[str, int]:
        return {kind: getattr(self, "async_" if kind == "async" else kind) for kind in kinds}


# ---- compiling -------------------------------------------------------------------------------


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


@functools.cache
def nvcc_version() -> str:
    found = nvcc()
    if found is None:
        raise RuntimeError("the CUDA kernels' machine code needs nvcc, and there is none on PATH")
    text = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"V(\d+\.\d+\.\d+)", text)
    return version[1] if version else text


def cubin(source: Path, target: str) -> Path:
    """The machine code of one .cu, compiled unless the cache has it."""
    version = nvcc_version()
    parts: list[str | bytes] = [target, version, *FLAGS]
    parts += [p.read_bytes() for p in cuda_host.closure(source.resolve())]
    found = cuda_host.cache() / "cubins" / f"{source.stem}-{target}-{cuda_host.digest(parts)}.cubin"
    if not found.is_file():
        cuda_host.make([str(nvcc()), *FLAGS, f"-arch={target}", str(source)], found)
    return found


def sources() -> list[str]:
    """What a kernel may be named after: the stems of csrc/cuda/*.cu, the longest to compile first."""
    found = (cuda_host.csrc() / "cuda").glob("*.cu")
    return [p.stem for p in sorted(found, key=lambda p: -p.stat().st_size)]


def compile_all(
    targets: Sequence[str] = TARGETS,
    stems: Sequence[str] | None = None,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> list[Kernel]:
    """Every kernel of these sources for these targets."""
    folder = cuda_host.csrc() / "cuda"
    wanted = [(stem, target) for stem in stems or sources() for target in targets]
    rows: list[Kernel] = []
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        compiled = pool.map(lambda job: (job, cubin(folder / f"{job[0]}.cu", job[1])), wanted)
        for at, ((stem, target), path) in enumerate(compiled):
            progress(f"{stem} for {target}", at / len(wanted))
            rows += read(path, target)
    return sorted(rows, key=lambda row: (targets.index(row.target), row.name))


# ---- reading ---------------------------------------------------------------------------------


def cuobjdump() -> str:
    return shutil.which("cuobjdump") or machine_code.cuobjdump()


def read(path: Path, target: str) -> list[Kernel]:
    command = [cuobjdump(), "-res-usage", "-sass", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {
        name: (int(registers), int(stack))
        for name, registers, stack in re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", text)
    }
    codes = re.split(r"\n\s*Function : (\w+)\n", text)
    return [
        counted(target, name, *used[name], code)
        for name, code in zip(codes[1::2], codes[2::2], strict=True)
    ]


def counted(target: str, mangled: str, registers: int, stack: int, text: str) -> Kernel:
    code = [Instruction(int(m[1], 16), m[2], m[3]) for m in machine_code.SASS.finditer(text)]
    jumps = [(int(m[1], 16), i.address) for i in code if (m := machine_code.jump_target(i))]
    loop: Counter[str] = sum(machine_code.main_loops(code, jumps), Counter())
    whole = Counter(i.name for i in code)
    loop = loop if machine_code.work(loop, "mma") else whole
    of = {kind: machine_code.work(loop, kind) for kind in ("mma", "async", "special", "fp32")}
    wide = sum(n for name, n in whole.items() if re.match(r"(LDG|STG|LDGSTS)\b.*\.128", name))
    matrices = sum(n for name, n in loop.items() if machine_code.base(name) == "LDSM")
    return Kernel(
        target, readable(mangled), registers, stack, machine_code.work(whole, "local"), wide,
        of["mma"], of["async"], matrices, of["special"], of["fp32"], sum(loop.values()),
    )  # fmt: skip


def readable(mangled: str) -> str:
    """A kernel's name with its template's arguments: "softmax_fwd_kernel<bf16, 8>"."""
    standard = ctypes.CDLL("libstdc++.so.6")
    standard.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    found = standard.__cxa_demangle(mangled.encode(), None, None, ctypes.byref(status))
    if not found:
        return mangled
    text = ctypes.string_at(found).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(found))
    text = re.sub(r"fastattn::(cuda::)?|^void ", "", text)
    return re.sub(r"\([\w ]+\)(?=-?\d)", "", text).rpartition("(")[0]


# ---- budgets ---------------------------------------------------------------------------------


def budgets() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("cuda_budgets.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


def broken(rows: Sequence[Kernel], held: dict[str, Any]) -> list[str]:
    """A sentence for every budget that a kernel does not keep. Registers, stack and local memory hold
    under any nvcc; the length of a loop under the one that it was counted under."""
    wrong = []
    for row in rows:
        allowed = held["kernels"].get(row.id)
        if allowed is None:
            wrong.append(f"{row.id}: has no budget: fastattn compile --backend cuda --record FILE")
            continue
        for kind, n in row.counts(HELD).items():
            most = allowed.get(kind, 0)
            if n > most:
                wrong.append(f"{row.id}: {n} {kind}, {most} are allowed")
        if held["nvcc"] != nvcc_version():
            continue
        for kind, n in row.counts(LOOP).items():
            if n > allowed.get(kind, 0) * ALLOWED_GROWTH:
                wrong.append(
                    f"{row.id}: {n} {kind} in what is counted, it had {allowed.get(kind, 0)}"
                )
    return wrong


def recorded(rows: Sequence[Kernel]) -> dict[str, Any]:
    """Budgets that these rows just keep."""
    kernels = {
        row.id: {kind: n for kind, n in row.counts((*HELD, *LOOP)).items() if n} for row in rows
    }
    return {"nvcc": nvcc_version(), "kernels": kernels}


def as_text(held: dict[str, Any]) -> str:
    """JSON with a kernel a line, for diffs to be read."""
    kernels = ",\n".join(f'"{name}": {json.dumps(row)}' for name, row in held["kernels"].items())
    return f'{{\n"nvcc": "{held["nvcc"]}",\n"kernels": {{\n{kernels}\n}}\n}}\n'
