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


def later(results, machine=1.0, spread=0.1, **factors):
    """The same run on a machine that takes so many times as long, and some by themselves as well."""
    other = copy.deepcopy(results)
    for row in other.rows:
        own = factors.get(row.contestant, 1.0)
        row.seconds *= machine * own
        row.low, row.high = row.seconds * (1 - spread), row.seconds * (1 + spread)
        row.ratios = {n: r * factors.get(n, 1.0) / own for n, r in row.ratios.items()}
        row.spreads = {n: [r * (1 - spread), r * (1 + spread)] for n, r in row.ratios.items()}
    return other


def beyond_noise(before, after):
    return [c for c in compare(before, after) if c.beyond_noise]


def test_changes_beyond_noise(results):
    before = later(results)
    assert not beyond_noise(before, before)
    found = beyond_noise(before, later(results, fastattn=1.5))
    assert {c.row.contestant for c in found} == {OURS} and len(found) == 9
    assert all(c.factor == pytest.approx(1.5) == c.relative for c in found)
    # the quartiles meet
    assert not beyond_noise(before, later(results, fastattn=1.15))
    # they do not, and it is too little to matter
    still = later(results, spread=0.001)
    assert not beyond_noise(still, later(results, spread=0.001, fastattn=1.04))


def test_what_the_machine_did_is_no_change(results):
    before = later(results)
    assert not beyond_noise(before, later(results, machine=3.0))
    # a machine that is faster hides nothing
    found = beyond_noise(before, later(results, machine=0.5, fastattn=1.5))
    ours = [c for c in found if c.row.contestant == OURS]
    assert len(ours) == 9
    assert all((c.factor, c.relative) == (pytest.approx(0.75), pytest.approx(1.5)) for c in ours)


def test_a_change_of_another_is_its_own(results):
    found = beyond_noise(later(results), later(results, peer=2.0))
    assert {c.row.contestant for c in found} == {"peer"}


def test_who_has_nobody_beside_it_is_held_to_its_own_time(results):
    alone = Results(copy.deepcopy([row for row in results.rows if row.contestant == OURS]))
    for row in alone.rows:
        row.ratios = {}
    found = beyond_noise(later(alone), later(alone, fastattn=2.0))
    assert len(found) == 9 and all(c.relative is None for c in found)
