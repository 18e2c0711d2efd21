"""The row kernels as nvcc compiles them: nothing spills, and rows are read and written 16 bytes at a time."""

import pytest

from . import nvcc

FILES = ("norm", "cross_entropy", "softmax", "activation", "rotary", "cache")
FAST = [("cache", "sm_80"), ("softmax", "sm_120")]
REST = [(f, a) for f in FILES for a in nvcc.ARCHITECTURES if (f, a) not in FAST]
# by entries: columns of partial sums, whose neighbours are other threads'; gradients of angles
NARROW = ("sum_chunks", "rotary_tables")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cubin")


def one_entry_at_a_time(kernel):
    """N = 1: rows that are no multiple of 16 bytes, read by neighbouring threads."""
    return "Li1EE" in kernel.name or any(name in kernel.name for name in NARROW)


def check(file, architecture, folder):
    kernels = nvcc.compiled(f"{file}.cu", architecture, folder)
    assert [k.name for k in kernels if k.spills] == []
    wide = [k for k in kernels if not one_entry_at_a_time(k)]
    assert wide
    assert [k.name for k in wide if not k.count("LDG", "128")] == []
    writers = [
        k for k in wide if "cross_entropy_fwd" not in k.name
    ]  # which writes two numbers a row
    assert [k.name for k in writers if not k.count("STG", "128")] == []


@nvcc.needs_nvcc
@pytest.mark.parametrize("file, architecture", FAST)
def test_machine_code(file, architecture, folder):
    check(file, architecture, folder)


@pytest.mark.slow
@nvcc.needs_nvcc
@pytest.mark.parametrize("file, architecture", REST)
def test_machine_code_of_every_target(file, architecture, folder):
    check(file, architecture, folder)
