"""Features in any combination, and numbers at the edges: what nobody would write down as a case."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn as fa
from fastattn.kernels import native
from fastattn.verify.cases import attention, rows_case
from fastattn.verify.judge import DTYPES, baselines, judge, ratio, run

ISAS = [i.name for i in native.isas() if i.runs_here]
lengths = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 97, 130, 193])
dims = st.sampled_from([1, 2, 3, 5, 8, 15, 16, 17, 24, 33, 64, 70])
shapes = ["".join(dims) for dims in itertools.product("b1", "h1", "q1", "k1")]
broadcast = st.sampled_from(["", "k", "qk", *shapes]) | st.just("")


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
        options["wide"] = draw(st.booleans())
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


FEW = 16  # numbers: of these naive PyTorch may have all right to the last bit, by chance


def keeps_the_rule(options, dtype, isa, make=attention):
    """A tensor of few numbers is held to the rule together with those of seven more draws, where it fails
    alone: the largest error of a handful of numbers says little of how large errors are."""
    case = make("any", str(options), **options)
    with native.use_isa(isa):
        verdict = judge(case, dtype, "cpu")
        truth = baselines(case, dtype)[0]
        doubtful = {name for name, r in verdict.errors if 1 < r < torch.inf}
        assert {name for name, r in verdict.errors if r <= 1} | doubtful == truth.keys(), (
            verdict.explain()
        )
        assert all(truth[name].numel() <= FEW for name in doubtful), verdict.explain()
        if doubtful:
            errors = together(options, dtype, doubtful, make)
            assert max(errors.values()) <= 1, f"{verdict.explain()}; of eight draws: {errors}"


def together(options, dtype, names, make):
    """Error over allowance of the named tensors of eight draws, as if they were one."""
    found, truth, naive = [], [], []
    for draw in range(8):
        case = make(f"draw {draw}", str(options), **options)
        found.append(run(case, dtype, "cpu"))
        for kept, results in zip((truth, naive), baselines(case, dtype), strict=True):
            kept.append(results)
    joined = {n: [torch.stack([r[n] for r in x]) for x in (found, truth, naive)] for n in names}
    return {name: ratio(*tensors, dtype) for name, tensors in joined.items()}


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(options=calls(), dtype=st.sampled_from(DTYPES), isa=st.sampled_from(ISAS))
def test_any_features_together(options, dtype, isa):
    keeps_the_rule(options, dtype, isa)


@pytest.mark.slow
@settings(
    max_examples=3000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(options=calls(), dtype=st.sampled_from(DTYPES), isa=st.sampled_from(ISAS))
def test_many_features_together(options, dtype, isa):
    keeps_the_rule(options, dtype, isa)


LAYOUTS = {
    "contiguous": lambda x: x,
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "turned": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "spread": lambda x: torch.stack([x, x], -1)[..., 0],
}


@st.composite
def row_calls(draw):
    """Keywords of `rows`: a row operator, any of its options, rows in any number of dimensions."""
    operator = draw(st.sampled_from(sorted(ROWS)))
    leading = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5, 17]), max_size=3)))
    columns = [1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 97, 130, 259]
    return {
        "operator": operator,
        "shape": (*leading, draw(st.sampled_from(columns))),
        "layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "wide": draw(st.booleans()),
        "size": draw(st.sampled_from([0.0, 1e-3, 1.0, 1.0, 10.0])),
        "options": draw(st.fixed_dictionaries({}, optional=ROWS[operator])),
    }


dropouts = st.sampled_from([0.2, 1.0])
norms = {
    "weight": st.just(True), "residual": st.just(True), "return_residual": st.just(True),
    "dropout_p": dropouts, "eps": st.sampled_from([1e-3, 1e-6]),
}  # fmt: skip
losses = {
    "ignore_index": st.sampled_from([0, 1]), "label_smoothing": st.sampled_from([0.1, 1.0]),
    "z_loss": st.just(0.01), "reduction": st.sampled_from(["sum", "none"]),
}  # fmt: skip
forms = {"approximate": st.just("tanh")}
ROWS = {
    "layer_norm": norms | {"bias": st.just(True)},
    "rms_norm": norms | {"weight_offset": st.just(1.0)},
    "softmax": {"causal": st.just(True), "scale": st.sampled_from([-0.3, 7.0]), "mask": st.just(True)},
    "cross_entropy": losses,
    "linear_cross_entropy": losses | {"bias": st.just(True)},
    "gelu": forms | {"bias": st.just(True)},
    "geglu": forms,
    "swiglu": {},
    "rotary": {"interleaved": st.just(True)},
}  # fmt: skip


def rows(draw, name, *, operator, shape, layout, wide, size, options):
    """One call as a case. wide: weights, bias and residual are fp32 beside whatever x is."""
    C, options = shape[-1], dict(options)
    shapes, kept = {"x": shape}, {}
    if operator in ("swiglu", "geglu"):
        shapes = {"gate": shape, "up": shape}
    if operator == "cross_entropy":
        shapes = {"logits": shape}
    if operator == "linear_cross_entropy":
        shapes = {"hidden": shape, "weight": (11, C)}
    if operator == "rotary":
        shape = (1, 1, 1, 1)[: 4 - len(shape)] + shape
        shapes = {"x": shape, "cos": (20, C // 2), "sin": (20, C // 2)}
    for option in ("weight", "bias", "residual"):
        if options.pop(option, False):
            columns = 11 if operator == "linear_cross_entropy" else C
            shapes[option] = shape if option == "residual" else (columns,)
    generator = torch.Generator().manual_seed(len(name))
    if "entropy" in operator:
        V = C if operator == "cross_entropy" else 11
        kept["target"] = torch.randint(0, V, shape[:-1], generator=generator)
    if options.pop("mask", False):
        kept["mask"] = torch.rand(shape, generator=generator) < 0.5
    options["causal"] = options.get("causal", False) and len(shape) > 1
    if operator != "softmax":
        del options["causal"]
    first = next(iter(shapes))

    def call(x, backend, g):
        x = {n: LAYOUTS[layout](t) if n == first else t for n, t in x.items()}
        more = {"generator": g} if operator in ("layer_norm", "rms_norm") else {}
        return getattr(fa, operator)(**x, **kept, **options, **more, backend=backend)

    beside = frozenset({"weight", "bias", "residual"} if wide and "entropy" not in operator else ())
    kept_wide = frozenset(beside & shapes.keys())
    return rows_case(operator, draw, name, shapes, call, kept_wide, size=size)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(options=row_calls(), dtype=st.sampled_from(DTYPES), isa=st.sampled_from(ISAS))
def test_any_options_of_a_row_operator(options, dtype, isa):
    keeps_the_rule(options, dtype, isa, rows)


@pytest.mark.slow
@settings(
    max_examples=5000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(options=row_calls(), dtype=st.sampled_from(DTYPES), isa=st.sampled_from(ISAS))
def test_many_options_of_row_operators(options, dtype, isa):
    keeps_the_rule(options, dtype, isa, rows)


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


@pytest.mark.parametrize("isa", ISAS)
def test_every_remainder_of_a_row(isa):
    rows = {
        "layer_norm": lambda x, y, w: fa.layer_norm(x, w, w, residual=y), "softmax": lambda x, y, w: fa.softmax(x),
        "rms_norm": lambda x, y, w: fa.rms_norm(x, w), "gelu": lambda x, y, w: fa.gelu(x, bias=w),
        "swiglu": lambda x, y, w: fa.swiglu(x, y), "geglu": lambda x, y, w: fa.geglu(x, y, approximate="tanh"),
        "cross_entropy": lambda x, y, w: fa.cross_entropy(x, torch.tensor([0, x.shape[1] - 1, 0])),
    }  # fmt: skip
    wrong = []
    with native.use_isa(isa):
        for C in (*range(1, 36), 63, 64, 65, 127, 130):
            for operator, function in rows.items():
                shapes = {"x": (3, C), "y": (3, C), "w": (C,)}
                call = lambda x, b, g, f=function: f(**x) if b is None else on(b, f, x)  # noqa: E731
                case = rows_case(operator, "remainder", f"C={C}", shapes, call)
                verdict = judge(case, torch.float32, "cpu")
                wrong += [] if verdict.passed else [verdict.explain()]
    assert not wrong


def on(backend, function, inputs):
    with fa.use_backend(backend):
        return function(**inputs)


@pytest.mark.parametrize("isa", ISAS)
def test_each_gradient_alone_is_the_same(isa):
    """A backward computes what is asked for: any of six gradients, from out, from lse or from both."""
    torch.manual_seed(0)
    shapes = ((1, 4, 40, 8), (1, 2, 50, 8), (1, 2, 50, 8), (1, 4, 1, 50), (4,), (4,))
    inputs = [torch.randn(shape) for shape in shapes]
    with native.use_isa(isa):
        for from_out, from_lse in ((1, 0), (0, 1), (1, 1)):

            def gradients(wanted, from_out=from_out, from_lse=from_lse):
                leaves = [x.clone().requires_grad_(at in wanted) for at, x in enumerate(inputs)]
                q, k, v, bias, slopes, sinks = leaves
                out, lse = fa.attention(
                    q, k, v, bias=bias, alibi_slopes=slopes, sinks=sinks, causal=True, return_lse=True, backend="cpu"
                )  # fmt: skip
                loss = from_out * out.square().sum() if from_out else lse.square().sum()
                loss = loss + lse.square().sum() if from_out and from_lse else loss
                chosen = [leaves[at] for at in wanted]
                return torch.autograd.grad(loss, chosen, allow_unused=True, materialize_grads=True)

            every = gradients(range(6))
            for size in (1, 2, 5):
                for wanted in itertools.combinations(range(6), size):
                    for at, gradient in zip(wanted, gradients(wanted), strict=True):
                        assert torch.equal(gradient, every[at]), (wanted, at)


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
        grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True, materialize_grads=True)
        results.append([out.detach(), *grads])
    return zip(*results, strict=True)


def right(found, truth, naive=None, dtype=torch.float32):
    assert ratio(found, truth, truth if naive is None else naive, dtype) <= 1


def holds(function, *inputs):
    """The error rule, for the outputs and the gradients of a function of fp32 inputs."""
    truths = [truth for _, truth in both(function, *inputs)]
    results = []
    for backend in ("cpu", "reference"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with fa.use_backend(backend):
            out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for found, truth, naive in zip(results[0], truths, results[1], strict=True):
        right(found, truth, naive)


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


# ---- attention at its edges -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "score, softcap", [(40.0, 1.0), (45.0, 1.0), (1e3, 1.0), (2300.0, 50.0), (3.0, 1e-50)]
)
def test_softcap_of_scores_far_beyond_it(score, softcap):
    q, k, v = (
        torch.tensor([[[[1.0]]]]),
        torch.tensor([[[[score], [0.0]]]]),
        torch.eye(2)[None, None],
    )
    call = lambda *x: fa.attention(*x, scale=1.0, softcap=softcap)  # noqa: E731
    holds(call, q, k, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_sees_one_key_has_no_gradient_of_its_score_under_dropout(dtype):
    """1 / (1 - p) is inexact: sum(dO * O) would leave a rounding of dP in place of 0."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 30, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    slopes = torch.rand(2, requires_grad=True)
    mask = torch.eye(30, dtype=torch.bool).flip(-1)
    out = fa.attention(q, k, v, mask=mask, alibi_slopes=slopes, dropout_p=0.2, backend="cpu")
    grads = torch.autograd.grad(out.square().sum(), (q, k, slopes))
    assert [x.abs().max().item() for x in grads] == [0, 0, 0]


