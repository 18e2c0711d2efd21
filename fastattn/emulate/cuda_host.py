"""CUDA kernels on a CPU: csrc/cuda, compiled by the C++ compiler over csrc/host, a model of a GPU that
checks what each thread does.

The first call compiles it, under a minute, into a cache of the user's: FASTATTN_CACHE, else
XDG_CACHE_HOME/fastattn, else ~/.cache/fastattn. Objects are kept by what they were made of (sources,
flags, compiler, torch), so that a change compiles again only what it touches, and any number of
processes may do so at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

SCHEDULES = ("lockstep", "greedy", "shuffled")
TORCH_ABI = "0x020a000000000000"
FLAGS = [
    "-std=c++20",
    "-O1",  # -O2 takes half as long again to compile, and the kernels are no faster for it
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # each rounding is in the source
    "-DFASTATTN_HOST",
    "-DTORCH_STABLE_ONLY",
    f"-DTORCH_TARGET_VERSION={TORCH_ABI}",
]
INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)


class Options(NamedTuple):
    """How the model runs a kernel.

    schedule: "lockstep" (every thread to where it waits, in order), "greedy" (a warp as far as it can,
    in a random order of warps) or "shuffled" (threads in a random order); seed: of that order.
    shared_memory: bytes that a block may have; 99 KB, of sm_86, sm_89 and sm_120, is the strictest.
    count_conflicts: of shared memory's banks, for conflicts() to tell (slow).
    """

    schedule: str = "lockstep"
    seed: int = 0
    shared_memory: int = 99 << 10
    count_conflicts: bool = False


class Conflicts(NamedTuple):
    """Of one line of a kernel: accesses to shared memory by warps, and passes beyond the fewest."""

    kernel: str
    line: str  # "tile.cuh:120"
    accesses: int
    extra: int


_options = Options()
_lock = threading.RLock()
_names = itertools.count()


@contextlib.contextmanager
def options(**changes: Any) -> Iterator[None]:
    """Inside the block the model runs kernels with these Options."""
    global _options
    new = _options._replace(**changes)
    if new.schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {new.schedule!r}")
    before, _options = _options, new
    try:
        yield
    finally:
        _options = before


class Library:
    """The operators of one compilation, under a namespace of their own in torch.ops."""

    def __init__(self, path: Path, schemas: dict[str, str]) -> None:
        number = next(_names)
        self.path, self.namespace = path, f"fastattn_cuda_host{number or ''}"
        self.handle = ctypes.CDLL(str(path))
        self.handle.fastattn_host_conflicts.restype = ctypes.c_char_p
        self.definitions = torch.library.Library(self.namespace, "DEF")
        for name, schema in schemas.items():
            self.definitions.define(f"{name}{schema}")
        self.handle.fastattn_host_register(self.namespace.encode())

    def call(self, name: str, *arguments: Any) -> Any:
        with _lock:
            self.handle.fastattn_host_options(
                SCHEDULES.index(_options.schedule), ctypes.c_uint64(_options.seed),
                _options.shared_memory, int(_options.count_conflicts),
            )  # fmt: skip
            return getattr(getattr(torch.ops, self.namespace), name)(*arguments)

    def conflicts(self) -> list[Conflicts]:
        """What was counted since the last time this was asked."""
        with _lock:
            rows = self.handle.fastattn_host_conflicts().decode().splitlines()
        fields = (row.split() for row in rows)
        return [Conflicts(kernel, line, int(n), int(extra)) for kernel, line, n, extra in fields]


# ---- compiling -------------------------------------------------------------------------------


def csrc() -> Path:
    """The C++ sources: a part of the installed package, or beside it in a working tree."""
    package = Path(__file__).parent.parent
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def sources(root: Path) -> list[Path]:
    return [
        root / "ops/cuda.cpp",
        root / "host/model.cpp",
        root / "cuda/kernels.cpp",
        *sorted((root / "cuda").glob("*.cu"), key=lambda p: -p.stat().st_size),
    ]


@functools.cache
def compiler() -> list[str]:
    """The C++ compiler's command: CXX, or the first of the usual names."""
    command = found_compiler()
    if command is None:
        raise RuntimeError(f"fastattn: {missing_compiler()}")
    return command


