"""Builds fastattn._C: the CPU kernels, once an instruction set, and the operators over them.

PyTorch's stable ABI and Python's limited API make one wheel serve every CPython from 3.10 and every
torch from 2.10. Environment: CXX names the compiler, MAX_JOBS limits parallel compiles, and
FASTATTN_SANITIZE=1 adds the address and undefined-behaviour sanitizers (make sanitize).
"""

import os
import platform
import shlex
import shutil
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
PYTHON_ABI = "0x030A0000"  # CPython 3.10
TORCH_ABI = "0x020a000000000000"  # torch 2.10; DESIGN: never above 2.11
SOURCES = ["csrc/ops/cpu.cpp", "csrc/ops/module.cpp"] + sorted(
    str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp")
)


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


def extension() -> Extension:
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "fastattn._C",
        SOURCES,
        # relative, or they would be left out of a source distribution
        depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")),
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
            self.build_temp = "build/objects-sanitize" if SANITIZE else "build/objects"

        def run(self) -> None:
            require_compiler()
            super().run()
            print(f"fastattn: built fastattn._C for the CPU from {len(SOURCES)} files; CUDA: no")

    return {"build_ext": Build}


setup(
    ext_modules=[extension()],
    cmdclass=commands(),
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
