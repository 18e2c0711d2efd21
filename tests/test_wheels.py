"""tools/wheels.py with commands that only pretend: what becomes a count, and what a reason."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

SCRIPT = Path(__file__).parents[1] / "tools" / "wheels.py"


def loaded():
    spec = importlib.util.spec_from_file_location("wheels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


wheels = loaded()
Cell = wheels.Cell
PIP = "Looking in indexes\nERROR: Could not find a version\nERROR: No matching distribution found for torch==2.9.0\n"
UV = """error: No solution found when resolving dependencies
  cause: Because torch==2.15.0 has no wheels with a matching Python implementation tag (e.g., `cp310`)
and you require torch==2.15.0, we can conclude that your requirements are unsatisfiable.

hint: You require CPython 3.10 (`cp310`), but we only found wheels for `torch` (v2.15.0) with others
"""
OLDER_UV = """  × No solution found when resolving dependencies:
  ╰─▶ Because torch==2.15.0 has no wheels with a matching Python implementation tag (e.g.,
      `cp310`), we can conclude that torch==2.15.0 cannot be used.
"""


def pretend(monkeypatch, **answers):
    """Each command answers by the first word of it that is named: (exit code, stdout, stderr)."""
    commands = []

    def run(*command, cwd=None):
        words = [str(word) for word in command]
        commands.append(words)
        found = next((a for name, a in answers.items() if name in " ".join(words)), (0, "", ""))
        return subprocess.CompletedProcess(words, *found)

    monkeypatch.setattr(wheels, "run", run)
    monkeypatch.setattr(
        wheels.shutil, "which", lambda name: None if name == "uv" else f"/bin/{name}"
    )
    return commands


def tried(tmp_path, path="/bin/python3.11"):
    return wheels.try_one("3.11", path, "2.13.0", tmp_path / "fastattn.whl", tmp_path)


VERIFIED = (0, json.dumps({"passed": 192, "failed": 0}), "")


def test_a_cell_installs_that_torch_and_the_wheel_and_counts_what_passed(monkeypatch, tmp_path):
    commands = pretend(monkeypatch, verify=VERIFIED)
    assert tried(tmp_path) == Cell("3.11", "2.13.0", installed=True, passed=192)
    assert [words[-1] for words in commands[1:3]] == ["torch==2.13.0", f"{tmp_path}/fastattn.whl"]
    assert commands[3][-1] == "--json" and "fastattn.attention" in commands[4][-1]


def test_what_does_not_install_is_a_reason_and_no_failure(monkeypatch, tmp_path):
    pretend(monkeypatch, torch=(1, "", PIP))
    cell = tried(tmp_path)
    assert cell.reason == "No matching distribution found for torch==2.9.0" and not cell.wrong
    assert tried(tmp_path, None).reason == "there is no Python 3.11 here"


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"verify": (1, json.dumps({"passed": 190, "failed": 2}), "")}, "190 passed, 2 failed"),
        ({"verify": (1, "", "Traceback\nImportError: _C.so: undefined symbol\n")}, "ImportError: _C.so: undefined symbol"),
        ({"verify": VERIFIED, "attention": (1, "", "ValueError: no\n")}, "192 passed; ValueError: no"),
    ],
)  # fmt: skip
def test_what_installs_and_fails_is_wrong(monkeypatch, tmp_path, answers, says):
    pretend(monkeypatch, **answers)
    cell = tried(tmp_path)
    assert cell.wrong and wheels.outcome(cell) == says


def test_installers_give_a_sentence():
    assert wheels.why(PIP) == "No matching distribution found for torch==2.9.0"
    for said in (UV, OLDER_UV):
        assert wheels.why(said) == (
            "Because torch==2.15.0 has no wheels with a matching Python implementation tag (e.g., `cp310`)"
        )
    assert wheels.why("one\n\nthe last \n") == "the last" and wheels.why(" ") == "no word of it"


def test_torches_are_the_last_of_every_minor_since_the_oldest_supported(monkeypatch):
    said = "torch (2.13.0)\nAvailable versions: 2.13.0+cpu, 2.13.0, 2.12.1, 2.12.0, 2.10.0, 2.9.1\n"
    pretend(monkeypatch, index=(0, said, ""))
    assert wheels.known_torches(["/bin/python3.11", None]) == ["2.10.0", "2.12.1", "2.13.0"]


def test_a_shim_that_does_not_start_is_no_python(monkeypatch):
    pretend(monkeypatch, ensurepip=(127, "", "pyenv: python3.12: command not found"))
    assert wheels.interpreter("3.12") is None


def test_the_table_has_counts_and_numbered_reasons():
    cells = [
        Cell("3.10", "2.10.0", True, 192), Cell("3.10", "2.13.0", True, 190, 2),
        Cell("3.9", "2.10.0", False, reason="no wheel"),
    ]  # fmt: skip
    assert wheels.as_markdown(cells).splitlines() == [
        "| Python | torch 2.10.0 | 2.13.0 |",
        "|---|---:|---:|",
        "| 3.9 | (1) | not tried |",
        "| 3.10 | 192 passed | 190 passed, 2 failed |",
        "",
        "1. no wheel",
    ]


def test_the_command_prints_json_and_fails_where_a_check_does(monkeypatch, tmp_path):
    wheel = tmp_path / "fastattn-1-cp310-abi3-any.whl"
    wheel.touch()
    app = typer.Typer()
    app.command()(wheels.main)
    arguments = ["--python", "3.11", "--torch", "2.13.0", "--wheel", str(wheel), "--json"]
    pretend(monkeypatch, verify=VERIFIED)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and json.loads(done.stdout)[0]["passed"] == 192
    assert "1 of 1 environments passed, 0 did not install" in done.stderr
    pretend(monkeypatch, verify=(1, json.dumps({"passed": 0, "failed": 1}), ""))
    assert CliRunner().invoke(app, arguments).exit_code == 1
    assert CliRunner().invoke(app, [*arguments, "--wheel", "/none.whl"]).exit_code == 2


def test_a_run_goes_on_where_another_stopped(monkeypatch, tmp_path):
    app, save = typer.Typer(), tmp_path / "cells.json"
    app.command()(wheels.main)
    (tmp_path / "a.whl").touch()
    arguments = ["--torch", "2.13.0", "--wheel", str(tmp_path / "a.whl"), "--save", str(save)]
    pretend(monkeypatch, verify=VERIFIED)
    CliRunner().invoke(app, [*arguments, "--python", "3.11"])
    commands = pretend(monkeypatch, verify=VERIFIED)
    done = CliRunner().invoke(app, [*arguments, "--python", "3.11,3.12"])
    assert "| 3.11 | 192 passed |\n| 3.12 | 192 passed |" in done.stdout
    assert len(json.loads(save.read_text())) == 2
    assert not any("python3.11" in " ".join(words[:3]) and "venv" in words for words in commands)
