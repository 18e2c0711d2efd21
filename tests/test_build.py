"""What a build promises: a sentence without a compiler, kernels free of torch, Arm from the same source."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
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


def setup_says(**environment):
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_missing_compiler_is_one_sentence():
    assert setup_says(PATH="/nowhere", CXX="").startswith(
        "fastattn: no C++ compiler found (looked for c++, g++, clang++). Install one"
    )


def test_the_compiler_is_the_first_word_of_cxx():
    said = setup_says(CXX="nope -m64 g++")
    assert said.startswith("fastattn: no C++ compiler found (looked for nope)")


def test_a_source_distribution_has_all_that_is_compiled(tmp_path):
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "fastattn"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so")
            )
        else:
            shutil.copy(source, copy)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path],
        cwd=copy,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/*")}
    assert wanted <= names and "csrc/cuda/softmax.cu" in wanted


def test_the_package_has_the_sources_that_emulation_compiles(tmp_path):
    """backend="cuda" on a CPU compiles csrc where the package is installed."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    installed = tmp_path / "fastattn/csrc"
    assert {p.relative_to(installed) for p in installed.glob("*/*")} == {
        p.relative_to(ROOT / "csrc") for p in ROOT.glob("csrc/*/*")
    }
    code = "from fastattn.emulate import cuda_host; print(cuda_host.csrc())"
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True,
        text=True, check=True,
    ).stdout  # fmt: skip
    assert said.strip() == str(installed)


def test_cuda_without_nvcc_is_one_sentence():
    said = setup_says(FASTATTN_BUILD_CUDA="1", PATH="/usr/bin:/bin", CUDA_HOME="")
    assert said.startswith("fastattn: FASTATTN_BUILD_CUDA=1, but there is no nvcc.")
    assert "must be 0 or 1, got 'yes'" in setup_says(FASTATTN_BUILD_CUDA="yes")


def test_objects_are_kept_where_an_editable_install_finds_them():
    code = (
        "import setuptools; setuptools.setup = dict; exec(open('setup.py').read());"
        "command = commands()['build_ext'](setuptools.Distribution());"
        "command.build_temp = '/tmp/thrown-away';"
        "command.finalize_options(); print(command.build_temp)"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code.replace("exec(", "__file__ = 'setup.py'; exec(")],
            cwd=ROOT, env={**os.environ, "FASTATTN_SANITIZE": sanitize},
            capture_output=True, text=True, check=True,
        ).stdout.split()[-1]
        for sanitize in ("0", "1")
    ]  # fmt: skip
    assert said == ["build/objects", "build/objects-sanitize"]


def test_kernels_include_no_torch_header():
    for path in [p for d in ("cpu", "common", "cuda", "host") for p in ROOT.glob(f"csrc/{d}/*")]:
        assert not re.search(r'#include [<"](torch|ATen|c10)/', path.read_text()), path


@pytest.mark.parametrize("isa", ["generic", "generic16"])
def test_arm_compiles_the_same_source(isa):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no compiler for 64-bit Arm here")
    subprocess.run([compiler, *FLAGS, f"csrc/cpu/isa_{isa}.cpp"], cwd=ROOT, check=True)


@pytest.mark.parametrize("isa", ["generic", "generic16", "avx2", "avx512", "avx512_bf16"])
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
