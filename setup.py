"""Builds fastattn._C: the CPU kernels, once an instruction set, the CUDA kernels where they are wanted,
and the operators over them.

PyTorch's stable ABI and Python's limited API make one wheel serve every CPython from 3.10 and every
torch from 2.10, one for CPUs included: nothing of libtorch_cuda is linked, and CUDA's runtime is linked
statically. Environment: CXX names the compiler, MAX_JOBS limits parallel compiles, FASTATTN_SANITIZE=1
adds the address and undefined-behaviour sanitizers (make sanitize). FASTATTN_BUILD_CUDA=1 builds the CUDA
kernels and 0 does not; by default they are built if torch is a CUDA build and there is an nvcc.
FASTATTN_CUDA_ARCHS names the GPUs, "80;90;100;120" if it is not set, and machines newer than the last
compile for themselves what it left.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PYTHON_ABI = "0x030A0000"  # CPython 3.10
TORCH_ABI = "0x020a000000000000"  # torch 2.10; DESIGN: never above 2.11
SOURCES = [
    "csrc/ops/cpu.cpp",
    "csrc/ops/module.cpp",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp")),
]


CUDA_SOURCES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cuda/*.cu"))
CUDA_ARCHS = os.environ.get("FASTATTN_CUDA_ARCHS", "80;90;100;120").split(";")
C_SUFFIXES = (".h", ".cuh", ".cpp", ".cu")

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
SANITIZE = SANITIZE if os.environ.get("FASTATTN_SANITIZE") == "1" else []


def require_compiler() -> None:
    named = shlex.split(os.environ.get("CXX", ""))[:1]  # what follows is its arguments
    compilers = named or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        raise SystemExit(
            f"fastattn: no C++ compiler found (looked for {', '.join(compilers)}). Install one "
            "(Debian: apt install g++; macOS: xcode-select --install) or name it in CXX."
        )


# ---- CUDA ------------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def wants_cuda() -> bool:
    """FASTATTN_BUILD_CUDA, or whether this torch and this machine could use and compile it."""
    import torch

    named = os.environ.get("FASTATTN_BUILD_CUDA", "")
    if named not in ("", "0", "1"):
        raise SystemExit(f"fastattn: FASTATTN_BUILD_CUDA must be 0 or 1, got {named!r}")
    if named == "1" and find_nvcc() is None:
        raise SystemExit(
            "fastattn: FASTATTN_BUILD_CUDA=1, but there is no nvcc. Install the CUDA toolkit, 12.8 or "
            "later, and put its bin on PATH or name its folder in CUDA_HOME."
        )
    return named == "1" or (named == "" and torch.version.cuda is not None and bool(find_nvcc()))


def architectures() -> list[str]:
    """Machine code for each of CUDA_ARCHS, and what the last of them leaves to later machines."""
    return [
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS),
        f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}",
    ]


def cuda_libraries(nvcc: str) -> list[str]:
    """-L of the toolkit's libraries. nvcc itself may be a script that lies elsewhere: ask it."""
    asked = [nvcc, "--dryrun", "-c", CUDA_SOURCES[0], "-o", "/dev/null"]
    said = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    (line,) = [text for text in said.splitlines() if text.startswith("#$ LIBRARIES=")]
    return [word for word in shlex.split(line.partition("=")[2]) if word.startswith("-L")]


