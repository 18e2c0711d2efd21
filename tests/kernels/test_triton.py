"""Triton's kernels by the table of cases: interpreted here, or launched with --device cuda."""

import pytest
import torch

import fastattn as fa
from fastattn import emulate
from fastattn.kernels.reference.philox import keep_mask
from fastattn.verify.cases import attention
from fastattn.verify.judge import DTYPES, judge, run

from . import pick

pytest.importorskip("triton")


def check(case, dtype, device):
    verdict = judge(case, dtype, "triton", device)
    assert not verdict.failed, verdict.explain()
    if verdict.declined is not None:
        assert "triton" in verdict.declined
        assert case.feature == "head dimension"


@pick.in_one_dtype(pick.of())
def test_case(case, dtype, device):
    check(case, dtype, device)


@pytest.mark.slow
@pick.in_the_others(pick.of())
def test_case_in_another_dtype(case, dtype, device):
    check(case, dtype, device)


def test_heads_wider_than_256_are_declined():
    x = torch.zeros(1, 1, 4, 257)
    with pytest.raises(ValueError, match="triton: heads of up to 256 channels, got 257"):
        fa.attention(x, x, x, backend="triton")
    with pytest.raises(ValueError, match="triton computes bfloat16, float16, float32, not float64"):
        fa.attention(*[x[..., :8].double()] * 3, backend="triton")


@pytest.mark.parametrize("Sq, Sk", [(5, 40), (70, 33)])
def test_dropout_drops_what_the_reference_drops(Sq, Sk, device):
    """Values that are one-hot in the key show each weight: 0 where dropped."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, Sq, 16, device=device), torch.randn(2, 2, Sk, 16, device=device)
    v = torch.eye(Sk, device=device).expand(2, 2, Sk, Sk)
    generator = torch.Generator(device).manual_seed(3)
    found = fa.attention(q, k, v, dropout_p=0.4, generator=generator, backend="triton") != 0
    generator.manual_seed(3)
    philox = torch.randint(0, 2**31, (2,), dtype=torch.int64, device=device, generator=generator)
    planes = torch.arange(8, device=device).reshape(2, 4, 1)
    kept = keep_mask(torch.arange(Sq, device=device), planes, Sk, philox, 0.4)
    assert torch.equal(found, kept)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=pick.name)
def test_long_sums(dtype):
    """A running sum that is rounded to 16 bits once a tile would show here, and only here."""
    case = attention("long", "4x4096", B=1, Hq=1, Sq=20, Sk=4096, D=16, causal=True)
    assert judge(case, dtype, "triton").passed


@pytest.mark.parametrize("dtype", DTYPES, ids=pick.name)
def test_a_row_that_sees_one_key_has_no_gradient_of_its_score_under_dropout(dtype, device):
    """1 / (1 - p) is inexact: sum(dO * O) would leave a rounding of dP in 16 bits in place of 0. What fp32
    leaves, 1e-6 of dP, a slope adds up over 120 rows of distances up to 30."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 2, 30, 16, dtype=dtype, device=device).requires_grad_() for _ in "qkv"
    )
    slopes = torch.rand(2, device=device, requires_grad=True)
    mask = torch.eye(30, dtype=torch.bool, device=device).flip(-1)
    out = fa.attention(q, k, v, mask=mask, alibi_slopes=slopes, dropout_p=0.2, backend="triton")
    grads = torch.autograd.grad(out.square().sum(), (q, k, slopes))
    assert max(x.abs().max().item() for x in grads) < 4e-3


def test_neighbours_in_the_batch_change_no_bit(device):
    torch.manual_seed(0)
    for Sq, Sk in ((1, 700), (40, 50)):
        q, k, v = (torch.randn(3, 2, s, 16, device=device) for s in (Sq, Sk, Sk))
        lengths = torch.tensor([Sk, 9, 20], device=device)
        options = {"causal": True, "backend": "triton"}
        together = fa.attention(q, k, v, key_lengths=lengths, **options)
        for b in range(3):
            rows = slice(b, b + 1)
            alone = fa.attention(q[rows], k[rows], v[rows], key_lengths=lengths[rows], **options)
            assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("page_size", [None, 4, 7])
@pytest.mark.parametrize("Sq", [1, 3])
def test_decoding_over_a_cache(page_size, Sq, device):
    """NaN in what is not held; the gradient of the query; slopes and a mask."""
    torch.manual_seed(0)
    cache = fa.KVCache(2, 2, 16, max_length=700, page_size=page_size, device=device)
    cache.key.fill_(torch.nan)
    cache.value.fill_(torch.nan)
    k, v = (torch.randn(2, 2, 650, 16, device=device) for _ in range(2))
    cache.append(k, v, new_lengths=[650, 311])
    q = torch.randn(2, 4, Sq, 16, device=device, requires_grad=True)
    options = {
        "alibi_slopes": torch.rand(4, device=device),
        "window": (600, None),
        "return_lse": True,
    }
    results = []
    for backend in ("triton", "reference"):
        out, lse = fa.attention_decode(q, cache, **options, backend=backend)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), q)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-6)