@pytest.mark.parametrize("kind", ["bias", "alibi_slopes"])
def test_lanes_that_hold_no_query_add_nothing_to_gradients(kind):
    """Scores of 89 and more: exp(score) of a lane without a row, with no lse to shift it, is infinite."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, s, 8) for s in (5, 64, 64))
    x = torch.full((1, 1, 1, 64), 89.0) if kind == "bias" else torch.tensor([-1.53])
    call = lambda q, k, v, x: fa.attention(q, k, v, **{kind: x}).cumsum(-1)  # noqa: E731
    holds(call, q, k, v, x)


def test_a_row_that_sees_no_key_ignores_the_gradient_of_its_lse():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, s, 8, requires_grad=True) for s in (6, 3, 3))
    out, lse = fa.attention(q, k, v, causal=True, return_lse=True, backend="cpu")
    dlse = torch.where(lse == -torch.inf, torch.nan, 1.0)
    for gradient in torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), dlse)):
        assert gradient.isfinite().all()


def test_no_channels():
    q, k = (torch.randn(1, 1, s, 0) for s in (300, 270))
    v = torch.randn(1, 1, 270, 8)
    for found, truth in both(lambda *x: fa.attention(*x, scale=1.0), q, k, v):
        right(found, truth)
    q, k = torch.randn(1, 1, 300, 8), torch.randn(1, 1, 270, 8)
    call = lambda q, k, v: fa.attention(q, k, v, return_lse=True)[1]  # noqa: E731
    for found, truth in both(call, q, k, v[..., :0]):
        right(found, truth)


@pytest.mark.parametrize("window", [(0, 2**63 - 1), (2**63 - 1, 0), (2**63 - 1, 2**63 - 1)])
def test_windows_as_wide_as_an_int64(window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 4) for _ in range(3))
    scalars = (0.5, False, *window, 0.0, 0.0, False, 0, 0)
    out = torch.ops.fastattn_cpu.attention_fwd(q, k, v, *[None] * 9, *scalars)[0]
    wanted = tuple(n if n < 2**62 else None for n in window)
    assert torch.equal(out, fa.attention(q, k, v, window=wanted, scale=0.5))


@pytest.mark.parametrize("scale", [30.0, 100.0, 1000.0, -1000.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("S, D", [(6, 64), (33, 16), (128, 64)])
def test_large_logits(scale, causal, S, D):
    """A logit of 1e4 is rounded to 1e-3, so a near tie is decided by roundings: they must be PyTorch's."""
    case = attention("large", f"{scale} {causal} {S}", Sq=S, Sk=S, D=D, scale=scale, causal=causal)
    verdict = judge(case, torch.float32, "cpu")
    assert verdict.passed, verdict.explain()


