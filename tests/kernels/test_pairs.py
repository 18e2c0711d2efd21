"""Products of bf16 in pairs: the processor's instruction and its plain form give the same bits."""

import pytest
import torch

import fastattn as fa
from fastattn.kernels import native

ISAS = [i.name for i in native.isas() if i.runs_here]
PAIRS = ("avx512_bf16", "generic16")


def chain(query, key, order):
    """query (R, D) by key (D,): fp32 sums of exact products in this order."""
    total = torch.zeros(query.shape[0])
    for d in order:
        total = total + query[:, d] * key[d]
    return total


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("D", [1, 2, 3, 24, 37, 59])
def test_a_score_is_one_chain_of_sums(isa, D):
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 40, D).bfloat16(), torch.randn(1, 1, 1, D).bfloat16()
    with native.use_isa(isa):
        _, score = fa.attention(query, key, key, scale=1.0, return_lse=True, backend="cpu")
    pairs = [d for first in range(0, D, 2) for d in (first + 1, first) if d < D]
    order = pairs if isa in PAIRS else range(D)
    # of a single key the lse is the score itself
    assert torch.equal(score[0, 0], chain(query[0, 0].float(), key[0, 0, 0].float(), order))
