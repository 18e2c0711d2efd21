"""The judge finds what is wrong: a kernel that errs by a little, or somewhere only, must fail."""

import pytest
import torch

from fastattn import registry
from fastattn.verify.cases import CASES, Case
from fastattn.verify.judge import judge, ratio

ATTENTION = next(c for c in CASES if c.id == "attention-causal-67x1")
SOFTMAX = next(c for c in CASES if c.id == "softmax-plain-C=33")


@pytest.fixture
def broken():
    """Registers a wrapped kernel for a while."""
    saved = []

    def wrap(operator, change):
        kernel = registry.kernel(operator, "cpu")
        saved.append((operator, kernel))
        forward = lambda *arguments: change(kernel.forward(*arguments))  # noqa: E731
        registry.register(operator, "cpu", kernel._replace(forward=forward))

    yield wrap
    for operator, kernel in saved:
        registry.register(operator, "cpu", kernel)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx * 1.001


@pytest.mark.parametrize("name, change", [
    ("one per mille", lambda y: y * 1.001),
    ("a NaN", lambda y: y.index_fill(-1, torch.tensor([0]), torch.nan)),
    ("an infinity", lambda y: y.index_fill(-1, torch.tensor([0]), torch.inf)),
    ("one entry", lambda y: y + torch.eye(*y.shape) * 1e-4),
    ("the gradient", WrongGradient.apply),
    ("the shape", lambda y: y[:-1]),
])  # fmt: skip
def test_wrong_softmax(broken, name, change):
    assert judge(SOFTMAX, torch.float32, "cpu").passed
    broken("softmax", change)
    if name == "the shape":
        with pytest.raises((RuntimeError, AssertionError)):
            assert judge(SOFTMAX, torch.float32, "cpu").failed
            raise AssertionError
        return
    verdict = judge(SOFTMAX, torch.float32, "cpu")
    assert verdict.failed
    assert SOFTMAX.id in verdict.explain() and "times the allowance" in verdict.explain()


def test_wrong_lse(broken):
    assert judge(ATTENTION, torch.float32, "cpu").passed
    broken("attention", lambda all: (all[0], all[1] + 1e-4, all[2]))
    assert judge(ATTENTION, torch.float32, "cpu").failed


def test_ratio():
    truth = torch.tensor([1.0, torch.inf, torch.nan], dtype=torch.float64)
    x = truth.float()
    assert ratio(x, truth, x, torch.float32) == 0
    assert ratio(x.nan_to_num(0.0, torch.inf), truth, x, torch.float32) == float("inf")
    assert ratio(-x, truth, x, torch.float32) == float("inf")
    off = x + torch.tensor([1e-5, 0, 0])
    assert ratio(off, truth, x, torch.float32) == pytest.approx(5, rel=0.1)
    assert ratio(off, truth, off, torch.float32) < 1  # naive errs as much


def test_a_decline_is_neither():
    call = lambda x, backend, generator: (torch.ops.aten.relu(x["x"]),)  # noqa: E731

    def declines(x, backend, generator):
        raise ValueError("relu: backend 'cpu' cannot take this call on cpu. cpu: cpu has no relu")

    make = lambda: {"x": torch.ones(2, dtype=torch.float64)}  # noqa: E731
    verdict = judge(Case("relu", "plain", "", make, declines), torch.float32, "cpu")
    assert not verdict.passed and not verdict.failed and "no relu" in verdict.declined
    assert judge(Case("relu", "plain", "", make, call), torch.float32, "cpu").passed
