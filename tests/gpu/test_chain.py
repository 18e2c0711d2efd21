"""make gpu with no GPU: the whole chain on a driver that runs nothing, down to each launch; and what becomes
of stages that fail, crash, hang or cannot run."""

import importlib
import importlib.util
import json
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from fastattn import registry
from fastattn.bench.results import about, read, read_checks
from fastattn.cli import app
from fastattn.cli.stages import OWN_TIME, SECONDS, Command, Stage, run_stages
from fastattn.kernels.triton import tune

gpu = importlib.import_module(
    "fastattn.cli.gpu"
)  # the package's own name is the command's function
DRY = (sys.executable, "-m", "tests.gpu.dry")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_whole_chain_down_to_the_launch(tmp_path, monkeypatch, capsys):
    folder, launches = tmp_path / "results", tmp_path / "launches"
    folder.mkdir()
    monkeypatch.setenv("DRY_LAUNCHES", str(launches))
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setattr(tune, "MEASURED", tmp_path / "measured")
    building = Stage("build", 1, [], "there is no nvcc")
    *stages, slow = gpu.plan("cpu", folder, ("triton", "cuda"), building, DRY)
    # the rest are the same commands again, in another dtype, of another backend, with one option more
    assert len(stages[2].commands) == 12 and "--compile" in slow.commands[0].words
    stages[2] = stages[2]._replace(commands=stages[2].commands[1:2])
    facts = about("cpu", False) | {"device": "a fake GPU", "target": "sm_90"}
    found = gpu.run_all(stages, folder, 240.0, facts)
    log = (folder / "log.txt").read_text()
    assert [o.state for o in found] == ["left out", *["passed"] * 4], log
    check_results(folder, tmp_path)
    kernels = launches.read_text().split("\n")
    assert {"pytest cache_append_kernel", "fastattn softmax_fwd_kernel", "fastattn norm_bwd_kernel",
            "fastattn attention_fwd_kernel"} <= set(kernels)  # fmt: skip
    said = capsys.readouterr().out
    assert f"to commit: git add {folder} " in said.replace("\n", " ")
    assert said.strip().endswith("fastattn gpu: 4 passed, 0 failed, 0 stopped, 1 left out")


def check_results(folder, tmp_path):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["device"] == "a fake GPU" and len(summary["stages"]) == 5
    assert 'errors="0" failures="0"' in (folder / "junit.xml").read_text()
    report = json.loads((folder / "verify.json").read_text())
    assert (report["passed"], report["failed"]) == (2, 0)
    assert len(read_checks(folder / "verify.json").cases) == 2
    results = read(folder / "bench.json")
    assert {row.contestant for row in results.rows} >= {"fastattn", "naive"} and not results.wrong
    for place in (folder, tmp_path / "measured", tmp_path / "cache"):
        table = tune.read_table(place / "tune-sm_90.json")
        assert tune.Key("attention_fwd", 16, 64) in table
        rows = registry.read_backends(place / "backends-sm_90.json")
        assert {"norm 16", "norm 32"} <= rows.keys() and "torch" in rows["where"]
    # what a lent machine gives back: few files, none in folders
    assert len(list(folder.iterdir())) <= 8


