"""The cases of `fastattn bench --quick` in pytest-benchmark: pytest benchmarks --benchmark-only

A contestant that is wrong fails here, and one that cannot take part is skipped with its reason.
pytest-benchmark times one after the other; for ratios that hold on a busy machine, use fastattn bench.
"""

import functools

import pytest
import torch

from fastattn.bench import Setting, workloads
from fastattn.bench.ceiling import device_clock
from fastattn.bench.harness import Entrant, judged, on_device

pytest.importorskip("pytest_benchmark", reason="pip install 'fastattn[bench]'")
SETTING = Setting(torch.float32, quick=True)
WORKLOADS = workloads([], [SETTING])


@functools.lru_cache(maxsize=1)
def verdicts(at):
    return {c.name: (c, found) for c, found in judged(WORKLOADS[at])}


def cases():
    for at, workload in enumerate(WORKLOADS):
        for direction in workload.directions:
            for contestant in workload.contestants:
                if direction == "forward" or contestant.backward:
                    name = f"{workload.name} {direction} {contestant.name}".replace(" ", "-")
                    yield pytest.param(at, direction, contestant.name, id=name)


@pytest.mark.parametrize("at, direction, name", list(cases()))
def test_family(benchmark, at, direction, name):
    workload = WORKLOADS[at]
    contestant, found = verdicts(at)[name]
    if isinstance(found, str):
        pytest.skip(found)
    assert found <= 1, f"{found:.3g} times the allowed error"
    inputs = on_device(workload)
    leaves = [x for x in inputs.values() if x.requires_grad]
    clock = device_clock(workload.device)
    benchmark.group = f"{workload.name} {direction}"
    entrant = Entrant(contestant, contestant.bind(inputs), direction, leaves, clock)
    with contestant.context():
        if direction != "backward":
            benchmark(entrant.once)
            return

        def forward():
            out = entrant.call()
            return (out, leaves, torch.ones_like(out)), {"allow_unused": True}

        benchmark.pedantic(torch.autograd.grad, setup=forward, rounds=10, warmup_rounds=1)