MANY_HEADS = {  # tasks enough, 16, for the gradient of a bias in the main pass
    "for the batch": {"Hq": 16, "bias": "1hqk"},
    "of each sequence": {"Hq": 8, "bias": "bhqk", "causal": True},
    "grouped": {"Hq": 16, "Hkv": 8, "Sk": 300, "bias": "1hqk", "window": (90, 0)},
    "several blocks": {"Hq": 16, "Sq": 200, "Sk": 260, "bias": "hqk", "lengths": (260, 30)},
    "capped": {"Hq": 16, "bias": "1hqk", "softcap": 2.0, "lengths": (0, 67), "hole": 0.3},
    "dropped": {"Hq": 16, "bias": "hqk", "dropout_p": 0.2, "slopes": "h", "wide": True},
}


@pytest.mark.parametrize("name", MANY_HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_a_bias_for_many_heads(isa, dtype, name):
    with native.use_isa(isa):
        verdict = judge(attention("bias", f"many heads {name}", **MANY_HEADS[name]), dtype, "cpu")
    assert verdict.passed, verdict.explain()


@pytest.mark.parametrize("Sq", [1, 2, 3, 6, 8, 9])
@pytest.mark.parametrize("isa", ISAS)
def test_few_rows_are_given_the_same_scores_backward(isa, Sq):
    """Of each query's weights the sum is 1; with logits rounded otherwise it would be off by 1e-3."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, Sq, 64), torch.randn(1, 1, 100, 64)
    v = torch.randn(1, 1, 100, 64, requires_grad=True)
    with native.use_isa(isa):
        fa.attention(q, k, v, scale=300.0, backend="cpu").sum().backward()
    torch.testing.assert_close(v.grad.sum(2), torch.full((1, 1, 64), float(Sq)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 1, 3), (1, 8, 1, 1), (1, 1, 30000, 1)])
def test_the_gradient_of_a_broadcast_bias_is_no_long_sum_in_fp32(shape):
    """A chain of 5000 additions of 48.48 to 2e5 would round nearly each of them the same way."""
    q, k = torch.zeros(1, 8, 30000, 1), torch.zeros(1, 8, 3, 1)
    bias = torch.zeros(shape, requires_grad=True)
    lse = fa.attention(q, k, k, bias=bias, return_lse=True, backend="cpu")[1]
    grad = torch.autograd.grad(lse, bias, torch.full_like(lse, 1.01))[0]
    wanted = torch.full(shape, 1.01 * lse.numel() / bias.numel())
    torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=0)


# ---- layouts, dtypes and shapes that no model has -------------------------------------------------


def overlapping(x):
    """(n + 7) numbers as n rows of 8, each one further on."""
    return x.as_strided((len(x) - 7, 8), (1, 1))


@pytest.mark.parametrize("name", ["query", "key", "value", "rotary", "layer_norm", "gelu", "swiglu", "softmax", "cross_entropy"])  # fmt: skip
def test_inputs_that_overlap_themselves(name):
    torch.manual_seed(0)
    numbers, other, table = torch.randn(12), torch.randn(1, 1, 9, 8), torch.rand(5, 4)
    parts = ("query", "key", "value")

    def call(x):
        x = overlapping(x)
        if name in parts:
            y = other.to(x.dtype)
            return fa.attention(*(x[None, None] if n == name else y[:, :, : len(x)] for n in parts))
        if name == "rotary":
            return fa.rotary(x[None, None], table.to(x.dtype), table.to(x.dtype)).square()
        if name == "cross_entropy":
            return fa.cross_entropy(x, torch.zeros(5, dtype=torch.int64))
        return fa.swiglu(x, x) if name == "swiglu" else getattr(fa, name)(x).square() * 2

    for found, truth in both(call, numbers):
        right(found, truth)


def test_float64_beside_a_narrower_input():
    """Side inputs may have any float dtype, and their gradients have it too."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    wide = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
    calls = [
        (lambda q, k, v, b: fa.attention(q, k, v, bias=b), (q, k, v, wide(2, 9, 9))),
        (lambda q, k, v, b: fa.attention(q, k, v, alibi_slopes=b), (q, k, v, wide(2))),
        (lambda q, k, v, b: fa.attention(q, k, v, sinks=b), (q, k, v, wide(2))),
        (lambda x, w, b: fa.layer_norm(x, w, b), (q, wide(8), wide(8))),
        (lambda x, r: sum(fa.rms_norm(x, residual=r, return_residual=True)), (q, wide(1, 2, 9, 8))),
        (lambda x, b: fa.gelu(x, bias=b), (q, wide(8))),
    ]
    for call, inputs in calls:
        leaves = [x.clone().requires_grad_() for x in inputs]
        with fa.use_backend("cpu"):
            grads = torch.autograd.grad(call(*leaves).square().sum(), leaves)
        assert [g.dtype for g in grads] == [x.dtype for x in inputs]
        for found, truth in both(lambda *x, call=call: call(*x).square(), *inputs):
            right(found, truth)


def test_a_mask_of_more_dimensions_than_kernels_count():
    torch.manual_seed(0)
    x = torch.randn(*(2,) * 11, 3)
    mask = torch.rand(*(2, 1) * 5, 2, 3) > 0.3
    found = fa.softmax(x, mask=mask, backend="cpu")
    right(found, fa.softmax(x.double(), mask=mask, backend="reference"))


# ---- numbers at the edges, in rows ----------------------------------------------------------------


def test_a_nan_of_any_payload_stays_nan():
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00001, -1, -4194304 + 0x1FF], dtype=torch.int32)
    for nan in nans.view(torch.float32):
        x = torch.zeros(1, 40)
        x[0, 3] = nan
        assert nan.isnan() and fa.softmax(x, backend="cpu").isnan().all()
        assert fa.cross_entropy(x, torch.tensor([0]), backend="cpu").isnan()
        for function in (fa.gelu, lambda x, **o: fa.swiglu(x, x, **o)):
            assert function(x, backend="cpu").isnan().sum() == 1
        q = torch.zeros(1, 1, 2, 8)
        q[0, 0, 1, 0] = nan
        for options in ({}, {"softcap": 2.0}):
            out = fa.attention(q, q[:, :, :1], q[:, :, :1] + 1, **options, backend="cpu")
            assert out[0, 0].isnan().all(-1).tolist() == [False, True]


