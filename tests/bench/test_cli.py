"""fastattn bench as a user runs it, on tiny workloads."""

import json

import pytest
from typer.testing import CliRunner

from fastattn import bench
from fastattn.cli import app

from .tiny import workload


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def tiny(monkeypatch):
    """One family, of which a contestant is wrong."""
    monkeypatch.setattr(
        bench, "FAMILIES", {"double": lambda setting: (workload(S=S) for S in (8, 16))}
    )
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.0)
    ceiling = {"flops": 1e10, "bytes": 1e10, "by": "an FMA loop"}  # measured in test_harness.py
    monkeypatch.setattr(bench, "ceiling", lambda device, dtype: ceiling)


def test_tables_name_everyone(tiny):
    done = run("--quick")
    assert done.exit_code == 1  # one is wrong
    for words in ("double", "plain B1 S8", "times fastattn", "growth over S", "% "):
        assert words in done.stdout
    assert "left out: double, absent: not here" in done.stdout
    assert "left out: double, half, plain B1 S8; plain B1 S16: forward only" in done.stdout
    assert "wrong: double plain B1 S8 wrong: wrong, and so not timed" in done.stdout
    assert done.stdout.strip().splitlines()[-1].startswith("fastattn bench: 20 results, 2 wrong, ")


def test_json_is_json_and_the_file_is_the_same(tiny, tmp_path):
    path = tmp_path / "a.json"
    done = run("--quick", "--json", "--threads", "1", "--save", str(path))
    found = json.loads(done.stdout, parse_constant=pytest.fail)
    assert found == json.loads(path.read_text())
    assert found["threads"] == 1 and found["quick"] and len(found["rows"]) == 20
    assert found["ceilings"]["float32"]["by"] == "an FMA loop"
    assert {a["contestant"] for a in found["absent"]} == {"wrong", "absent", "half"}
    assert "fastattn bench: 20 results" in done.stderr


def test_compare(tiny, tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    run("--quick", "--save", str(a))
    data = json.loads(a.read_text())
    for row in data["rows"]:
        if row["contestant"] == "fastattn":
            for name in ("seconds", "low", "high"):
                row[name] *= 1000
            row["ratios"] = {n: r / 1000 for n, r in row["ratios"].items()}
            row["spreads"] = {n: [r / 1000 for r in s] for n, s in row["spreads"].items()}
    data["threads"] += 1
    b.write_text(json.dumps(data))
    done = run("--compare", str(a), str(b))
    assert done.exit_code == 1
    assert "1000.00" in done.stdout and "not the same threads" in done.stdout
    assert "half of all results took 1.00 times as long as before" in done.stdout
    assert "20 results in both, 6 changed beyond noise, fastattn slower in 6" in done.stdout
    same = run("--compare", str(a), str(a), "--json")
    assert same.exit_code == 0 and not any(c["beyond_noise"] for c in json.loads(same.stdout))


@pytest.mark.parametrize("arguments, sentence", [
    (["soft"], "fastattn bench: family must be one of attention, attention_features, decode"),
    (["--dtype", "float8"], "fastattn bench: dtype must be one of float32, float16, bfloat16"),
    (["--device", "gpu"], "fastattn bench: device 'gpu' cannot be used here"),
    (["--targets", "gelu", "--quick"], "fastattn bench: --targets has dtypes, sizes and times of its own"),
    (["--targets", "nothing"], "fastattn bench: no target has any of these words in it: nothing"),
    (["--compare", "/nowhere", "/nowhere"], "fastattn bench: /nowhere cannot be read"),
])  # fmt: skip
def test_wrong_commands(arguments, sentence):
    done = run(*arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr and "Traceback" not in done.stderr
