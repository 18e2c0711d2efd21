"""linear: a weight in int8 or bfloat16 under every transformation, layout, instruction set and wrong call."""

import pytest
import torch

from fastattn.kernels import native
from fastattn.ops.linear import linear

ISAS = [i.name for i in native.isas() if i.runs_here]
every_isa = pytest.mark.parametrize("isa", ISAS)
KINDS = ["int8", "groups", "bfloat16"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind, N=37, K=100, seed=0):
    """(weight, scale, group_size)"""
    g = torch.Generator().manual_seed(seed)
    if kind == "bfloat16":
        return torch.randn(N, K, generator=g).bfloat16(), None, None
    weight = torch.randint(-127, 128, (N, K), generator=g, dtype=torch.int8)
    group = 32 if kind == "groups" else None
    shape = (N,) if group is None else (N, -(-K // group))
    return weight, torch.rand(shape, generator=g) / 64, group


def called(kind, x, bias=None, backend=None, **shape):
    weight, scale, group = made(kind, K=x.shape[-1], **shape)
    return linear(x, weight, scale, bias=bias, group_size=group, backend=backend)


@every_isa
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [1, 33, 100, 1024, 2100])
def test_a_row_has_its_bits_among_any_others(isa, kind, dtype, K):
    x = torch.randn(101, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    with native.use_isa(isa):
        whole = called(kind, x)
        for rows in (1, 2, 3, 4, 5, 8, 9, 47, 49, 100):
            assert torch.equal(called(kind, x[:rows]), whole[:rows]), rows
        assert torch.equal(called(kind, x[70:71]), whole[70:71])


@every_kind
def test_threads_change_no_bit(kind):
    x, threads = torch.randn(200, 300), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(torch.cat([called(kind, x, N=200), called(kind, x[:1], N=200)]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], y) for y in found[1:])


@every_kind
def test_the_short_way_has_the_bits_of_the_long_one(kind):
    x, bias = torch.randn(3, 4, 100), torch.randn(37)
    assert torch.equal(called(kind, x, bias), called(kind, x, bias, backend="cpu"))


LAYOUTS = {
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "turned": lambda x: x.mT.contiguous().mT,
    "spread": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "odd start": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_kind
def test_layouts_of_x(kind, layout, dtype):
    x = LAYOUTS[layout](torch.randn(6, 5, 128).to(dtype))
    assert torch.equal(
        called(kind, x), called(kind, x.clone(memory_format=torch.contiguous_format))
    )


@every_kind
def test_layouts_of_the_weight(kind):
    weight, scale, group = made(kind)
    x, bias = torch.randn(3, 100), torch.randn(2, 37)
    wanted = linear(x, weight, scale, bias=bias[1].clone(), group_size=group)
    turned = None if scale is None else torch.stack([scale, scale], -1)[..., 0]
    found = linear(x, weight.t().contiguous().t(), turned, bias=bias[1], group_size=group)
    assert torch.equal(found, wanted)


@every_kind
@pytest.mark.parametrize("shape", [(0, 100), (3, 0), (2, 0, 100), (0, 0)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference", None])
def test_nothing(kind, shape, backend):
    x, bias = torch.ones(shape, requires_grad=True), torch.ones(37)
    y = called(kind, x, bias, backend)
    assert y.shape == (*shape[:-1], 37) and (y == 1).all()
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@every_kind
def test_no_outputs(kind):
    assert called(kind, torch.ones(3, 100), N=0).shape == (3, 0)


@every_kind
def test_one_dimension(kind):
    x = torch.randn(100)
    assert torch.equal(called(kind, x), called(kind, x[None])[0])


@every_isa
@every_kind
@pytest.mark.parametrize("K", [100, 1100])
@pytest.mark.parametrize("rows", [3, 60])
def test_what_is_not_finite_stays_in_its_row(isa, kind, rows, K):
    x = torch.randn(rows, K)
    with native.use_isa(isa):
        clean = called(kind, x)
        x[1, K - 1], x[2, 5] = torch.nan, torch.inf
        dirty = called(kind, x)
    assert torch.equal(dirty[3:], clean[3:]) and torch.equal(dirty[0], clean[0])
    assert dirty[1].isnan().all() and not dirty[2].isfinite().any()


@every_isa
@pytest.mark.parametrize("kind", ["int8", "groups"])
def test_numbers_at_the_edges(isa, kind):
    """Large floats, of which a sum of products by 127 is finite, the smallest ones, and zeros."""
    x = torch.tensor([2e34, -2e34, 1e-38, 1e-44, 0.0, -0.0])[:, None].expand(6, 100)
    weight, scale, group = made(kind)
    with native.use_isa(isa):
        y = linear(x, weight, scale, group_size=group)
    wanted = linear(x.double(), weight, scale, group_size=group)
    for found, row in zip(y.double(), wanted, strict=True):
        assert (found - row).abs().max() <= 1e-6 * row.abs().max() + 1e-37
    assert (y[4:] == 0).all()


# ---- derivatives and transformations ------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_the_definitions(kind, dtype):
    x, bias = torch.randn(3, 7, 100).to(dtype), torch.randn(37).to(dtype)
    found = []
    for backend, kept in (("cpu", dtype), ("reference", torch.float64)):
        inputs = [t.to(kept).requires_grad_() for t in (x, bias)]
        y = called(kind, *inputs, backend)
        found.append(torch.autograd.grad(y, inputs, torch.ones_like(y)))
    for got, wanted in zip(*found, strict=True):
        limit = 2e-6 if dtype == torch.float32 else 8e-3
        assert (got.double() - wanted).abs().max() <= limit * (4 + wanted.abs().max())


@every_kind
def test_opcheck(kind):
    weight, scale, group = made(kind)
    x = torch.randn(2, 3, 100, requires_grad=True)
    bias = torch.randn(37, requires_grad=True)
    ops = torch.ops.fastattn_cpu
    torch.library.opcheck(ops.linear_fwd.default, (x, weight, scale, bias, group or 0))
    torch.library.opcheck(
        ops.linear_fwd.default, (x.detach().mT.contiguous().mT, weight, scale, None, group or 0)
    )
    torch.library.opcheck(ops.linear_plain.default, (x.detach(), weight, scale, None, group or 0))


@every_kind
def test_compiles_fullgraph(kind):
    torch._dynamo.reset()
    x, bias = torch.randn(5, 100, requires_grad=True), torch.randn(37)
    weight, scale, group = made(kind)
    function = lambda x: linear(x, weight, scale, bias=bias, group_size=group).sin()  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for rows in (x, torch.randn(2, 100)):
        torch.testing.assert_close(compiled(rows), function(rows))
    found, wanted = (torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, function))
    torch.testing.assert_close(found, wanted)


@every_kind
def test_transformations(kind):
    x, t = torch.randn(4, 3, 100), torch.randn(4, 3, 100)
    weight, scale, group = made(kind)
    function = lambda x: linear(x, weight, scale, group_size=group, backend="cpu")  # noqa: E731
    y, dy = torch.func.jvp(function, (x,), (t,))
    torch.testing.assert_close(dy, function(t), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.vmap(function)(x), y)
    grad = torch.vmap(torch.func.grad(lambda x: function(x).square().sum()))(x)
    x.requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(function(x).square().sum(), x)[0])
    first = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)[0]
    assert torch.autograd.grad(first.sum(), x)[0].isfinite().all()


@every_kind
def test_autocast_casts_x_as_torch_does(kind):
    x, bias = torch.randn(3, 100), torch.randn(37)
    with torch.autocast("cpu", torch.bfloat16):
        y = called(kind, x, bias)
    assert torch.equal(y, called(kind, x.bfloat16(), bias.bfloat16()))


@every_kind
def test_shapes_without_data(kind):
    weight, scale, group = (t.to("meta") if isinstance(t, torch.Tensor) else t for t in made(kind))
    y = linear(torch.ones(2, 3, 100, device="meta"), weight, scale, group_size=group)
    assert y.is_meta and y.shape == (2, 3, 37)


# ---- wrong calls --------------------------------------------------------------------------------

X, W, S = torch.zeros(3, 100), torch.zeros(37, 100, dtype=torch.int8), torch.ones(37)
WRONG = [
    (dict(x=[1]), TypeError, "linear: x must be a tensor, got list"),
    (dict(scale=[1]), TypeError, "linear: scale must be a tensor, got list"),
    (dict(x=X.int()), TypeError, "linear: x must be float64, float32, float16 or bfloat16, got int32"),
    (dict(scale=None), ValueError, "linear: a weight in int8 needs its scale, got None"),
    (dict(weight=W.float()), ValueError,
     "linear: a scale belongs to a weight in int8, got one in float32"),
    (dict(weight=W.float(), scale=None), TypeError,
     "linear: weight must be int8 with a scale or bfloat16, got float32"),
    (dict(x=X[:, :99]), ValueError,
     "linear: x must be (..., K) and weight (N, K), got x (3, 99), weight (37, 100)"),
    (dict(x=X[0, 0]), ValueError, "linear: x must be (..., K) and weight (N, K), got x (), weight (37, 100)"),
    (dict(weight=W[0]), ValueError, "linear: x must be (..., K) and weight (N, K), got x (3, 100), weight (100,)"),
    (dict(scale=S[:3]), ValueError, "linear: scale must be (N,) = (37,), got scale (3,)"),
    (dict(scale=S[:, None]), ValueError, "linear: scale must be (N,) = (37,), got scale (37, 1)"),
    (dict(group_size=32), ValueError,
     "linear: scale must be (N, ceil(K / group_size)) = (37, 4), got scale (37,)"),
    (dict(group_size=40), ValueError, "linear: group_size must be a multiple of 32, got 40"),
    (dict(group_size=16), ValueError, "linear: group_size must be an int of at least 32, got 16"),
    (dict(group_size=32.0), TypeError, "linear: group_size must be an int, got 32.0"),
    (dict(weight=W.bfloat16(), scale=None, group_size=32), ValueError,
     "linear: group_size needs a weight in int8, for it says which scale is whose"),
    (dict(bias=S[:4]), ValueError, "linear: bias must be (N,) = (37,), got bias (4,)"),
    (dict(bias=S.int()), TypeError, "linear: bias must be float64, float32, float16 or bfloat16, got int32"),
    (dict(scale=S.clone().requires_grad_()), ValueError,
     "linear: scale is a constant and has no gradient, got one that requires_grad; train what is beside it, "
     "as LoRA does, or the weight before it is quantized"),
    (dict(weight=W.bfloat16().requires_grad_(), scale=None), ValueError,
     "linear: weight is a constant and has no gradient"),
    (dict(x=X.to("meta")), ValueError,
     "linear: all tensors must be on one device, got x on meta, weight on cpu, scale on cpu"),
]  # fmt: skip


@pytest.mark.parametrize(
    "wrong, kind, sentence", WRONG, ids=lambda x: x if isinstance(x, str) else ""
)
def test_wrong_calls(wrong, kind, sentence):
    arguments = {"x": X, "weight": W, "scale": S, **wrong}
    with pytest.raises(kind) as raised:
        linear(**arguments)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)
