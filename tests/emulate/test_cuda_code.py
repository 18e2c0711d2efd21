"""csrc/cuda compiled by nvcc, without a GPU: registers, spills, accesses and loops against budgets."""

import json
import re
import subprocess

import pytest
from typer.testing import CliRunner

from fastattn.cli import app
from fastattn.emulate import cuda_code, cuda_host

if cuda_code.nvcc() is None:
    pytest.skip(
        "there is no nvcc here: the CUDA kernels' machine code is not checked",
        allow_module_level=True,
    )
pytest.importorskip("triton", reason="cuobjdump comes with Triton's wheel")

HELD = cuda_code.budgets()
# of csrc/cuda, whose rows lie in registers and must not spill
QUICK = ["softmax", "rotary"]


@pytest.fixture(scope="module")
def quick():
    return cuda_code.compile_all(["sm_80"], QUICK)


def test_kernels_keep_to_their_budgets(quick):
    assert cuda_code.broken(quick, HELD) == []


def test_rows_are_read_sixteen_bytes_at_a_time(quick):
    by_name = {row.name: row for row in quick}
    assert (
        by_name["softmax_fwd_kernel<bf16, 8>"].wide == 4
    )  # 16 entries are 32 bytes, read and written
    assert by_name["softmax_fwd_kernel<float, 4>"].wide == 8
    assert all(row.local == row.stack == 0 for row in quick)


def test_a_kernel_over_budget_is_named(quick):
    row = next(r for r in quick if r.name == "softmax_fwd_kernel<bf16, 8>")
    worse = row._replace(registers=row.registers + 1, local=3, total=2 * row.total)
    said = cuda_code.broken([worse], HELD)
    assert said[0] == f"{row.id}: {row.registers + 1} registers, {row.registers} are allowed"
    assert said[1] == f"{row.id}: 3 local, 0 are allowed"
    if HELD["nvcc"] == cuda_code.nvcc_version():
        assert said[2] == f"{row.id}: {2 * row.total} total in what is counted, it had {row.total}"
    (unknown,) = cuda_code.broken([row._replace(name="new_kernel")], HELD)
    assert unknown.startswith("sm_80 new_kernel: has no budget")


def test_budgets_allow_no_spill_in_a_plain_kernel_and_know_every_target():
    """Plain: heads of up to 128 channels in 16 bits and no feature. A spill is local memory."""
    plain = re.compile(r"attention_\w+_kernel<(bf16|fp16), (64|128)(, \d+)?, true(, \d)?>")
    found = [name for name in HELD["kernels"] if plain.search(name)]
    assert {name.split()[0] for name in found} == set(cuda_code.TARGETS)
    assert len(found) == len(cuda_code.TARGETS) * 3 * 2 * 2
    for name in found:
        budget = HELD["kernels"][name]
        assert "local" not in budget and "stack" not in budget, name
        assert budget["mma"] and budget["async"] and budget["matrices"], name


def test_what_is_recorded_is_kept(quick):
    text = cuda_code.as_text(cuda_code.recorded(quick))
    assert cuda_code.broken(quick, json.loads(text)) == []


def test_the_command_prints_them(quick):
    command = [
        "compile",
        "--backend",
        "cuda",
        "--target",
        "sm_80",
        "--kernel",
        ",".join(QUICK),
        "--json",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["kernels"]) == len(quick)
    wrong = CliRunner().invoke(app, ["compile", "--backend", "cuda", "--target", "gfx942"])
    assert wrong.exit_code == 2


LAUNCHES = """
#include "csrc/cuda/device.h"
#include <cstdio>
namespace fastattn {
Stream current_stream() { return nullptr; }
}
__global__ void nothing(int) {}
int main() {
  try {
    fastattn::launch("nothing", nothing, dim3(3, 2), dim3(64), 1024, fastattn::current_stream(), 1);
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
"""


def test_a_launch_that_fails_names_kernel_and_shape(tmp_path):
    """Here there is no GPU, so any launch fails."""
    (tmp_path / "launches.cu").write_text(LAUNCHES)
    root = cuda_host.csrc().parent
    command = [
        cuda_code.nvcc(),
        "-std=c++20",
        "-arch=sm_80",
        f"-I{root}",
        "launches.cu",
        "-o",
        "launches",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    said = subprocess.run(
        [tmp_path / "launches"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said.startswith(
        "fastattn: nothing, grid (3, 2, 1), block (64, 1, 1), 1024 bytes of shared memory: "
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", cuda_code.TARGETS)
def test_everything_keeps_to_its_budget(target):
    rows = cuda_code.compile_all([target])
    assert cuda_code.broken(rows, HELD) == []
    # what is budgeted exists, so that a kernel cannot leave its budget by another name
    assert {r.id for r in rows} == {
        name for name in HELD["kernels"] if name.startswith(target + " ")
    }


@pytest.mark.slow
@pytest.mark.parametrize("target", cuda_code.TARGETS)
def test_plain_attention_does_not_spill_and_is_made_of_tensor_cores(target):
    rows = cuda_code.compile_all([target], ["attention_fwd", "attention_bwd"])
    plain = [r for r in rows if r.name.startswith("attention_fwd_kernel") and "true" in r.name]
    halves = [r for r in plain if "float" not in r.name]
    assert halves and all(r.mma and r.async_ and r.matrices for r in halves)
    narrow = [r for r in plain if ", 256," not in r.name]
    assert {r.id: r.local for r in narrow if r.local} == {}


ROWS = ("norm", "cross_entropy", "softmax", "activation", "rotary", "cache")


def reads_entries(kernel):
    """By entries: rows that are no multiple of 16 bytes (N = 1), where neighbouring threads read
    neighbours; columns of partial sums; gradients of angles."""
    return ", 1>" in kernel.name or kernel.name.startswith(("sum_chunks", "rotary_tables"))


def check_rows(targets, stems):
    rows = cuda_code.compile_all(targets, stems)
    assert {r.id for r in rows if r.local or r.stack} == set()
    assert {r.id for r in rows if not r.wide and not reads_entries(r)} == set()


def test_new_tokens_do_not_spill_and_move_sixteen_bytes_at_a_time():
    check_rows(["sm_80"], ["cache"])


@pytest.mark.slow
@pytest.mark.parametrize("target", cuda_code.TARGETS)
def test_no_row_kernel_spills_and_all_move_sixteen_bytes_at_a_time(target):
    check_rows([target], ROWS)
