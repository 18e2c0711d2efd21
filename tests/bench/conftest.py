"""A run of fastattn bench and one of fastattn verify, made of next to nothing."""

import json

import pytest
import torch

from fastattn.bench import Results
from fastattn.bench.harness import measure
from fastattn.bench.results import about
from fastattn.verify import Report
from fastattn.verify.cases import CASES
from fastattn.verify.judge import Verdict

from .tiny import FakeClock, workload

ABOUT = {
    "command": "fastattn bench double --threads 3", "threads": 3, "commit": "0123", "seconds": 150,
    "date": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.13"},
    "machine": {"processor": "a processor", "cores": 4, "flags": ["avx2", "fma"]},
}  # fmt: skip


@pytest.fixture(scope="session")
def results():
    """Three lengths; ours takes 1 s, naive 2, a peer 4."""
    clock = FakeClock()
    ceiling = {"flops": 1e3, "bytes": 1e2, "by": "an FMA loop"}
    found = Results(about=about("cpu", True) | ABOUT, ceilings={"float32": ceiling})
    for S in (4, 8, 16):
        rows, absent = measure(workload(clock, S=S), clock, budget=0.0)
        found.rows += rows
        found.absent += absent
    for row in found.rows:
        row.bytes = 1000 * row.sizes["S"]
    return found


@pytest.fixture
def run_file(results, tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(results.as_json()))
    return path


@pytest.fixture
def checks(tmp_path):
    """A file of fastattn verify --json, with an error that was infinite and a case that was declined."""
    case = CASES[0]
    verdicts = [
        Verdict(case, torch.float32, "cpu", errors=(("output 0", 0.5), ("d x", 0.25))),
        Verdict(case, torch.float32, "triton", errors=(("output 0", float("inf")),)),
        Verdict(case, torch.bfloat16, "cuda", declined="not this"),
    ]
    path = tmp_path / "verify.json"
    path.write_text(json.dumps(Report(verdicts=verdicts).as_json()))
    return path