def pytest_here(tmp_path, *arguments):
    """What pytest says of three tests, one of CUDA's, beside this project's conftest."""
    for name, text in (
        ("conftest", "from tests.conftest import *"),
        ("test_a", "def test_there(device): assert device\ndef test_anywhere(): pass"),
        ("test_cuda_a", "def test_there(device): pass"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    command = (
        sys.executable,
        "-m",
        "pytest",
        str(tmp_path),
        "--rootdir",
        str(tmp_path),
        *arguments,
    )
    return subprocess.run(command, capture_output=True, text=True).stdout


def test_pytest_on_a_gpu_runs_what_lies_there(tmp_path):
    assert "3 passed" in pytest_here(tmp_path)
    assert "3 skipped" in pytest_here(tmp_path, "--seconds", "0")
    number = 2 if gpu.native.cuda_architectures() else 1
    assert f"{number} passed, {3 - number} deselected" in pytest_here(tmp_path, "--device", "cuda")


# ---- stages that do not pass --------------------------------------------------------------------


def python(code):
    return Command((sys.executable, "-c", code))


def outcomes(tmp_path, *stages, seconds=20.0, beside=1):
    log, said = tmp_path / "log.txt", []
    found = list(run_stages(stages, log, seconds, said.append, beside))
    return found, log.read_text() if log.exists() else "", said


RAISES = "raise RuntimeError('an illegal memory access')"
DIES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
HANGS = """
import subprocess, sys, time
print("compiling", flush=True)
subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
"""


def test_what_fails_is_named_and_the_next_go_on(tmp_path):
    found, log, _ = outcomes(
        tmp_path,
        Stage("raises", 1, [python("print('one test failed')"), python(RAISES)]),
        Stage("dies", 1, [python(DIES)]),
        Stage("missing", 1, [Command(("/nowhere/python",))]),
        Stage("left", 1, [], "pytest is not installed"),
        Stage("passes", 1, [python("print('12 passed'); print()")]),
    )
    assert [(o.stage, o.state, o.detail) for o in found] == [
        (
            "raises",
            "failed",
            "exit code 1, 1 of 2 commands: RuntimeError: an illegal memory access",
        ),
        ("dies", "failed", "signal 11: it said nothing"),
        (
            "missing",
            "failed",
            "exit code 127: [Errno 2] No such file or directory: '/nowhere/python'",
        ),
        ("left", "left out", "pytest is not installed"),
        ("passes", "passed", "12 passed"),
    ]
    assert "==== raises: " in log and "Traceback" in log and "one test failed" in log


def test_what_hangs_is_stopped_with_its_children_and_the_next_go_on(tmp_path):
    start = time.monotonic()
    found, log, _ = outcomes(
        tmp_path, Stage("hangs", 1, [python(HANGS)]), Stage("passes", 3, [python("")]), seconds=8.0
    )
    assert time.monotonic() - start < 8
    assert [(o.state, o.detail) for o in found] == [
        ("stopped", "after 2 s: compiling"),
        ("passed", "it said nothing"),
    ]
    assert "compiling" in log


def test_stages_share_what_time_is_left(tmp_path):
    tell = python(f"print({SECONDS!r})")
    found, _, said = outcomes(
        tmp_path,
        Stage("none", 100, [], "nothing to do"),
        Stage("first", 1, [tell, tell, tell]),
        Stage("last", 1, [tell]),
        seconds=60.0,
        beside=2,
    )
    assert said[0] == "first: at most 30 s"
    # two turns of 15 s; the last has all that the first did not need
    assert [o.detail for o in found][1] == f"{OWN_TIME * 15:.0f}"
    assert 0.9 * OWN_TIME * 60 < float(found[2].detail) <= OWN_TIME * 60


def test_reports_become_one_and_one_that_was_cut_is_said(tmp_path):
    report = {
        "device": "cuda",
        "passed": 2,
        "failed": 0,
        "operators": [{}, {}],
        "models": [],
        "failures": [],
    }
    for name in ("a", "b"):
        write = Command(
            (sys.executable, "-c", f"print({json.dumps(report)!r})"),
            tmp_path / f"verify-{name}.json",
        )
        outcomes(tmp_path, Stage("verify", 1, [write]))
    (tmp_path / "verify-c.json").write_text('{"passed": ')
    gpu.join_reports(tmp_path)
    assert json.loads((tmp_path / "verify.json").read_text()) == {
        "device": "cuda", "passed": 4, "failed": 1, "operators": [{}] * 4, "models": [],
        "failures": ["verify-c: it wrote no report"],
    }  # fmt: skip
    assert not list(tmp_path.glob("verify-*.json"))


# ---- machines on which less can be done ---------------------------------------------------------


def test_without_a_gpu_one_sentence_and_exit_2(monkeypatch):
    monkeypatch.setattr(gpu, "run_all", lambda *_: pytest.fail("stages ran"))
    for arguments in (["gpu"], ["autotune"], ["gpu", "--device", "cpu"], ["autotune", "blocs"]):
        done = CliRunner().invoke(app, arguments)
        (line,) = done.stderr.strip().splitlines()
        assert done.exit_code == 2 and line.startswith(f"fastattn {arguments[0]}: ")
    assert "table must be one of blocks, backends, got 'blocs'" in line


@pytest.mark.parametrize("built, number, runs", [
    (["80", "90", "100", "120"], 90, True), (["80"], 86, True), (["80"], 90, True), (["90"], 80, False),
    (["80", "120"], 90, False), ([], 90, False),
])  # fmt: skip
def test_which_gpus_a_build_serves(built, number, runs, monkeypatch):
    monkeypatch.setattr(gpu.native, "cuda_architectures", lambda: built)
    assert gpu.runs_on(number) == runs


@pytest.fixture
def h100(monkeypatch):
    """An extension without CUDA kernels, on a machine with an nvcc."""
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu.torch.version, "hip", None)
    monkeypatch.setattr(gpu.native, "cuda_architectures", list)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_cuda_kernels_are_built_for_this_gpu_alone(h100, monkeypatch):
    stage = gpu.build("cuda")
    (command,) = stage.commands
    assert dict(command.environment) == {"FASTATTN_BUILD_CUDA": "1", "FASTATTN_CUDA_ARCHS": "90"}
    assert command.folder == gpu.ROOT and gpu.judged(stage) == ("triton", "cuda")


def test_what_cannot_be_built_is_left_out(h100, monkeypatch):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.build("cuda").left_out == "there is no nvcc: only Triton's kernels run"
    assert gpu.judged(gpu.build("cuda")) == ("triton",)
    monkeypatch.setattr(gpu, "CHECKOUT", False)
    assert "no sources" in gpu.build("cuda").left_out
    assert gpu.tests("cuda", gpu.Path(), ()).left_out == "an installed package has no tests"
    monkeypatch.setattr(gpu.torch.version, "hip", "7.0")
    assert gpu.build("cuda").left_out == "the CUDA kernels are for NVIDIA's GPUs"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.tests("cuda", gpu.Path(), ()).left_out == "pytest is not installed"


def test_a_failed_stage_is_the_command_s_exit_code(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "known_gpu", lambda device: None)
    monkeypatch.setattr(gpu, "about", lambda device, quick: {"device": "NVIDIA H100 80GB HBM3"})
    monkeypatch.setattr(gpu.tune, "target", lambda: "sm_90")
    monkeypatch.setattr(gpu, "build", lambda device: Stage("build", 1, [], "no"))
    monkeypatch.chdir(tmp_path)
    for code, expected in ((0, 0), (3, 1)):
        stages = [Stage("verify", 1, [python(f"raise SystemExit({code})")])]
        monkeypatch.setattr(gpu, "plan", lambda *_, stages=stages: stages)
        done = CliRunner().invoke(app, ["gpu", "--minutes", "0.2"])
        assert done.exit_code == expected, done.output
    folder = tmp_path / "results/gpu-nvidia-h100-80gb-hbm3"
    assert {p.name for p in folder.iterdir()} == {"log.txt", "summary.json"}
    assert "verify: failed, " in done.stderr
