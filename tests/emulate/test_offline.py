"""GPU kernels compiled without a GPU: that they compile, fit the chip, and keep to their budgets."""

import importlib.util
import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from importlib.metadata import version

from fastattn import emulate
from fastattn.cli import app
from fastattn.cli.compile import as_markdown
from fastattn.cli.parts import read_part
from fastattn.emulate import machine_code, offline
from fastattn.emulate.machine_code import CHIPS, Instruction
from fastattn.emulate.offline import Compiled, Job
from fastattn.kernels import triton as kernels

QUICK = ("sm_80", "sm_90", "sm_100")
HELD = offline.budgets()
SAME = HELD["triton"] == version("triton")


@pytest.fixture(scope="module")
def compiled():
    rows = offline.compile_all(QUICK, offline.jobs(quick=True))
    return rows + offline.compile_all(["gfx942"], [Job("attention_fwd", "bfloat16", 64, "causal")])


def test_all_compile_and_keep_to_their_budgets(compiled):
    assert not offline.broken(compiled, HELD, version("triton"))


def test_no_plain_loop_spills(compiled):
    plain = [r for r in compiled if r.job.form in ("full", "causal") and r.target in QUICK]
    assert len(plain) == len(QUICK) * 2 * 2 * 4
    assert {r.name: r.loop["local"] for r in plain if r.loop["local"]} == {}


def test_loops_are_made_of_tensor_cores_and_asynchronous_copies(compiled):
    names = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
    for row in compiled:
        if row.kernel in offline.PRODUCTS and row.job.form != "featured":
            assert any(name.startswith(names[row.target]) for name in row.mma), row.name
            copies = {"sm_80": "LDGSTS", "sm_90": "UTMALDG", "sm_100": "UTMALDG"}
            assert row.target == "gfx942" or copies[row.target] in row.copies, row.name


@pytest.mark.skipif(not SAME, reason=f"loops were counted under Triton {HELD['triton']}")
def test_every_quick_loop_has_a_baseline(compiled):
    assert {r.name for r in compiled} <= HELD["loops"].keys()


def not_in_readme(compiled):
    """Lines of the README's table that are other than these rows."""
    shown = [r for r in compiled if r.job in offline.jobs(quick=True) and r.job.form == "causal"]
    text = read_part(Path(__file__).parents[2] / "README.md", "compiled")
    return [line for line in as_markdown(shown).splitlines() if line not in text]


@pytest.mark.skipif(not SAME, reason=f"the README's table is of Triton {HELD['triton']}")
def test_the_readme_shows_what_the_command_prints(compiled):
    shown = [r for r in compiled if r.target in QUICK]
    assert not_in_readme(shown) == []
    other = next(r for r in shown if r.job.form == "causal")
    assert len(not_in_readme([other._replace(registers=7)])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("target", offline.TARGETS)
def test_everything_compiles_and_keeps_to_its_budget(target):
    rows = offline.compile_all([target], offline.jobs())
    assert not offline.broken(rows, HELD, version("triton"))
    assert not SAME or {r.name for r in rows} <= HELD["loops"].keys()
    assert not SAME or not_in_readme(rows) == []


@pytest.mark.parametrize("target", sorted(CHIPS))
def test_budgets_allow_no_spill_in_a_plain_16_bit_loop(target):
    for name, budget in HELD["loops"].items():
        where, kernel, dtype, width, *form = name.split(" ")
        plain = form in (["full"], ["causal"]) and dtype != "float32" and int(width) <= 128
        if where == target and f"{kernel}" in offline.PRODUCTS and plain:
            assert "local" not in budget, name


def test_every_launcher_has_a_call():
    # cross_entropy in place, and rotary with learned tables, launch the same kernel
    same = {"cross_entropy_bwd_", "rotary_tables_fwd"}
    assert offline.CALLS.keys() == kernels.LAUNCHERS.keys() - same
    assert {job.operator for job in offline.jobs()} == offline.CALLS.keys()


# ------------------------------------------------------------------------------- what breaks a budget


def row(**changes):
    loop = dict.fromkeys(machine_code.CLASSES, 0) | {"total": 500}
    fields = dict(
        target="sm_90", job=Job("attention_fwd", "bfloat16", 64, "causal"), kernel="attention_fwd_kernel",
        config="128x64 w8 s3", registers=168, loop=loop, mma={"HGMMA": 8}, copies={"UTMALDG": 2},
    )  # fmt: skip
    return Compiled(**{**fields, **changes})


def sentences(compiled, triton="3.9.0", **budget):
    held = {"triton": "3.9.0", "loops": {compiled.name: budget} if budget else {}}
    return offline.broken([compiled], held, triton)


def test_a_good_row_breaks_nothing():
    assert sentences(row()) == []
    assert sentences(row(), total=480) == []  # 4 % more


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"error": "CompilationError: at 3:4"}, "does not compile: CompilationError: at 3:4"),
        ({"shared": 240000}, "(128x64 w8 s3): 240000 bytes of shared memory, there are 232448"),
        ({"tensor_memory": 576}, "576 columns of tensor memory, there are 512"),
        ({"mma": {"HMMA": 64}}, "no HGMMA in the main loop, but {'HMMA': 64}"),
        ({"copies": {"LDGSTS": 4}}, "no UTMALDG in the main loop, but {'LDGSTS': 4}"),
        ({"loop": row().loop | {"local": 3}}, "3 spills in the main loop, 0 are allowed"),
    ],
)  # fmt: skip
def test_a_broken_rule_names_kernel_target_and_configuration(changes, says):
    (sentence,) = sentences(row(**changes))
    assert sentence.startswith("sm_90 attention_fwd_kernel bfloat16 64 causal") and says in sentence


