"""The table of cases: every backend, every instruction set and every dtype is right, or declines."""

import pytest
import torch

from fastattn import registry
from fastattn.kernels import native
from fastattn.verify import EMULATED
from fastattn.verify.cases import CASES
from fastattn.verify.judge import DTYPES, judge

# the emulated ones have tests of their own: tests/kernels
USABLE = [n for n, reason in registry.usable().items() if reason is None and n not in EMULATED]
ISAS = [i.name for i in native.isas() if i.runs_here]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@dtypes
def test_case(case, dtype):
    for backend in USABLE:
        verdict = judge(case, dtype, backend)
        assert not verdict.failed, verdict.explain()
        if verdict.declined is not None:
            assert backend in verdict.declined


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_instruction_set(isa, dtype):
    with native.use_isa(isa):
        wrong = [v.explain() for case in CASES if (v := judge(case, dtype, "cpu")).failed]
    assert not wrong


def test_the_cpu_declines_nothing():
    declined = [v.declined for case in CASES if (v := judge(case, torch.float32, "cpu")).declined]
    assert not declined


def test_names_of_cases_differ():
    assert len({case.id for case in CASES}) == len(CASES)
