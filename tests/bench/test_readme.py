"""The README's section on performance says what the runs in results/ say, and nothing else."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastattn.bench import Results
from fastattn.bench.readme import NOTHING, performance
from fastattn.cli import app
from fastattn.cli.parts import read_part
from fastattn.cli.plot import read_runs, section

ROOT = Path(__file__).parents[2]
RUNS = read_runs(p for p in [ROOT / "results"] if p.is_dir())


def test_the_readme_has_what_results_say():
    assert read_part(ROOT / "README.md", "performance") == section(ROOT / "README.md", RUNS)


def test_pictures_of_the_readme_are_there_and_small():
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", read_part(ROOT / "README.md", "performance"))
    sizes = [(ROOT / path).stat().st_size for path in linked]
    assert sum(sizes) < 400_000
    kept = {str(path.relative_to(ROOT)) for path in (ROOT / "results").rglob("*.png")}
    assert kept == set(linked)


def test_committed_runs_say_how_they_were_made():
    for run in RUNS.values():
        if isinstance(run, Results):
            said = ("command", "commit", "date", "machine", "threads", "versions")
            assert all(run.about.get(name) for name in said)
            assert not run.about["commit"].endswith("+") and run.about["machine"]["flags"]


def test_a_run_becomes_text(results):
    text = performance([("results/mine.json", results)])
    assert "asked for" not in text and "growth with S" not in text
    assert "fastattn bench double --threads 3 --save mine.json" in text
    assert "fastattn bench --compare results/mine.json mine.json" in text
    for words in (
        "a processor, 3 threads of",
        "commit 0123",
        "torch 2.13",
        "2026-01-02",
        "an FMA loop",
    ):
        assert words in text
    assert "| family | dtype | direction | shapes | naive | peer | half |" in text
    assert "| double | float32 | forward | 3 | 2.00 | 4.00 | 1.00 |" in text
    assert "| double | float32 | both | 3 | 2.00 | 4.00 |  |" in text
    # shape, direction, ms, GB/s, of the ceiling, three peers, memory
    assert (
        "| plain B1 S16 | forward | 1000 | 1.28e-07 | 128 % | 2.00 | 4.00 | 1.00 | 0.0 | 0.0 |"
        in text
    )
    assert "backward |" not in text and "(results/mine-double-both-float32.png)" in text
    assert "Not timed: wrong (wrong, and so not timed: " in text and "absent (not here)" in text
    assert performance([]) == NOTHING


def test_verify_becomes_text(checks):
    text = performance([("results/gpu/verify.json", read_runs([checks])[checks])])
    assert "| operator | cpu | triton |" in text and "| 0.50 (1) | inf (1) |" in text
    assert text.startswith("**gpu/verify**: ") and "(results/gpu/verify-accuracy.png)" in text
    assert "1 passed, 1 failed, 1 declined ([`results/gpu/verify.json`]" in text


def test_plot_writes_the_readme_and_its_pictures(run_file, checks, tmp_path):
    pytest.importorskip("matplotlib")
    old = tmp_path / "run-old.png"
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "docs" / "README.md"
    old.write_bytes(b"")
    readme.write_text("a\n<!-- performance: x -->\nold\n<!-- end of performance -->\nb\n")
    done = CliRunner().invoke(app, ["plot", str(run_file), str(checks), "--readme", str(readme)])
    assert done.exit_code == 0, done.stderr
    text = readme.read_text()
    linked = re.findall(r"!\[[^]]*\]\(\.\./([^)]+)\)", text)
    assert "verify-accuracy.png" in linked and "run-double-both-float32.png" in linked
    assert {path.name for path in tmp_path.glob("*.png")} == set(linked)
    assert text.startswith("a\n<!-- performance: x -->\n**run**: ")
    assert text.endswith("\n<!-- end of performance -->\nb\n") and "\nold\n" not in text


def test_of_a_folder_the_runs_are_taken(run_file, checks, tmp_path):
    (tmp_path / "blocks.json").write_text('{"format": 1}')
    (tmp_path / "gpu").mkdir()
    checks.rename(tmp_path / "gpu" / "verify.json")
    assert list(read_runs([tmp_path])) == [tmp_path / "gpu" / "verify.json", run_file]


def test_a_readme_without_a_place_for_it(run_file, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    done = CliRunner().invoke(app, ["plot", str(run_file), "--readme", str(readme)])
    assert done.exit_code == 2 and "has no lines <!-- performance: ... -->" in done.stderr
    assert readme.read_text() == "nothing"


def test_targets_and_growth_become_tables(results):
    target = {
        "work": "double", "dtype": "float32", "direction": "both", "target": 1.8, "mean": 2.34, "least": 0.9,
        "reached": False,
    }  # fmt: skip
    rows = [replace(row, sizes={**row.sizes, "S": row.sizes["S"] ** 2}) for row in results.rows]
    text = performance([("results/mine.json", replace(results, rows=rows, targets=[target]))])
    assert "| double | float32 | both | 1.8 | 2.34 | 0.90 | no |" in text
    assert "| double plain | float32 | forward | 16 to 256 | 0.00 |  |" in text
    assert "growth with S" not in performance([("results/mine.json", results)])
