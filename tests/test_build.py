"""What a build promises: a sentence without a compiler, kernels free of torch, Arm from the same source."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = [
    "-std=c++20",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
    "-fsyntax-only",
]


def test_a_missing_compiler_is_one_sentence():
    nowhere = {**os.environ, "PATH": "/nowhere", "CXX": ""}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=ROOT,
        env=nowhere,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "fastattn: no C++ compiler found (looked for c++, g++, clang++). Install one"
    )
    assert "Traceback" not in done.stderr


def test_kernels_include_no_torch_header():
    for path in [*ROOT.glob("csrc/cpu/*"), *ROOT.glob("csrc/common/*")]:
        assert not re.search(r'#include [<"](torch|ATen|c10)/', path.read_text()), path


@pytest.mark.parametrize("isa", ["generic", "generic16"])
def test_arm_compiles_the_same_source(isa):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no compiler for 64-bit Arm here")
    subprocess.run([compiler, *FLAGS, f"csrc/cpu/isa_{isa}.cpp"], cwd=ROOT, check=True)


@pytest.mark.parametrize("isa", ["generic", "generic16", "avx2", "avx512"])
def test_clang_compiles_it_too(isa):
    compiler = shutil.which("clang++")
    if compiler is None:
        pytest.skip("no Clang here")
    subprocess.run([compiler, *FLAGS, f"csrc/cpu/isa_{isa}.cpp"], cwd=ROOT, check=True)


def test_a_wrong_instruction_set_is_one_sentence():
    code = "import fastattn; print(fastattn.backends()[1].detail)"
    wrong = {**os.environ, "FASTATTN_ISA": "sse9"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=wrong, capture_output=True, text=True, check=True
    )
    assert "FASTATTN_ISA=sse9 is not an instruction set that was built and runs" in done.stdout
    assert done.stdout.strip().endswith("; unset it")