def test_a_loop_may_grow_by_5_percent_under_the_same_triton():
    assert "500 instructions in the main loop, it had 470" in sentences(row(), total=470)[0]
    assert sentences(row(), triton="3.10.0", total=470) == []
    assert sentences(row(loop=row().loop | {"local": 3}), local=3, total=500) == []


def test_blocks_of_16_rows_need_no_warpgroup():
    assert sentences(row(config="16x64 w4 s3", mma={"HMMA": 16})) == []


ECHO = """
import json, sys
for line in sys.stdin:
    if "kills" in line:
        sys.exit(3)
    print(json.dumps([["sm_80", json.loads(line), "kernel"]]), flush=True)
"""


def test_a_job_that_kills_its_process_is_named_and_the_rest_go_on(monkeypatch):
    start = subprocess.Popen
    monkeypatch.setattr(
        offline.subprocess,
        "Popen",
        lambda command, **options: start([*command[:1], "-c", ECHO], **options),
    )
    wanted = [Job(name, "bfloat16", 64, "") for name in ("a", "kills", "b", "c", "kills")]
    rows = offline.compile_all(["sm_80"], wanted)
    death = "the compiling process died, exit code 3"
    found = sorted((r.job.operator, r.error) for r in rows)
    assert found == [("a", ""), ("b", ""), ("c", ""), ("kills", death), ("kills", death)]


def test_a_launcher_s_own_error_is_a_failure_of_its_job():
    (row,) = offline.compile_all(["sm_80"], [Job("softmax_fwd", "no_such_dtype", 64, "")])
    assert "AttributeError" in row.error and row.name.startswith("sm_80 softmax_fwd no_such_dtype")


# ------------------------------------------------------------------------------------ reading machine code


def test_the_main_loop_is_the_shortest_innermost_loop_with_the_products():
    names = [
        "MOV",
        "LDG",
        "HMMA.1",
        "FADD",
        "HMMA.2",
        "BRA",
        "HMMA.3",
        "HMMA.4",
        "BRA",
        "STL",
        "BRA",
    ]
    code = [Instruction(at, name, "") for at, name in enumerate(names)]
    # 2..5, 6..8, the outer 1..10; a jump forward, and a loop of no products
    jumps = [(2, 5), (6, 8), (1, 10), (10, 0)]
    jumps = [(a, b) for a, b in jumps if a < b]
    assert machine_code.main_loops(code, jumps) == [Counter({"HMMA.3": 1, "HMMA.4": 1, "BRA": 1})]
    (whole,) = machine_code.main_loops(code, [])
    assert sum(whole.values()) == len(code)


def test_warps_with_roles_have_a_loop_each():
    loops = [
        ["MUFU.EX2"] * 9,
        ["MUFU.EX2"] * 8,
        ["UTMALDG.4D"],
        ["UTCHMMA"],
        ["SYNCS"],
        ["FMUL"] * 8,
    ]
    names, jumps = ["USETMAXREG"], []
    for loop in loops:
        jumps.append((len(names), len(names) + len(loop)))
        names += [*loop, "BRA"]
    code = [Instruction(at, name, "") for at, name in enumerate(names)]
    roles = machine_code.main_loops(code, jumps)
    assert [next(iter(role)) for role in roles] == ["MUFU.EX2", "UTCHMMA", "UTMALDG.4D", "FMUL"]
    assert roles[0]["MUFU.EX2"] == 8


def test_instructions_have_classes():
    assert machine_code.is_a("HGMMA.64x64x16.F32.BF16", "mma")
    assert machine_code.is_a("v_mfma_f32_32x32x8_bf16_1k", "mma")
    assert machine_code.is_a("MUFU.EX2", "special") and machine_code.is_a(
        "v_exp_f32_e32", "special"
    )
    assert not machine_code.is_a("FADDX", "fp32") and not machine_code.is_a("v_mul_lo_u32", "fp32")


def test_an_estimate_grows_with_what_a_loop_has():
    loop = Counter({"HMMA.16816.F32.BF16": 64, "FFMA": 100, "MUFU.EX2": 30, "IADD3": 20})
    code = machine_code.Code(128, 0, 49152, 0, 4, [loop])
    more = code._replace(roles=[loop + Counter({"MUFU.EX2": 100})])
    fewer_blocks = code._replace(shared=100000)
    estimates = [machine_code.cycles(c, "sm_80", 4, 1 << 20) for c in (code, more, fewer_blocks)]
    assert 1024 <= estimates[0] < estimates[1] and estimates[0] < estimates[2]


