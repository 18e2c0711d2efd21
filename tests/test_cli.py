"""The commands as a user runs them: what they print, and how they exit."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from fastattn import registry, verify
from fastattn.cli import app
from fastattn.verify import ModelReport, Report, models, spread


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_info():
    done = run("info")
    assert done.exit_code == 0
    assert (
        "reference" in done.stdout and "run by a" in done.stdout and "model of a GPU" in done.stdout
    )
    found = json.loads(run("info", "--json").stdout)
    assert {b["name"] for b in found["backends"]} == {"reference", "cpu", "triton", "cuda"}
    assert any(i["in_use"] for i in found["instruction_sets"])
    assert "attention" in found["operators"]["cpu"]


def test_verify_prints_a_table_and_one_closing_line():
    done = run("verify", "--operator", "softmax")
    assert done.exit_code == 0
    assert "worst error over allowance" in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    count = 93 if importlib.util.find_spec("triton") is None else 96  # with samples, emulated
    assert last.startswith(f"fastattn verify: {count} passed, 0 failed, 0 declined")


def test_a_log_shows_that_a_long_command_goes_on(monkeypatch):
    monkeypatch.setattr("fastattn.cli.progress.EVERY", 0.0)
    done = run("verify", "--operator", "rotary", "--backend", "cpu", "--dtype", "float32")
    lines = done.stderr.splitlines()
    assert lines[0] == "  0%  rotary: halves" and lines[-1].endswith(
        "%  rotary: interleaved, learned"
    )
    assert "%  rotary" not in done.stdout


def test_verify_json_is_json():
    done = run("verify", "--quick", "--dtype", "float32", "--backend", "cpu", "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["failed"] == 0 and found["passed"] > 50
    assert {row["backend"] for row in found["operators"]} == {"cpu"}
    assert "fastattn verify:" in done.stderr


@pytest.fixture
def wrong_softmax():
    kernel = registry.kernel("softmax", "cpu")
    forward = lambda *arguments: kernel.forward(*arguments) * 1.01  # noqa: E731
    registry.register("softmax", "cpu", kernel._replace(forward=forward))
    yield
    registry.register("softmax", "cpu", kernel)


def test_json_has_no_infinities(wrong_softmax):
    kernel = registry.kernel("softmax", "cpu")
    forward = lambda *arguments: kernel.forward(*arguments) * torch.nan  # noqa: E731
    registry.register("softmax", "cpu", kernel._replace(forward=forward))
    done = run(
        "verify", "--operator", "softmax", "--dtype", "float32", "--backend", "cpu", "--json"
    )
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert found["failed"] > 0
    assert found["operators"][0]["error_over_allowance"]["output 0"] is None
    losses = {"fused": [1.0, float("nan")], "naive": [1.0, 1.0]}
    report = Report(models=[ModelReport("model", 1, float("inf"), 0.0, 0.0, "", losses)])
    assert report.as_json()["models"][0]["losses"]["fused"] == [1.0, None]
    assert report.as_json()["models"][0]["logits_error"] is None


def test_verify_fails_loudly(wrong_softmax):
    done = run("verify", "--operator", "softmax", "--dtype", "float32")
    assert done.exit_code == 1
    assert "wrong: softmax-plain-C=7 in float32 on cpu: output 0" in done.stdout
    assert json.loads(run("verify", "--operator", "softmax", "--json").stdout)["failed"] > 0


@pytest.mark.parametrize("arguments, sentence", [
    (["--operator", "soft"], "fastattn verify: operator must be one of attention"),
    (["--dtype", "float8"], "fastattn verify: dtype must be one of float32, float16, bfloat16, got 'float8'"),
    (["--backend", "gpu"], "fastattn verify: backend must be one of reference, cpu, triton, cuda, got 'gpu'"),
    (["--text", "/nowhere"], "there is no file /nowhere"),
])  # fmt: skip
def test_wrong_commands(arguments, sentence):
    done = run("verify", *arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr and "Traceback" not in done.stderr


def test_a_short_text_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("fastattn.verify.judge", lambda *arguments: pytest.fail("a case ran"))
    text = tmp_path / "text"
    text.write_text("abc")
    done = run("verify", "--text", str(text))
    assert done.exit_code == 2
    assert done.stderr.strip() == "fastattn verify: the text must have more than 256 bytes, got 3"


def test_models_are_compared_on_a_users_text(tmp_path):
    text = tmp_path / "text"
    text.write_text("to be or not to be, that is the question. " * 50)
    said = []
    reports = models.check_models(
        str(text), lambda what, share: said.append((what, share)), steps=12
    )
    for report in reports:
        assert all(report.checks.values()), report
        assert report.curve_difference < 1e-3 and len(report.losses["naive"]) == 12
        assert report.step_seconds.keys() == report.step_bytes.keys() == {"fused", "naive"}
    assert said[0][1] == 0 and all(0 <= share <= 1 for _, share in said)


def test_verify_ends_in_time_and_says_what_is_left():
    done = run("verify", "--dtype", "float32", "--backend", "cpu", "--seconds", "0")
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("fastattn verify: 0 passed, 0 failed, 0 declined, ")
    assert "not reached" in last and done.exit_code == 1  # nothing was proved
    assert sorted(spread(50)) == list(range(50))
    assert max(spread(50)[:10]) > 40 and min(spread(50)[:10]) < 10


@pytest.fixture
def raising_softmax():
    kernel = registry.kernel("softmax", "cpu")

    def forward(*arguments):
        raise RuntimeError("an illegal memory access\nin detail")

    registry.register("softmax", "cpu", kernel._replace(forward=forward))
    yield
    registry.register("softmax", "cpu", kernel)


def test_a_case_that_raises_is_wrong_and_the_others_go_on(raising_softmax):
    arguments = (
        "verify",
        "--operator",
        "softmax",
        "--operator",
        "gelu",
        "--dtype",
        "float32",
        "--backend",
        "cpu",
    )
    done = run(*arguments)
    assert done.exit_code == 1 and " 16 passed, 15 failed" in done.stdout
    assert "in float32 on cpu: RuntimeError: an illegal memory access" in done.stdout
    found = json.loads(run(*arguments, "--json").stdout)
    assert found["operators"][0]["raised"] == "RuntimeError: an illegal memory access"


def test_a_gpu_that_answers_no_more_ends_it(raising_softmax, monkeypatch):
    def dead():
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(
        verify.torch, "get_device_module", lambda kind: SimpleNamespace(synchronize=dead)
    )
    assert verify.lost("cuda") == "cuda answers no more: CUDA error: an illegal memory access"
    assert verify.lost("cpu") is None
    monkeypatch.setattr(verify, "lost", lambda device: "cuda answers no more")
    done = run("verify", "--operator", "softmax", "--dtype", "float32", "--backend", "cpu")
    assert done.exit_code == 1 and "wrong: cuda answers no more" in done.stdout
    assert "fastattn verify: 0 passed, 2 failed, 0 declined, 14 not reached" in done.stdout
