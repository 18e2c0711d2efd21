"""Features in any combination, and numbers at the edges: what nobody would write down as a case."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn.kernels import native
from fastattn.verify.cases import attention
from fastattn.verify.judge import DTYPES, baselines, judge, ratio, run

ISAS = [i.name for i in native.isas() if i.runs_here]
lengths = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 97, 130, 193])
dims = st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 24, 33, 64, 70])
broadcast = st.sampled_from(["", "", "k", "qk", "b11k", "b1qk", "1hqk", "bhqk", "11qk"])


@st.composite
def calls(draw):
    """Keywords of verify.cases.attention: any features together."""
    B, Hkv, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 4))
    options = {"B": B, "Hq": Hkv * group, "Hkv": Hkv, "D": draw(dims)}
    options["Dv"] = draw(st.one_of(st.just(options["D"]), dims))
    if draw(st.integers(0, 4)) == 0:
        parts = st.lists(st.sampled_from([0, 1, 5, 17, 40, 70]), min_size=B, max_size=B)
        options["seqlens"] = (tuple(draw(parts)), tuple(draw(parts)))
    else:
        options |= {"Sq": draw(lengths), "Sk": draw(lengths)}
        options |= {"bias": draw(broadcast), "mask": draw(broadcast), "dark": draw(st.booleans())}
        options["hole"] = draw(st.sampled_from([0.0, 0.0, 0.3])) if options["bias"] else 0.0
        options["layout"] = draw(st.sampled_from(["bhsd", "bshd", "sliced", "expanded"]))
        if draw(st.booleans()):
            valid = st.integers(0, options["Sk"])
            options["lengths"] = tuple(draw(st.lists(valid, min_size=B, max_size=B)))
    options["causal"] = draw(st.booleans())
    side = st.sampled_from([None, 0, 1, 5, 40])
    options["window"] = draw(st.one_of(st.none(), st.tuples(side, side)))
    options["slopes"] = draw(st.sampled_from(["", "h", "bh"]))
    options["softcap"] = draw(st.sampled_from([None, None, 1.0, 20.0]))
    options["sinks"] = draw(st.booleans())
    options["dropout_p"] = draw(st.sampled_from([0.0, 0.0, 0.2, 1.0]))
    options["scale"] = draw(st.sampled_from([None, None, 0.0, -0.3]))
    return options


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(options=calls(), dtype=st.sampled_from(DTYPES), isa=st.sampled_from(ISAS))
def test_any_features_together(options, dtype, isa):
    with native.use_isa(isa):
        verdict = judge(attention("any", str(options), **options), dtype, "cpu")
    assert verdict.passed, verdict.explain()


@pytest.mark.slow
@settings(
    max_examples=3000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(options=calls(), dtype=st.sampled_from(DTYPES), isa=st.sampled_from(ISAS))
def test_many_features_together(options, dtype, isa):
    with native.use_isa(isa):
        verdict = judge(attention("many", str(options), **options), dtype, "cpu")
    assert verdict.passed, verdict.explain()


@pytest.mark.parametrize("isa", ISAS)
def test_every_remainder_of_a_vector(isa):
    """Lengths around two vectors of the widest set, in queries, keys and both head dimensions."""
    wrong = []
    with native.use_isa(isa):
        for n in range(1, 36):
            for options in (
                {"Sq": n, "Sk": 20, "D": 4}, {"Sq": 3, "Sk": n, "D": 4}, {"Sq": 20, "Sk": 7, "D": n},
                {"Sq": 20, "Sk": 7, "D": 4, "Dv": n}, {"Sq": 50 + n, "Sk": 50 + n, "D": 4, "causal": True},
            ):  # fmt: skip
                verdict = judge(
                    attention("remainder", f"{options}", **options), torch.float32, "cpu"
                )
                wrong += [] if verdict.passed else [verdict.explain()]
    assert not wrong


@pytest.mark.parametrize("Sq, Sk", [(4, 32768), (32768, 4)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums(Sq, Sk, dtype):
    case = attention("long", f"{Sq}x{Sk}", B=1, Hq=1, Sq=Sq, Sk=Sk, D=8, bias="1")
    verdict = judge(case, dtype, "cpu")
    assert verdict.passed, verdict.explain()


@pytest.mark.parametrize("S, D", [(128, 64), (700, 64), (300, 128)])
def test_causal_gradients_are_as_accurate_as_naive_pytorchs(S, D):
    case = attention("causal", f"S={S} D={D}", B=1, Sq=S, Sk=S, D=D, causal=True)
    truth, naive = baselines(case, torch.float32)
    found = run(case, torch.float32, "cpu")
    for name in truth:
        error, baseline = ((x[name] - truth[name]).abs().max() for x in (found, naive))
        assert error <= 2 * baseline, name


# ---- numbers at the edges -----------------------------------------------------------------------


def both(function, *inputs):
    """(found, truth) of outputs and gradients, on the CPU kernels and in fp64."""
    results = []
    for backend, cast in (("cpu", lambda x: x), ("reference", torch.Tensor.double)):
        leaves = [cast(x).detach().requires_grad_() for x in inputs]
        with fa.use_backend(backend):
            out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    return zip(*results, strict=True)


def right(found, truth, dtype=torch.float32):
    assert ratio(found, truth, truth, dtype) <= 1


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e4])
def test_tiny_and_huge_logits(size):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 4) for _ in range(3))
    for found, truth in both(fa.attention, q, k * size, v):
        right(found, truth)
    x = torch.randn(5, 33) * size
    for found, truth in both(fa.softmax, x):
        right(found, truth)
    for found, truth in both(lambda x: fa.cross_entropy(x, torch.arange(5)), x):
        right(found, truth)


def test_one_hot_attention_has_zero_gradients():
    """Logits of 1e4 give all the weight to one key: no gradient of query and key, and no NaN."""
    q = torch.eye(8)[None, None] * 1e4
    k, v = torch.eye(8)[None, None].clone(), torch.randn(1, 1, 8, 8)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = fa.attention(*leaves, backend="cpu")
    assert torch.equal(out, v)
    dq, dk, dv = torch.autograd.grad(out.square().sum(), leaves)
    assert (dq == 0).all() and (dk == 0).all()
    torch.testing.assert_close(dv, 2 * v)


def test_subnormals_and_infinities_in_rows():
    x = torch.tensor([[1e-45, 2e-40, -1e-39], [0.0, -0.0, 1e-38], [-torch.inf, 0.0, 1.0]])
    right(fa.softmax(x, backend="cpu"), x.double().softmax(-1))
    assert fa.softmax(torch.tensor([[torch.inf, 0.0]]), backend="cpu").isnan().any()
    assert fa.softmax(torch.tensor([[torch.nan, 0.0]]), backend="cpu").isnan().all()
    logits = torch.tensor([[-torch.inf, 0.0, 1.0]])
    loss = fa.cross_entropy(logits, torch.tensor([0]), backend="cpu")
    assert loss == torch.inf
    for function in (fa.layer_norm, fa.rms_norm):
        right(function(x[:2], backend="cpu"), function(x[:2].double(), backend="reference"))
    assert fa.gelu(torch.tensor([torch.inf, -200.0, torch.nan]), backend="cpu").tolist()[:2] == [
        torch.inf,
        0,
    ]


def test_nan_in_a_query_stays_in_its_row():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 40, 8) for _ in range(3))
    clean = fa.attention(q, k, v, backend="cpu")
    q[0, 0, 7, 3] = torch.nan
    out = fa.attention(q, k, v, backend="cpu")
    assert out[0, 0, 7].isnan().all()
    others = torch.arange(40) != 7
    assert torch.equal(out[0, 0, others], clean[0, 0, others])


def test_fp16_at_its_edge():
    """Scores beyond 65504 are fine inside; results beyond it are infinite, as in PyTorch."""
    x = torch.full((1, 1, 4, 64), 100.0, dtype=torch.float16)
    out = fa.attention(x, x, x, scale=1.0, backend="cpu")  # scores of 640000
    assert torch.equal(out, x)
    big = torch.full((2, 8), 60000.0, dtype=torch.float16)
    assert torch.equal(fa.rms_norm(big, backend="cpu"), torch.ones_like(big))
    assert fa.layer_norm(big, backend="cpu").isfinite().all()
    summed = fa.layer_norm(big, residual=big, return_residual=True, backend="cpu")[1]
    assert (summed == torch.inf).all()


def test_garbage_in_unused_pages_and_past_the_length_never_leaks():
    torch.manual_seed(0)
    for page_size in (None, 4):
        cache = fa.KVCache(2, 1, 8, max_length=30, page_size=page_size)
        cache.key.fill_(torch.nan)
        cache.value.fill_(torch.inf)
        k, v = torch.randn(2, 1, 11, 8), torch.randn(2, 1, 11, 8)
        cache.append(k, v, new_lengths=[11, 6])
        q = torch.randn(2, 2, 2, 8)
        out = fa.attention_decode(q, cache, backend="cpu")
        for b, n in enumerate((11, 6)):
            alone = fa.attention(
                q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], causal=True
            )
            torch.testing.assert_close(out[b : b + 1], alone, atol=1e-6, rtol=1e-6)


def test_garbage_past_key_lengths_never_leaks_backward():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 40, 8) for _ in range(3))
    lengths = torch.tensor([25, 0])
    past = torch.arange(40) >= lengths[:, None]
    k, v = (x.masked_fill(past[:, None, :, None], torch.nan).requires_grad_() for x in (k, v))
    q.requires_grad_()
    dq, dk, dv = torch.autograd.grad(
        fa.attention(q, k, v, key_lengths=lengths).square().sum(), (q, k, v)
    )
    assert dq.isfinite().all() and (dq[1] == 0).all()
    for grad in (dk, dv):
        assert (grad.masked_select(past[:, None, :, None]) == 0).all() and grad.isfinite().all()