def nvcc_command(nvcc: str, source: str) -> list[str]:
    return [
        nvcc, "-c", source, "-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden",
        "--compress-mode=size",
        *(["-ccbin", shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else []),
        *architectures(),
    ]  # fmt: skip


def cuda_object(nvcc: str, source: str) -> str:
    """The object of one .cu, compiled unless there is one of the same sources, flags and nvcc."""
    headers = [p for p in sorted(ROOT.glob("csrc/*/*")) if p.suffix in (".h", ".cuh")]
    command = nvcc_command(nvcc, source)
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    sha = hashlib.sha256(shlex.join(command).encode() + version)
    for path in [ROOT / source, *headers]:
        sha.update(path.read_bytes())
    target = ROOT / "build/objects-nvcc" / f"{Path(source).stem}-{sha.hexdigest()[:16]}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = f"{target}.{os.getpid()}"
        subprocess.run([*command, "-o", unfinished], cwd=ROOT, check=True)
        os.replace(unfinished, target)
    return str(target.relative_to(ROOT))


def add_cuda(extension: Extension) -> None:
    """Compiles the CUDA kernels and makes them part of the extension."""
    nvcc = find_nvcc()
    assert nvcc is not None
    machines = ", ".join(f"sm_{arch}" for arch in CUDA_ARCHS)
    print(
        f"fastattn: compiling {len(CUDA_SOURCES)} CUDA files for {machines}: some minutes. "
        "FASTATTN_BUILD_CUDA=0 leaves them out, FASTATTN_CUDA_ARCHS names other machines",
        flush=True,
    )
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(lambda source: cuda_object(nvcc, source), CUDA_SOURCES))
    extension.sources = [*extension.sources, "csrc/ops/cuda.cpp", "csrc/cuda/kernels.cpp"]
    extension.extra_compile_args.append(f'-DFASTATTN_CUDA_ARCHITECTURES="{" ".join(CUDA_ARCHS)}"')
    extension.extra_objects = [*extension.extra_objects, *objects]
    extension.extra_link_args = [
        *extension.extra_link_args, *cuda_libraries(nvcc), "-lcudart_static", "-ldl", "-lrt",
        "-lpthread", "-Wl,--exclude-libs,ALL",
    ]  # fmt: skip


# ---- the extension ---------------------------------------------------------------------------


def extension() -> Extension:
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "fastattn._C",
        SOURCES,
        # relative, or they would be left out of a source distribution
        depends=sorted(
            str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/*") if p.suffix in C_SUFFIXES
        ),
        extra_compile_args=[
            "-O3",
            "-std=c++20",
            "-DTORCH_STABLE_ONLY",
            f"-DTORCH_TARGET_VERSION={TORCH_ABI}",
            "-fvisibility=hidden",
            f"-ffile-prefix-map={ROOT}/=",  # error messages name files without the builder's folder
            # a * b + c is one rounding on every instruction set that has FMA; nothing reads errno
            # or floating-point traps
            "-ffp-contract=fast",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-Wno-psabi",  # vectors are passed between inlined functions only
            *SANITIZE,
        ],
        extra_link_args=SANITIZE or ([] if platform.system() == "Darwin" else ["-Wl,-s"]),
        py_limited_api=True,
    )


def commands() -> dict:
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension.with_options(no_python_abi_suffix=True)):
        def finalize_options(self) -> None:
            super().finalize_options()
            # An editable install would compile in a folder that it throws away. Here objects stay, and
            # ninja compiles again only what has changed; those of the two builds do not mix.
            self.cuda = wants_cuda()
            kind = "-cuda" if self.cuda else ""
            self.build_temp = f"build/objects{kind}" + ("-sanitize" if SANITIZE else "")

        def run(self) -> None:
            require_compiler()
            if self.cuda:
                add_cuda(self.extensions[0])
            super().run()
            machines = ", ".join(f"sm_{arch}" for arch in CUDA_ARCHS) if self.cuda else "no"
            print(
                f"fastattn: built fastattn._C for the CPU from {len(SOURCES)} files; CUDA: {machines}"
            )

    return {"build_ext": Build, "build_py": WithSources}


class WithSources(build_py):
    """The package with csrc inside: backend="cuda" on a CPU compiles it there (emulate/cuda_host.py).
    In a working tree it lies beside the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in ROOT.glob("csrc/*/*"):
            if path.suffix in C_SUFFIXES:
                target = Path(self.build_lib) / "fastattn" / path.relative_to(ROOT)
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))


setup(
    ext_modules=[extension()],
    cmdclass=commands(),
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
