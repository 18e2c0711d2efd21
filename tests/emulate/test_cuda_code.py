"""csrc/cuda compiled by nvcc, without a GPU: registers, spills, accesses and loops against budgets."""

import json

import pytest
from typer.testing import CliRunner

from fastattn.cli import app
from fastattn.emulate import cuda_code

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