# -------------------------------------------------------------------------------------------- the command


def test_the_command_prints_a_table_and_says_that_nothing_ran():
    done = CliRunner().invoke(
        app, ["compile", "--target", "sm_80", "--kernel", "softmax_fwd", "--dtype", "bfloat16"]
    )
    assert done.exit_code == 0, done.output
    assert "softmax_fwd" in done.stdout and "nothing here was timed or run" in " ".join(
        done.stdout.split()
    )


def test_the_command_speaks_json():
    arguments = [
        "compile",
        "--target",
        "sm_80,gfx942",
        "--kernel",
        "softmax_bwd",
        "--dtype",
        "bfloat16",
        "--json",
    ]
    found = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert {k["target"] for k in found["kernels"]} == {"sm_80", "gfx942"} and found["wrong"] == []
    assert all(
        k["registers"] > 0 and k["job"]["operator"] == "softmax_bwd" for k in found["kernels"]
    )


def test_the_command_takes_the_calls_that_it_is_told_and_writes_the_readme(monkeypatch, tmp_path):
    monkeypatch.setattr(
        offline, "compile_all", lambda targets, wanted, *_: [row(job=j) for j in wanted]
    )
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- compiled: by a command -->\nold\n<!-- end of compiled -->\nb\n")
    arguments = ["compile", "--quick", "--form", "causal", "--readme", str(readme)]
    CliRunner().invoke(app, arguments)
    text = readme.read_text()
    lines = read_part(readme, "compiled").splitlines()
    assert text.startswith("a\n<!--") and text.endswith("-->\nb\n") and "old" not in text
    assert lines[0].startswith("| target | kernel | D | blocks | registers | spills | shared KiB |")
    assert len(lines) == 2 + 4 and lines[2].startswith(
        "| sm_90 | fwd | 64 | 128x64 w8 s3 | 168 | 0 |"
    )
    readme.write_text("no place")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and "has no lines <!-- compiled: ... -->" in done.output
    done = CliRunner().invoke(app, ["compile", "--form", "casual"])
    assert done.exit_code == 2 and "form must be of full, causal," in done.output


def test_the_command_exits_with_1_where_a_kernel_fails(monkeypatch):
    monkeypatch.setattr(offline, "compile_all", lambda *_: [row(error="CompilationError: no")])
    done = CliRunner().invoke(app, ["compile", "--target", "sm_90"])
    assert done.exit_code == 1 and "wrong: sm_90 attention_fwd_kernel" in done.output
    assert "0 compiled, 1 failed, 0 over budget" in done.output


def test_the_command_names_what_it_does_not_know():
    done = CliRunner().invoke(app, ["compile", "--target", "sm_70"])
    assert done.exit_code == 2
    assert (
        "target must be of sm_80, sm_90, sm_100, sm_120, gfx942, gfx950, got 'sm_70'" in done.output
    )


# ------------------------------------------------------- descriptors, which only some GPUs have, interpreted


def call(packed):
    """Tensors, scalars: lengths that no block divides, NaN where nothing may be read."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        [(70, 4, 32), (90, 2, 32), (90, 2, 32)]
        if packed
        else [(2, 4, 70, 32), (2, 2, 90, 32), (2, 2, 90, 32)]
    )
    query, key, value = (torch.randn(s, generator=generator).bfloat16() for s in shapes)
    optional, spec = [None] * 9, [32**-0.5, True, 40, None, 0.0, 0.0, False, 0, 0]
    if packed:
        ends = ([0, 33, 70], [0, 50, 90])
        optional[4:6] = (torch.tensor(e, dtype=torch.int32) for e in ends)
        spec[7:] = 37, 50
    else:
        optional[6] = torch.tensor([90, 61], dtype=torch.int32)
        key[1, :, 61:], value[1, :, 61:] = float("nan"), float("nan")
    return [query, key, value, *optional], spec


@pytest.mark.parametrize("packed", [False, True])
def test_reading_by_descriptors_gives_the_same_bits(packed):
    tensors, spec = call(packed)
    launchers = "fastattn.kernels.triton"
    plain = emulate.call(f"{launchers}.attention_fwd:attention_fwd", *tensors, *spec)
    described = emulate.call("tests.emulate.described:forward", *tensors, *spec)
    assert all(torch.equal(a, b) for a, b in zip(plain, described, strict=True))
    gradient = [torch.ones_like(plain[0]), None, *tensors, *plain, *spec, 0b111]
    plain = emulate.call(f"{launchers}.attention_bwd:attention_bwd", *gradient)
    described = emulate.call("tests.emulate.described:backward", *gradient)
    assert all(torch.equal(a, b) for a, b in zip(plain, described, strict=True))
    assert not any(x.isnan().any() for x in described)
