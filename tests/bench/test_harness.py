"""The harness: who is timed, in what order, and what becomes of the times."""

import importlib
from itertools import pairwise

import pytest
import torch

from fastattn.bench.ceiling import ceiling
from fastattn.bench.families import FAMILIES
from fastattn.bench.harness import judged, measure, take_turns
from fastattn.bench.workload import NAIVE, OURS, Setting

from .tiny import FakeClock, workload


def test_the_wrong_and_the_absent_are_named_and_never_timed():
    clock = FakeClock()
    rows, absent = measure(workload(clock), clock, budget=20.0)
    assert {row.contestant for row in rows} == {OURS, NAIVE, "peer", "half"}
    reasons = {(a.contestant, a.wrong): a.reason for a in absent}
    assert reasons["absent", False] == "not here"
    assert reasons["wrong", True].startswith("wrong, and so not timed: ")
    assert reasons["half", False] == "forward only"
    assert {row.direction for row in rows if row.contestant == "half"} == {"forward"}


def test_an_error_of_ours_is_wrong_and_not_an_absence():
    def broken(x):
        raise RuntimeError("broken\nin detail")

    clock = FakeClock()
    rows, absent = measure(workload(clock, ours=broken), clock, budget=0.0)
    assert (OURS, "broken") in {(a.contestant, a.reason) for a in absent if a.wrong}
    assert OURS not in {row.contestant for row in rows} and len(rows) > 0


def test_times_and_ratios_are_medians_over_rounds():
    clock = FakeClock()
    rows, _ = measure(workload(clock), clock, budget=0.0)
    of = {row.contestant: row for row in rows if row.direction == "forward"}
    assert [of[name].seconds for name in (OURS, NAIVE, "peer")] == [1.0, 2.0, 4.0]
    assert of[OURS].ratios == {NAIVE: 2.0, "peer": 4.0, "half": 1.0}
    assert of["peer"].ratios == {OURS: 0.25}
    assert of["peer"].spreads == {OURS: pytest.approx([0.25, 0.25])}
    assert of[OURS].low == of[OURS].high == 1.0 and of[OURS].rounds == 5


def test_the_forward_pass_is_no_part_of_backward():
    clock = FakeClock()
    rows, _ = measure(workload(clock), clock, budget=0.0)
    seconds = {(row.direction, row.contestant): row.seconds for row in rows}
    assert seconds["backward", OURS] == 2.0 and seconds["both", OURS] == 3.0


def test_everyone_has_a_turn_at_being_first():
    class Entrant:
        def __init__(self, name, order):
            self.name, self.order = name, order

        def sample(self):
            self.order.append(self.name)
            return 1.0

    order = []
    entrants = {name: Entrant(name, order) for name in "abc"}
    times = take_turns(entrants, budget=150.0)
    rounds = ["".join(order[at : at + 3]) for at in range(0, len(order), 3)]
    assert len(rounds) == 51 and all(sorted(names) == list("abc") for names in rounds)
    for name in "abc":
        assert {names[0] for names in rounds} >= {name}
        assert len({before for before, after in pairwise(order[3:]) if after == name}) >= 2
    assert all(len(seconds) == 50 for seconds in times.values())


def test_memory_is_what_a_call_takes():
    clock = FakeClock()
    rows, _ = measure(workload(clock, S=4_000_000), clock, budget=0.0)
    found = {row.direction: row.bytes for row in rows if row.contestant == OURS}
    assert found["forward"] == pytest.approx(16e6, rel=0.1)
    assert found["backward"] == pytest.approx(16e6, rel=0.1)


def test_the_ceiling_is_measured():
    found = ceiling("cpu", torch.float32)
    assert found["flops"] > 1e8 and found["bytes"] > 1e7
    assert found["by"].startswith(("FMA loop, ", "product of "))


SMALL = {
    "attention_features": lambda file, s: file.workload(s, "bias", 1, 2, 16, 16, 8),
    "attention": lambda f, s: f.workload(s, 2, 2, 33, 16, True),
    "decode": lambda f, s: f.workload(s, 2, 4, 2, 33, 16),
    "norm": lambda f, s: f.workload(s, "layer_norm residual", 7, 33),
    "softmax": lambda f, s: f.workload(s, (2, 17, 17), True),
    "cross_entropy": lambda f, s: f.workload(s, 7, 50),
    "linear_cross_entropy": lambda f, s: f.workload(s, 7, 16, 50),
    "activation": lambda f, s: f.workload(s, "gelu tanh bias", 7, 33),
    "inference": lambda f, s: f.workload(s, "BERT padded", 3, 24, (16, 1, 2, 32)),
    "generation": lambda f, s: f.workload(s, 2, 8, (16, 1, 2, 32)),
    "models": lambda f, s: f.workload(s, "GPT-2", 2, 8, f.config("GPT-2", 8, 16, 1, 2, 32)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_contestant_of_a_family_is_right_or_says_why_not(family, dtype):
    file = importlib.import_module(f"fastattn.bench.families.{family}")
    found = {c: error for c, error, _ in judged(SMALL[family](file, Setting(dtype)))}
    errors = {c.name: e for c, e in found.items()}
    assert errors[OURS] <= 1, errors
    for name, error in errors.items():
        known = ("GPUs alone", "--compile", "not installed", "not tried in")
        assert any(word in error for word in known) if isinstance(error, str) else error <= 1, name


@pytest.mark.parametrize("case", ["layer_norm", "rms_norm"])
def test_other_cases_of_norm(case):
    from fastattn.bench.families import norm

    for contestant, error, _ in judged(norm.workload(Setting(torch.float32), case, 7, 33)):
        assert isinstance(error, str) or error <= 1, contestant.name


@pytest.mark.parametrize("case", ["gelu bias", "swiglu"])
def test_other_cases_of_activation(case):
    from fastattn.bench.families import activation

    for contestant, error, _ in judged(activation.workload(Setting(torch.float32), case, 7, 33)):
        assert isinstance(error, str) or error <= 1, contestant.name


def test_attention_in_parts_is_attention(monkeypatch):
    from fastattn.bench.families import attention

    monkeypatch.setattr(attention, "JUDGED_SCORES", 8 * 21)
    x = {n: torch.randn(1, 2, 21, 4, dtype=torch.float64) for n in ("query", "key", "value")}
    whole = attention.naive(**x, causal=True)
    assert torch.allclose(attention.naive_in_parts(x, True), whole, rtol=0, atol=1e-12)


def test_what_would_not_fit_is_refused(monkeypatch):
    from fastattn.bench import peers
    from fastattn.bench.families import attention

    monkeypatch.setattr(peers, "free_bytes", lambda device: 1000)
    small = attention.workload(Setting(torch.float32), 1, 1, 64, 16, False)
    found = {c.name: error for c, error, _ in judged(small)}
    assert (
        found[NAIVE]
        == found["sdpa math"]
        == ("scores of all queries and keys take 0.0 GB, and 0.0 GB are free")
    )
    assert found[OURS] <= 1