def candidates() -> list[list[str]]:
    named = shlex.split(os.environ.get("CXX", ""))
    return [named] if named else [["c++"], ["g++"], ["clang++"]]


def found_compiler() -> list[str] | None:
    return next((command for command in candidates() if shutil.which(command[0])), None)


def missing_compiler() -> str | None:
    """None if the kernels can be compiled here, else the sentence that says why not."""
    if found_compiler():
        return None
    looked = ", ".join(command[0] for command in candidates())
    return (
        "cuda on a CPU compiles its kernels when it is first used, and there is no C++ compiler "
        f"(looked for {looked}); install one or name it in CXX"
    )


@functools.cache
def compiler_version() -> str:
    command = [*compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cache() -> Path:
    named = os.environ.get("FASTATTN_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastattn"


def closure(path: Path, found: dict[Path, None] | None = None) -> dict[Path, None]:
    """A source and all headers of ours that it includes, itself first."""
    found = {} if found is None else found
    if path not in found and path.is_file():
        found[path] = None
        for name in INCLUDE.findall(path.read_text()):
            closure((path.parent / name).resolve(), found)
    return found


def digest(parts: Sequence[str | bytes]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()[:24]


def object_of(source: Path, extra: Sequence[str] = ()) -> Path:
    """Where the object of this source is kept."""
    parts: list[str | bytes] = [shlex.join(compiler()), compiler_version(), *FLAGS, *extra]
    parts += [torch.__version__] if source.name == "cuda.cpp" else []
    parts += [p.read_bytes() for p in closure(source.resolve())]
    return cache() / "objects" / f"{source.stem}-{digest(parts)}.o"


def torch_headers() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return [f"-I{include}", f"-I{include}/torch/csrc/api/include"]


def make(command: Sequence[str], target: Path) -> None:
    """Runs command with `-o` a new file, which then becomes target: never half a file, whoever else
    does the same."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.stem, suffix=".tmp")
    os.close(handle)
    try:
        done = subprocess.run([*command, "-o", name], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(
                f"backend 'cuda' on a CPU: its kernels did not compile.\n{shlex.join(command)}\n"
                + done.stderr[-4000:]
            )
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def compile_object(source: Path, extra: Sequence[str] = ()) -> Path:
    target = object_of(source, extra)
    if not target.is_file():
        language = ["-x", "c++", *FLAGS, *extra]
        includes = torch_headers() if source.name == "cuda.cpp" else []
        make([*compiler(), *language, *includes, "-c", str(source)], target)
    return target


def link(objects: Sequence[Path]) -> Path:
    """The library of these objects, with torch's stable ABI left to the process."""
    target = cache() / f"cuda-host-{digest([str(p) for p in objects])}.so"
    if not target.is_file():
        torch_libraries = Path(torch.__file__).parent / "lib"
        where = [f"-L{torch_libraries}", f"-Wl,-rpath,{torch_libraries}", "-ltorch_cpu", "-lc10"]
        make([*compiler(), "-shared", *map(str, objects), *where], target)
    return target


def build(root: Path | None = None) -> Path:
    """The library of all kernels in root (csrc), compiled where the cache does not have it."""
    wanted = sources(root or csrc())
    missing = [s for s in wanted if not object_of(s).is_file()]
    if missing:
        print(
            f"fastattn: compiling {len(missing)} of {len(wanted)} files of CUDA kernels for the CPU, "
            "once; about a minute",
            file=sys.stderr,
        )
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(max(1, min(jobs, len(wanted)))) as pool:
        return link(list(pool.map(compile_object, wanted)))


# ---- what ops/cuda.py asks -------------------------------------------------------------------

_schemas: dict[str, str] = {}
_library: Library | None = None


def declare(name: str, schema: str) -> None:
    """Before the library is loaded: an operator of it, "softmax_fwd" and "(Tensor x, ...) -> Tensor"."""
    _schemas[name] = schema


def library() -> Library:
    """The library of the package's own kernels."""
    global _library
    with _lock:
        if _library is None:
            _library = Library(build(), _schemas)
        return _library


def call(name: str, *arguments: Any) -> Any:
    """The operator `name` on a CPU's tensors, its kernels on the model of a GPU."""
    return library().call(name, *arguments)
