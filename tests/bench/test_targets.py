"""What fastattn bench --targets holds itself against, on tiny workloads."""

import pytest
import torch
from typer.testing import CliRunner

from fastattn.bench import targets
from fastattn.bench.families import attention, attention_features, generation, inference
from fastattn.bench.harness import Judged, judged, measure
from fastattn.bench.workload import NAIVE, OURS, Contestant, Setting
from fastattn.cli import app

FP32 = Setting(torch.float32)


def found(**seconds):
    bind = lambda x: None  # noqa: E731
    return [Judged(Contestant(name, bind), 0.0, time) for name, time in seconds.items()]


def test_who_is_far_behind_is_not_timed():
    told = targets.far_behind(found(fastattn=90.0, naive=40.0, sdpa=4.0))
    assert told == {NAIVE: "judged, it took 10 times as long as the best"}
    assert not targets.far_behind(found(fastattn=9.0, naive=0.4, sdpa=0.01))  # too short to tell
    assert not targets.far_behind(found(fastattn=9.0))
    alone = (targets.ONE_THREAD,)
    assert list(targets.far_behind(found(naive=1.0, **{alone[0]: 4.0}), alone)) == [NAIVE]
    assert not targets.far_behind(found(**{alone[0]: 4.0}), alone)


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="two threads are compared with one")
def test_two_threads_are_held_against_one(monkeypatch):
    monkeypatch.setattr(targets, "SHAPES", ((1, 2, 64, 16, False),))
    threads = []
    (workload,) = targets.over_one_thread(FP32)
    alone = workload.contestants[-1]
    with alone.context():
        threads.append(torch.get_num_threads())
    threads.append(torch.get_num_threads())
    assert threads[0] == 1 and threads[1] > 1
    target = next(t for t in targets.TARGETS if t.threads == 2 and "over one" in t.work)
    results = targets.Results()
    got = targets.reach(target, torch.float32, targets.device_clock("cpu"), 0.0, results)
    assert got["mean"] > 0 and {row.contestant for row in results.rows} == {OURS, alone.name}


def test_growth_alone(monkeypatch):
    monkeypatch.setattr(targets, "LENGTHS", (64, 256))
    monkeypatch.setattr(targets, "WINDOW_LENGTHS", (64, 128))
    monkeypatch.setattr(attention_features, "LONG_WINDOW", 32)
    results = targets.run_targets(["growth"], seconds=0.0)
    assert not results.wrong and not results.targets
    assert {g.case for g in results.growth() if g.contestant == OURS} == {"causal", "window 32"}
    assert {row.sizes["S"] for row in results.rows} == {64, 128, 256}
    assert results.about["command"].startswith("fastattn bench --targets growth --threads ")


def test_whole_models_are_held_against_transformers_and_a_floor(monkeypatch):
    pytest.importorskip("transformers")
    tiny = targets.whole("tiny", 0.1, generation.workload, 1, 8, (16, 1, 2, 32))
    monkeypatch.setattr(targets, "TARGETS", (tiny,))
    results = targets.run_targets(["tiny"], seconds=0.0)
    (got,) = results.targets
    assert {row.contestant for row in results.rows} == {OURS, inference.RIVAL} and got["mean"] > 0
    assert results.ceilings["float32"]["read"] > 1e7
    assert all(
        row.bound == "read" and row.moved == 4 * (12 * 256 + 32 * 16 + 2 * 9 * 16)
        for row in results.rows
    )


def test_without_transformers_a_whole_model_reaches_nothing(monkeypatch):
    tiny = targets.whole("tiny", 0.1, inference.workload, "BERT padded", 3, 24, (16, 1, 2, 32))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    results = targets.Results()
    got = targets.reach(tiny, torch.float32, targets.device_clock("cpu"), 0.0, results)
    assert not got["reached"] and {row.contestant for row in results.rows} == {OURS}
    assert [a.reason for a in results.absent if a.contestant == inference.RIVAL] == [
        "transformers is not installed"
    ]


def test_one_target_from_the_command_line():
    done = CliRunner().invoke(app, ["bench", "--targets", "tiny", "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert "a tiny call" in done.stdout and "two threads" not in done.stdout


def test_words_choose_dtypes_too(monkeypatch):
    asked = []
    monkeypatch.setattr(
        targets, "reach", lambda target, dtype, *rest: asked.append((target.work, dtype))
    )
    targets.run_targets(["decode, bfloat16", "tiny"])
    assert asked == [("decode", torch.bfloat16), ("a tiny call", torch.float32)]


def test_every_direction_that_is_asked_for_is_measured():
    small = attention.workload(FP32, 1, 1, 16, 16, False)
    rows, _ = measure(targets.against_torch(small, "both"), targets.device_clock("cpu"), 0.0)
    assert {row.direction for row in rows} == {"both"}
    assert {row.contestant for row in rows} == {OURS, NAIVE, "sdpa flash", "sdpa math"}
    assert all(j.seconds > 0 for j in judged(small) if not isinstance(j.error, str))
