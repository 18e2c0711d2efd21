"""Runs as data: growth, files, and what two of them differ in."""

import copy
import json

import pytest

from fastattn.bench import Results, compare, read
from fastattn.bench.harness import measure
from fastattn.bench.results import about
from fastattn.bench.workload import NAIVE, OURS

from .tiny import FakeClock, workload


@pytest.fixture(scope="module")
def results():
    clock = FakeClock()
    found = Results(about=about("cpu", True), ceilings={"float32": {"flops": 1e3, "bytes": 1e2}})
    for S, B in ((4, 4), (8, 2), (16, 1)):
        seconds = (1.0, float(S * S * B), 4.0)
        rows, absent = measure(workload(clock, seconds, S, B), clock, budget=0.0)
        found.rows += rows
        found.absent += absent
    return found


def test_growth_is_of_one_sequence(results):
    time = {g.contestant: g.time for g in results.growth() if g.direction == "forward"}
    assert time[NAIVE] == pytest.approx(2.0) and time[OURS] == pytest.approx(1.0)
    assert all(g.memory is None for g in results.growth())  # bytes, not megabytes


def test_percent_is_of_the_ceiling_of_what_the_work_is_measured_in(results):
    row = results.rows[0]
    assert (row.contestant, row.direction, row.moved) == (OURS, "forward", 32)
    assert results.percent(row) == pytest.approx(32.0)


def test_a_file_is_the_run(results, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(results.as_json(), allow_nan=False))
    again = read(path)
    assert again == results
    for name in ("machine", "threads", "versions", "date", "commit", "instruction_set"):
        assert name in again.about
    assert again.about["machine"]["cores"] > 0 and "torch" in again.about["versions"]


@pytest.mark.parametrize("text, sentence", [
    ("{", "is not JSON"), ("[]", "does not hold results of fastattn bench, format 1"),
    ('{"format": 0}', "does not hold results of fastattn bench, format 1"),
])  # fmt: skip
def test_other_files_are_refused(tmp_path, text, sentence):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read(path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read(tmp_path / "b.json")


def slower(results, factor, spread):
    """The same run with everything of ours so many times as long."""
    other = copy.deepcopy(results)
    for row in other.rows:
        row.low, row.high = row.seconds * (1 - spread), row.seconds * (1 + spread)
        if row.contestant == OURS:
            row.seconds, row.low, row.high = (factor * x for x in (row.seconds, row.low, row.high))
            row.ratios[NAIVE] /= factor
    return other


def test_changes_beyond_noise(results):
    before = slower(results, 1.0, 0.1)
    assert not any(c.beyond_noise for c in compare(before, before))
    changes = compare(before, slower(results, 1.5, 0.1))
    beyond = [c for c in changes if c.beyond_noise]
    assert {c.row.contestant for c in beyond} == {OURS} and len(beyond) == 9
    assert beyond == changes[:9]
    assert all(c.factor == pytest.approx(1.5) == c.relative for c in beyond)
    # the quartiles meet
    assert not any(c.beyond_noise for c in compare(before, slower(results, 1.15, 0.1)))
    # they do not, and it is too little to matter
    still = slower(results, 1.0, 0.001)
    assert not any(c.beyond_noise for c in compare(still, slower(results, 1.04, 0.001)))