def test_rows_at_the_limits_of_float32():
    huge = torch.finfo(torch.float32).max
    for row in ([-huge] * 4, [huge, 0, 1], [huge, huge, -huge], [2.4e38, 2.4e38, 1e38]):
        x = torch.tensor([row])
        right(fa.softmax(x, backend="cpu"), x.double().softmax(-1))
    x = torch.tensor([huge, -huge, 100, -100, -87, -89, -104, torch.inf])
    for function in (fa.gelu, lambda x, **o: fa.swiglu(x, torch.ones_like(x), **o)):
        right(function(x, backend="cpu"), function(x.double(), backend="reference"))
    silu = fa.swiglu(torch.tensor([-torch.inf]), torch.ones(1), backend="cpu")
    assert silu.isnan()  # -inf * 0, as torch's


@pytest.mark.parametrize("offset", [1e4, -1e4, 3e5])
def test_cross_entropy_of_logits_far_from_zero(offset):
    torch.manual_seed(0)
    x = offset + torch.randn(8, 50)
    for options in ({}, {"label_smoothing": 0.2, "z_loss": 1e-9}):
        call = lambda x, o=options: fa.cross_entropy(x, torch.arange(8), **o)  # noqa: E731
        for found, truth in both(call, x):
            worst, largest = (found - truth).abs().max().item(), truth.abs().max().item()
            assert worst <= 1e-6 * largest
