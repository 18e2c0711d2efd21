"""Triton's kernels by the table of cases: interpreted here, or launched with --device cuda."""

import pytest
import torch

from fastattn import emulate
from fastattn.verify.judge import judge, run

from . import pick

pytest.importorskip("triton")

A_CPU_S_ALONE = {"linear"}  # with weights in few bits: elsewhere the reference serves it


def check(case, dtype, device):
    verdict = judge(case, dtype, "triton", device)
    assert not verdict.failed, verdict.explain()
    if verdict.declined is not None:
        assert "triton" in verdict.declined
        assert case.feature == "head dimension" or case.operator in A_CPU_S_ALONE


@pick.in_one_dtype(pick.of())
def test_case(case, dtype, device):
    check(case, dtype, device)


@pytest.mark.slow
@pick.in_the_others(pick.of())
def test_case_in_another_dtype(case, dtype, device):
    check(case, dtype, device)


small = pick.named(
    "attention-combined-everything", "attention-packed-cross,_all", "attention-bias-1hqk",
    "attention-few_queries-grouped", "layer_norm-residual-C=33", "softmax-causal-20x33",
    "cross_entropy-z_loss-0.01", "gelu-tanh_and_bias-C=33", "swiglu-plain-C=33",
    "rotary-interleaved-positions", "rotary-halves,_learned-positions",
)  # fmt: skip


@small
def test_no_two_programs_touch_the_same(case):
    with emulate.options(races=True):
        assert judge(case, torch.float32, "triton").passed


@small
def test_same_bits_in_any_order_of_the_programs(case):
    first = run(case, torch.bfloat16, "triton")
    for order in ("reverse", 1):
        with emulate.options(order=order):
            again = run(case, torch.bfloat16, "triton")
        assert all(torch.equal(first[n].nan_to_num(), again[n].nan_to_num()) for n in first)
