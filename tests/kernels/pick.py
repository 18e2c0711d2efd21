"""Which cases of the table a backend's tests run, and when: each in one dtype is a fast test, the rest are slow."""

import pytest

from fastattn.verify.cases import CASES
from fastattn.verify.judge import DTYPES


def name(value):
    return getattr(value, "id", str(value).removeprefix("torch."))


def of(*operators):
    """The cases of these operators; of all where none is named."""
    return [case for case in CASES if not operators or case.operator in operators]


def in_one_dtype(cases):
    """Marks a test of (case, dtype): every case in one dtype, all dtypes in turn."""
    return pytest.mark.parametrize("case, dtype", one_each(cases), ids=name)


def in_the_others(cases):
    first = one_each(cases)
    rest = [(case, dtype) for case in cases for dtype in DTYPES if (case, dtype) not in first]
    return pytest.mark.parametrize("case, dtype", rest, ids=name)


def one_each(cases):
    return [(case, DTYPES[at % len(DTYPES)]) for at, case in enumerate(cases)]


def named(*ids):
    """Marks a test of (case): these, by id."""
    found = [case for case in CASES if case.id in ids]
    assert len(found) == len(ids), set(ids) - {case.id for case in found}
    return pytest.mark.parametrize("case", found, ids=name)
