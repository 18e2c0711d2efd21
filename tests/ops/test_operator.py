"""Every operator under every transformation of PyTorch: compile, opcheck, torch.func, forward AD."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn as fa
from fastattn import registry
from fastattn.ops import activation, attention, cross_entropy, norm, rotary, softmax

torch.manual_seed(0)
A, B, C = (torch.randn(2, 2, 5, 8) for _ in range(3))
X, R, W = torch.randn(3, 4, 6), torch.randn(3, 4, 6), torch.randn(6)
TARGET = torch.tensor([0, 5, -100])
MASK = torch.rand(5, 5) > 0.3
COS, SIN = torch.randn(5, 4), torch.randn(5, 4)
POSITIONS = torch.tensor([[1, 4, 0, 2, 2], [0, 0, 1, 3, 4]])

CALLS = {
    "attention": (lambda q, k, v, b: fa.attention(q, k, v, causal=True, bias=b), (A, B, C, A[..., :5])),
    "attention_lse": (lambda q, k, v: torch.cat([
        x.flatten() for x in fa.attention(q, k, v, mask=MASK, return_lse=True)]), (A, B, C)),
    "attention_varlen": (lambda q, k, v: fa.attention_varlen(
        q, k, v, torch.tensor([0, 2, 6]), torch.tensor([0, 3, 6])), (A[0, 0].repeat(2, 1)[:6, None],) * 3),
    "layer_norm": (lambda x, r, w, b: fa.layer_norm(x, w, b, residual=r), (X, R, W, W + 1)),
    "rms_norm": (lambda x, w: fa.rms_norm(x, w, weight_offset=1.0), (X, W)),
    "softmax": (lambda x: fa.softmax(x, causal=True, scale=0.7), (X,)),
    "cross_entropy": (lambda x: fa.cross_entropy(x, TARGET, label_smoothing=0.1, z_loss=0.1), (X[0, :3],)),
    "gelu": (lambda x, b: fa.gelu(x, bias=b, approximate="tanh"), (X, W)),
    "swiglu": (lambda x, r: fa.swiglu(x, r), (X, R)),
    "geglu": (lambda x, r: fa.geglu(x, r), (X, R)),
    "rotary": (lambda x: fa.rotary(x, COS, SIN), (A,)),
    "rotary_learned": (lambda x, c, s: fa.rotary(x, c, s), (A, COS, SIN)),
}  # fmt: skip
every_call = pytest.mark.parametrize("name", CALLS)
every_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def prepared(name, backend):
    """The call on a backend, or on the one that serves it where that backend declines."""
    function, inputs = CALLS[name]
    inputs = tuple(x.clone().requires_grad_() for x in inputs)

    def call(*values):
        with fa.use_backend(backend):
            return function(*values)

    try:
        call(*inputs)
    except ValueError as error:
        if "cannot take this call" not in str(error):
            raise
        call = function
    return call, inputs


def gradients(function, inputs, **options):
    return torch.autograd.grad(function(*inputs).sin().sum(), inputs, **options)


def close(a, b, tolerance=2e-5):
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() <= tolerance * (1 + y.abs().max())


@every_backend
@every_call
def test_compiles_fullgraph(name, backend):
    if name == "attention_varlen" and backend == "reference":
        return  # the definition reads cu_seqlens, which no compiler can
    function, inputs = CALLS[name]
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with fa.use_backend("reference" if backend == "reference" else None):
        close([compiled(*inputs)], [function(*inputs)], 1e-6)
        close(gradients(compiled, inputs), gradients(function, inputs), 1e-6)


@every_backend
@every_call
def test_forward_mode_is_the_reverse_modes_transpose(name, backend):
    function, inputs = prepared(name, backend)
    tangents = [torch.randn_like(x) for x in inputs]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
    out, tangent_func = torch.func.jvp(function, tuple(x.detach() for x in inputs), tuple(tangents))
    close([tangent], [tangent_func])
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(function(*inputs), inputs, cotangent)
    forward = (tangent * cotangent).sum()
    reverse = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    assert abs(forward - reverse) <= 1e-4 * (1 + abs(reverse))


@every_backend
@every_call
def test_second_derivatives(name, backend):
    function, inputs = prepared(name, backend)
    doubles = tuple(x.detach().double().requires_grad_() for x in inputs)
    with fa.use_backend("reference"):
        first = gradients(CALLS[name][0], doubles, create_graph=True)
        truth = torch.autograd.grad(sum(g.square().sum() for g in first), doubles)
    first = gradients(function, inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    close(second, truth, 1e-4)


@every_backend
@every_call
def test_vmap_and_per_sample_gradients(name, backend):
    function, inputs = prepared(name, backend)
    batch = tuple(torch.stack([x.detach(), x.detach() * 0.5]) for x in inputs)
    close(
        [torch.vmap(function)(*batch)],
        [torch.stack([function(*x) for x in zip(*batch, strict=True)])],
    )
    loss = lambda *values: function(*values).sin().sum()  # noqa: E731
    found = torch.vmap(torch.func.grad(loss))(*batch)
    wanted = torch.stack([torch.func.grad(loss)(*x) for x in zip(*batch, strict=True)])
    close([found], [wanted])


@every_call
def test_kernel_agrees_with_the_definition(name):
    call, inputs = prepared(name, "cpu")
    reference, _ = prepared(name, "reference")
    close([call(*inputs)], [reference(*inputs)])
    close(gradients(call, inputs), gradients(reference, inputs))


OPERATORS = [
    (attention.OPERATOR, (A, B, C, None, None, None, None, None, None, None, None, None,
                          0.3, True, None, None, 0.0, 0.0, False, 0, 0)),
    (attention.OPERATOR, (A.transpose(1, 2).contiguous().transpose(1, 2), B, C[..., :3].contiguous(),
                          torch.randn(1, 1, 5, 5), MASK[None, None], None, None, None, None,
                          torch.tensor([3, 5]).int(), None, None,
                          0.3, False, 2, None, 0.0, 0.0, False, 0, 0)),
    (norm.OPERATOR, (X, R, W, W, None, False, 1e-5, 0.0, 0.0, True)),
    (norm.OPERATOR, (X, None, W, None, None, True, 1e-5, 0.0, 0.0, False)),
    (softmax.OPERATOR, (X, None, True, 0.7)),
    (cross_entropy.OPERATOR, (X[0, :3], TARGET, -100, 0.1, 0.1)),
    (activation.GELU, (X, W, True)),
    (activation.GLU, (X, R, False, False)),
    (rotary.OPERATOR, (A, COS, SIN, None, False, False)),
    (rotary.OPERATOR, (A.mT.contiguous().mT, COS, SIN, None, False, False)),
    (rotary.TABLES_OPERATOR, (A, COS, SIN, POSITIONS, False, False)),
]  # fmt: skip


@pytest.mark.parametrize("operator, arguments", OPERATORS, ids=lambda x: getattr(x, "name", ""))
def test_opcheck(operator, arguments):
    if ("cpu", operator.name) not in {(b, o) for o, b in registry._kernels}:
        pytest.skip(f"the cpu backend has no {operator.name}")
    wanted = [a.clone().requires_grad_() if i in operator.differentiable and a is not None else a
              for i, a in enumerate(arguments)]  # fmt: skip
    op = getattr(torch.ops.fastattn_cpu, f"{operator.name}_fwd").default
    torch.library.opcheck(op, tuple(wanted))


def test_autocast_casts_as_torch_does():
    with torch.autocast("cpu", torch.bfloat16):
        assert fa.attention(A, B, C).dtype == torch.bfloat16
        assert fa.attention(A, B, C, backend="reference").dtype == torch.bfloat16
        assert fa.softmax(X.bfloat16()).dtype == torch.float32
        assert fa.cross_entropy(X[0, :3].bfloat16(), TARGET).dtype == torch.float32
        assert fa.layer_norm(X.bfloat16(), W).dtype == torch.bfloat16


@every_backend
@pytest.mark.parametrize("B, H, Sq, Sk", [(0, 2, 3, 3), (1, 0, 3, 3), (1, 2, 0, 3), (1, 2, 3, 0)])
def test_empty_attention(B, H, Sq, Sk, backend):
    q = torch.randn(B, H, Sq, 4, requires_grad=True)
    k, v = (torch.randn(B, H, Sk, 4, requires_grad=True) for _ in range(2))
    out, lse = fa.attention(q, k, v, return_lse=True, backend=backend)
    assert out.shape == (B, H, Sq, 4) and lse.shape == (B, H, Sq)
    assert ((out == 0).all() and (lse == -torch.inf).all()) or Sk
    for g in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (g == 0).all()


@every_backend
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_rows(shape, backend):
    x = torch.randn(shape, requires_grad=True)
    with fa.use_backend(backend):
        outputs = [fa.softmax(x), fa.layer_norm(x), fa.rms_norm(x), fa.gelu(x), fa.swiglu(x, x)]
    for y in outputs:
        assert y.shape == x.shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


EMPTY = [
    ("softmax", lambda x: fa.softmax(x)),
    ("layer_norm with dropout", lambda x: fa.layer_norm(x, dropout_p=0.5)),
    ("rms_norm with dropout", lambda x: fa.rms_norm(x, dropout_p=0.5)),
]


@every_backend
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("name, call", EMPTY)
def test_empty_rows_with_options(name, call, shape, backend):
    x = torch.randn(shape, requires_grad=True)
    with fa.use_backend(backend):
        y = call(x)
    assert y.shape == x.shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@every_backend
@pytest.mark.parametrize("target", [[], [-100, -100]], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_over_no_classes_are_torchs(target, reduction, backend):
    target = torch.tensor(target, dtype=torch.int64)
    logits = torch.zeros(len(target), 0, requires_grad=True)
    wanted = torch.nn.functional.cross_entropy(logits, target, reduction=reduction)
    hidden, weight = torch.ones(len(target), 4), torch.ones(0, 4)
    with fa.use_backend(backend):
        loss = fa.cross_entropy(logits, target, reduction=reduction, label_smoothing=0.1)
        linear = fa.linear_cross_entropy(hidden, weight, target, reduction=reduction)
    for found in (loss, linear):
        torch.testing.assert_close(found, wanted, equal_nan=True)
    assert torch.autograd.grad(loss.sum(), logits)[0].shape == logits.shape


@every_backend
@pytest.mark.parametrize("slopes", [None, torch.ones(2), torch.ones(0, 2)], ids=["", "Hq", "BHq"])
def test_no_sequences(slopes, backend):
    inputs = [torch.randn(0, 2, d, requires_grad=True) for d in (4, 4, 3)]
    start = torch.tensor([0])
    out, lse = fa.attention_varlen(
        *inputs, start, start, alibi_slopes=slopes, return_lse=True, backend=backend
    )
    assert out.shape == (0, 2, 3) and lse.shape == (2, 0)
    for x, grad in zip(inputs, torch.autograd.grad(out.sum() + lse.sum(), inputs), strict=True):
        assert grad.shape == x.shape


@every_backend
def test_no_channels(backend):
    q, k, v = torch.ones(1, 1, 2, 0), torch.ones(1, 1, 3, 0), torch.arange(3.0)[None, None, :, None]
    assert (fa.attention(q, k, v, backend=backend) == 1).all()


@every_backend
def test_no_dimensions(backend):
    x = torch.tensor(0.7, requires_grad=True)
    F = torch.nn.functional
    with fa.use_backend(backend):
        found = [fa.gelu(x), fa.gelu(x, bias=x), fa.swiglu(x, x), fa.geglu(x, x), fa.softmax(x, 0)]
        assert fa.softmax(x, mask=torch.tensor(False)) == 0
    for y, wanted in zip(
        found, [F.gelu(x), F.gelu(x + x), F.silu(x) * x, F.gelu(x) * x, x.softmax(0)], strict=True
    ):
        torch.testing.assert_close(y, wanted)
        close(torch.autograd.grad(y, x), torch.autograd.grad(wanted, x))


@every_backend
def test_lengths_may_lie_anywhere(backend):
    lengths = torch.tensor([[3, 1], [5, 2]], dtype=torch.int32)
    call = lambda n: fa.attention(A, B, C, key_lengths=n, backend=backend)  # noqa: E731
    assert torch.equal(call(lengths[:, 0]), call(torch.tensor([3, 5])))
    wanted = torch.stack([call(torch.tensor([3, 5])), call(torch.tensor([1, 2]))])
    close([torch.vmap(call, in_dims=1)(lengths)], [wanted])
    close([torch.vmap(call)(lengths.t().contiguous())], [wanted])


# the mean's division is torch's, and fails there; the data of zero sequences cannot be right
@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"cross_entropy", "attention_varlen"}))
def test_vmap_over_nothing(name):
    function, inputs = CALLS[name]
    empty = [x.new_zeros(0, *x.shape).requires_grad_() for x in inputs]
    out = torch.vmap(function)(*empty)
    assert out.shape == (0, *function(*inputs).shape)
    for x, grad in zip(empty, torch.autograd.grad(out.sum(), empty), strict=True):
        assert grad.shape == x.shape


@every_backend
def test_vmap_over_targets_in_double(backend):
    logits, target = torch.randn(4, 3, 6).double(), torch.tensor([[0, 5, -100]] * 4)
    loss = lambda x, t: fa.cross_entropy(x, t)  # noqa: E731
    close([torch.vmap(loss)(logits, target)], [torch.stack([loss(x, TARGET) for x in logits])])


WITHOUT_DATA = CALLS | {
    "linear_cross_entropy": (
        lambda h, w: fa.linear_cross_entropy(h, w, torch.zeros(3, dtype=torch.int64, device=h.device)),
        (X[0, :3], X[1]),
    ),
    "sdpa": (lambda q: fa.scaled_dot_product_attention(q, q, q), (A,)),
    "attention_varlen": (
        lambda x: fa.attention_varlen(x, x, x, *[torch.tensor([0, 2, 6], device=x.device)] * 2),
        (A[0, 0].repeat(2, 1)[:6, None],),
    ),
    "attention_lse": (lambda q: fa.attention(q, q, q, dropout_p=0.1, return_lse=True)[1], (A,)),
    "layer_norm": (lambda x, w: fa.layer_norm(x, w, w, dropout_p=0.1), (X, W)),
    "softmax": (lambda x: fa.softmax(x, causal=True), (X,)),
    "cross_entropy": (
        lambda x: fa.cross_entropy(x, torch.zeros(3, dtype=torch.int64, device=x.device)), (X[0, :3],)),
    "rotary": (
        lambda x: fa.rotary(x, *[torch.ones(9, 4, device=x.device)] * 2,
                            positions=torch.zeros(5, dtype=torch.int64, device=x.device)), (A,)),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_meta_tensors_tell_shapes(name):
    function, inputs = WITHOUT_DATA[name]
    meta = [x.to("meta").requires_grad_() for x in inputs]
    out, wanted = function(*meta), function(*inputs)
    assert out.is_meta and (out.shape, out.dtype) == (wanted.shape, wanted.dtype)
    for x, grad in zip(meta, torch.autograd.grad(out.sum(), meta), strict=True):
        assert grad.is_meta and grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WITHOUT_DATA)
def test_fake_tensors_tell_shapes(name, dtype):
    function, inputs = WITHOUT_DATA[name]
    wanted = function(*[x.to(dtype) for x in inputs])
    with FakeTensorMode():
        fake = [torch.empty(x.shape, dtype=dtype) for x in inputs]
        if name == "attention_varlen" and dtype == torch.float64:
            with pytest.raises(
                ValueError, match="reference reads cu_seqlens, and these tensors hold"
            ):
                function(*fake)
            return
        out = function(*fake)
    assert (out.shape, out.dtype) == (wanted.shape, wanted.dtype)


def test_explain_does_as_the_call_does():
    with fa.use_backend("reference"):
        lines = fa.explain(A, B, C).splitlines()
    assert lines[1:] == [
        "  reference: serves this call",
        "  cpu: could serve it too",
    ]
    double = [x.double() for x in (A, B, C)]
    assert fa.explain(*double, backend="cuda").splitlines()[1:] == [
        "  cuda: cuda computes bfloat16, float16, float32, not float64",
        "  cpu: cpu computes bfloat16, float16, float32, not float64",
        "  reference: could serve it, but 'cuda' is asked for",
        "  nobody serves this call: it raises ValueError",
    ]


def test_explain_speaks_of_packed_calls_and_draws_nothing():
    packed, starts = A[0].transpose(0, 1), torch.tensor([0, 2, 5])
    state = torch.get_rng_state()
    text = fa.explain(
        packed, packed, packed, cu_seqlens_q=starts, cu_seqlens_k=starts, dropout_p=0.1
    )
    assert text.startswith(
        "attention on cpu in float32 with dropout, packed\n  cpu: serves this call"
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_explain_names_the_backend_and_the_reasons():
    text = fa.explain(A, B, C, causal=True)
    assert text.startswith("attention on cpu in float32 with causal\n")
    assert "serves this call" in text
    double = fa.explain(A.double(), B.double(), C.double(), window=(3, None))
    assert "cpu: cpu computes bfloat16, float16, float32, not float64" in double
    assert "reference: serves this call" in double


def test_backends_and_use_backend():
    found = {b.name: b for b in fa.backends()}
    assert set(found) == {"reference", "cpu", "triton", "cuda"}
    assert all(b.detail for b in found.values())
    with fa.use_backend("reference"):
        assert fa.attention(A.double(), B.double(), C.double()).dtype == torch.float64
        with pytest.raises(ValueError, match="cannot take this call"), fa.use_backend("cuda"):
            fa.attention(A.double(), B.double(), C.double())
    with pytest.raises(ValueError, match="backend must be one of"), fa.use_backend("gpu"):
        pass
