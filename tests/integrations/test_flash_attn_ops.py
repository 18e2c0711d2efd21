"""flash_attn.ops: norms, activations and dense layers, against their formulas in plain PyTorch."""

import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastattn.integrations.flash_attn.ops import activations, fused_dense, layer_norm, rms_norm
from fastattn.integrations.flash_attn.ops.triton import layer_norm as triton

from .flash import gradients, held, leaf

ADD = "x0 residual weight bias dropout_p epsilon rowscale=None layerscale=None"
TWO = "x0 x1 residual weight0 bias0 weight1 bias1 dropout_p epsilon"
SUBSET = (
    "x0 residual weight bias dropout_p epsilon layerscale=None x0_subset=None out_subset=None "
    "rowscale_const=1.0 out_numrows=0"
)
KINDS = "prenorm=False residual_in_fp32=False return_dropout_mask=False"
PLACE = "device=None dtype=None"
FN = (
    "x weight bias residual=None x1=None weight1=None bias1=None eps=1e-06 dropout_p=0.0 rowscale=None "
    "prenorm=False residual_in_fp32=False zero_centered_weight=False"
)
REF = (
    "x weight bias residual=None x1=None weight1=None bias1=None eps=1e-06 dropout_p=0.0 rowscale=None "
    "prenorm=False zero_centered_weight=False dropout_mask=None dropout_mask1=None upcast=False"
)
MODULE = f"hidden_size prenorm=False p=0.0 eps=1e-05 residual_in_fp32=False {PLACE}"
SIGNATURES = [
    (layer_norm.layer_norm, "x weight bias epsilon"),
    (layer_norm.dropout_add_layer_norm, f"{ADD} {KINDS}"),
    (layer_norm.dropout_add_layer_norm_subset, f"{SUBSET} {KINDS}"),
    (layer_norm.dropout_add_layer_norm_parallel_residual, f"{TWO} {KINDS}"),
    (layer_norm.DropoutAddLayerNorm, MODULE),
    (rms_norm.rms_norm, "x weight epsilon"),
    (rms_norm.dropout_add_rms_norm, f"{ADD} {KINDS}"),
    (rms_norm.dropout_add_rms_norm_subset, f"{SUBSET} {KINDS}"),
    (rms_norm.dropout_add_rms_norm_parallel_residual, f"{TWO} {KINDS}"),
    (rms_norm.RMSNorm, f"hidden_size eps=1e-05 {PLACE}"),
    (rms_norm.DropoutAddRMSNorm, MODULE),
    (
        triton.layer_norm_fn,
        f"{FN} is_rms_norm=False return_dropout_mask=False out_dtype=None out=None residual_out=None",
    ),
    (
        triton.rms_norm_fn,
        f"{FN} return_dropout_mask=False out_dtype=None out=None residual_out=None",
    ),
    (triton.layer_norm_ref, REF),
    (triton.rms_norm_ref, REF),
    (
        triton.layer_norm_linear_fn,
        "x norm_weight norm_bias linear_weight linear_bias residual=None eps=1e-06 prenorm=False "
        "residual_in_fp32=False is_rms_norm=False",
    ),
    (
        triton.RMSNorm,
        f"hidden_size eps=1e-05 dropout_p=0.0 zero_centered_weight=False {PLACE}",
    ),
    (
        fused_dense.fused_dense_func,
        "x weight bias=None return_residual=False process_group=None sequence_parallel=True",
    ),
    (
        fused_dense.FusedDense,
        f"in_features out_features bias=True return_residual=False {PLACE}",
    ),
    (
        fused_dense.fused_mlp_func,
        "x weight1 weight2 bias1=None bias2=None activation=gelu_approx save_pre_act=True "
        "return_residual=False checkpoint_lvl=0 heuristic=0 process_group=None sequence_parallel=True",
    ),
    (
        fused_dense.FusedMLP,
        "in_features hidden_features=None out_features=None bias1=True bias2=True activation=gelu_approx "
        f"return_residual=False checkpoint_lvl=0 heuristic=auto {PLACE}",
    ),
    (
        fused_dense.ColumnParallelLinear,
        "in_features out_features process_group bias=True sequence_parallel=True multiple_of=1 "
        f"{PLACE}",
    ),
]


@pytest.mark.parametrize("function, signature", SIGNATURES, ids=[f.__name__ for f, _ in SIGNATURES])
def test_signature(function, signature):
    shown = [
        p.name if p.default is p.empty else f"{p.name}={p.default}"
        for p in inspect.signature(function).parameters.values()
    ]
    assert shown == signature.split()


# ---- norms --------------------------------------------------------------------------------------


def plain(x, residual, weight, bias, eps, rms, kept=None, p=0.0):
    """(y, z): one rounding to the inputs' dtypes is all that a fused norm may do beside."""
    z = x if kept is None else torch.where(kept, x / (1 - p), 0)
    z = z if residual is None else z + residual
    mean = 0 if rms else z.mean(-1, keepdim=True)
    rstd = torch.rsqrt((z - mean).square().mean(-1, keepdim=True) + eps)
    y = (z - mean) * rstd * weight
    return y if bias is None else y + bias, z


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("has_residual", [False, True])
def test_dropout_add_norm(dtype, rms, p, has_residual):
    torch.manual_seed(0)
    x, weight, bias = leaf(3, 5, 37, dtype=dtype), leaf(37), leaf(37)
    residual = leaf(3, 5, 37, dtype=dtype) if has_residual else None
    function = rms_norm.dropout_add_rms_norm if rms else layer_norm.dropout_add_layer_norm
    y, z, mask = function(
        x, residual, weight, bias, p, 1e-5, prenorm=True, return_dropout_mask=True
    )
    assert mask.dtype == torch.uint8 and y.dtype == z.dtype == dtype
    assert bool(mask.all()) is (p == 0)
    inputs = [x, weight, bias] + ([residual] if has_residual else [])

    def define(x, weight, bias, residual=None):
        results = plain(x, residual, weight, bias, 1e-5, rms, mask.bool(), p)
        return *results, *gradients(results, [x, weight, bias] + [residual] * has_residual)

    held((y, z, *gradients((y, z), inputs)), define, inputs, dtype)
    torch.manual_seed(1)
    alone = function(x, residual, weight, bias, 0.0, 1e-5)
    assert isinstance(alone, torch.Tensor)


@pytest.mark.parametrize("residual_dtype", [None, torch.float32], ids=str)
def test_dtype_of_the_sum(residual_dtype):
    torch.manual_seed(2)
    x, weight = torch.randn(4, 16).bfloat16(), torch.randn(16)
    residual = None if residual_dtype is None else torch.randn(4, 16)
    given = (x, residual, weight, None, 0.0, 1e-5)
    y, z = layer_norm.dropout_add_layer_norm(*given, prenorm=True, residual_in_fp32=True)
    assert y.dtype == torch.bfloat16 and z.dtype == torch.float32
    torch.testing.assert_close(z, x.float() if residual is None else x.float() + residual)
    assert layer_norm.dropout_add_layer_norm(
        x, None, weight, None, 0.0, 1e-5, prenorm=True
    )[1].dtype == torch.bfloat16  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_of_rows_and_columns(dtype):
    torch.manual_seed(3)
    x, residual = leaf(3, 5, 37, dtype=dtype), leaf(3, 5, 37, dtype=dtype)
    weight, bias, columns = leaf(37), leaf(37), leaf(37)
    rows = torch.rand(3, 5)
    inputs = [x, residual, weight, bias, columns]
    y, z = layer_norm.dropout_add_layer_norm(
        x,
        residual,
        weight,
        bias,
        0.0,
        1e-5,
        rowscale=rows.flatten(),
        layerscale=columns,
        prenorm=True,
    )

    def define(x, residual, weight, bias, columns):
        results = plain(
            x * rows[..., None].to(x.dtype) * columns.to(x.dtype),
            residual,
            weight,
            bias,
            1e-5,
            False,
        )
        return *results, *gradients(results, [x, residual, weight, bias, columns])

    held((y, z, *gradients((y, z), inputs)), define, inputs, dtype)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("second", ["x1 and weight1", "x1", "weight1"])
def test_parallel_residual(rms, p, second):
    torch.manual_seed(4)
    x0, residual = leaf(6, 24), leaf(6, 24)
    weight0, bias0 = leaf(24), leaf(24)
    x1 = leaf(6, 24) if "x1" in second else None
    weight1, bias1 = (leaf(24), leaf(24)) if "weight1" in second else (None, None)
    module = rms_norm if rms else layer_norm
    function = getattr(module, f"dropout_add_{'rms' if rms else 'layer'}_norm_parallel_residual")
    y0, y1, z, mask0, mask1 = function(
        x0,
        x1,
        residual,
        weight0,
        bias0,
        weight1,
        bias1,
        p,
        1e-5,
        prenorm=True,
        return_dropout_mask=True,
    )
    kept = [mask.bool() for mask in (mask0, mask1)]
    assert (y1 is None) is (weight1 is None)
    named = {"x0": x0, "residual": residual, "weight0": weight0, "bias0": bias0}
    named |= {} if x1 is None else {"x1": x1}
    named |= {} if weight1 is None else {"weight1": weight1, "bias1": bias1}

    def define(*xs):
        t = dict(zip(named, xs, strict=True))
        total = torch.where(kept[0], t["x0"] / (1 - p), 0) + t["residual"]
        if x1 is not None:
            total = total + torch.where(kept[1], t["x1"] / (1 - p), 0)
        results = [plain(total, None, t["weight0"], t["bias0"], 1e-5, rms)[0]]
        if weight1 is not None:
            results.append(plain(total, None, t["weight1"], t["bias1"], 1e-5, rms)[0])
        return *results, total, *gradients([*results, total], xs)

    found = [y0, z] if y1 is None else [y0, y1, z]
    held(
        (*found, *gradients(found, list(named.values()))),
        define,
        list(named.values()),
        torch.float32,
    )


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_subset(rms, p):
    """Rows 0, 2, 3, 5 have an x0; rows 5, 0 and 1 are wanted, in this order."""
    torch.manual_seed(5)
    x0, residual, weight, bias, columns = leaf(4, 24), leaf(6, 24), leaf(24), leaf(24), leaf(24)
    x0_subset = torch.tensor([1, 0, 2, 3, 0, 4]).int()
    out_subset = torch.tensor([2, 3, 0, 0, 0, 1]).int()
    module = rms_norm if rms else layer_norm
    function = getattr(module, f"dropout_add_{'rms' if rms else 'layer'}_norm_subset")
    inputs = [x0, residual, weight, bias, columns]
    y, z, mask = function(
        x0, residual, weight, bias, p, 1e-5, columns, x0_subset, out_subset, 1.5, 3,
        prenorm=True, return_dropout_mask=True,
    )  # fmt: skip
    kept = mask.bool()
    assert mask.shape == x0.shape and y.shape == (3, 24) and z.shape == (6, 24)

    def define(x0, residual, weight, bias, columns):
        own = torch.where(kept, x0 * 1.5 * columns / (1 - p), 0)
        spread = torch.zeros_like(residual).index_copy(0, torch.tensor([0, 2, 3, 5]), own)
        whole, z = plain(spread, residual, weight, bias, 1e-5, rms)
        results = whole[[5, 0, 1]], z
        return *results, *gradients(results, [x0, residual, weight, bias, columns])

    held((y, z, *gradients((y, z), inputs)), define, inputs, torch.float32)
    dense = function(residual, x0.new_zeros(6, 24), weight, bias, 0.0, 1e-5)
    torch.testing.assert_close(dense, plain(residual, None, weight, bias, 1e-5, rms)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("two", [False, True])
def test_triton_names_against_their_reference(dtype, rms, zero_centered, p, two):
    torch.manual_seed(6)
    x, residual = leaf(2, 7, 40, dtype=dtype), leaf(2, 7, 40, dtype=dtype)
    inputs = [x, leaf(40), leaf(40), residual]
    inputs += [leaf(2, 7, 40, dtype=dtype), leaf(40), leaf(40)] if two else []
    options = {"eps": 1e-6, "dropout_p": p, "prenorm": True, "zero_centered_weight": zero_centered}
    if not two:
        options["rowscale"] = torch.rand(2, 7)
    function = triton.rms_norm_fn if rms else triton.layer_norm_fn
    *found, mask, mask1 = function(*inputs, **options, return_dropout_mask=True)
    if p == 0:
        assert mask is None and mask1 is None
    else:
        assert mask.dtype == torch.bool and (mask1 is not None) is two
    reference = triton.rms_norm_ref if rms else triton.layer_norm_ref
    options |= {"dropout_mask": mask, "dropout_mask1": mask1}

    def define(*xs):
        results = reference(*xs, **options)
        return *results, *gradients(results, xs)

    held((*found, *gradients(found, inputs)), define, inputs, dtype)


def test_results_in_given_places():
    torch.manual_seed(7)
    x, weight, bias = torch.randn(4, 16).bfloat16(), torch.randn(16), torch.randn(16)
    out, z = torch.empty(4, 16), torch.empty(4, 16)
    found = triton.layer_norm_fn(x, weight, bias, prenorm=True, out=out, residual_out=z)
    assert found[0] is out and found[1] is z and torch.equal(z, x.float())
    torch.testing.assert_close(out, F.layer_norm(x.float(), (16,), weight, bias, 1e-6))
    wide = triton.layer_norm_fn(x, weight, bias, out_dtype=torch.float32)
    assert torch.equal(wide, out)


def test_norm_modules():
    torch.manual_seed(8)
    x, residual = torch.randn(3, 16), torch.randn(3, 16)
    for module, rms in (
        (layer_norm.DropoutAddLayerNorm(16, prenorm=True, p=0.5), False),
        (rms_norm.DropoutAddRMSNorm(16, prenorm=True, p=0.5), True),
    ):
        y, z = module.eval()(x, residual)
        torch.testing.assert_close((y, z), plain(x, residual, 1, None, 1e-5, rms))
        dropped = module.train()(torch.ones(3, 16), None)[1]
        assert set(dropped.unique().tolist()) == {0.0, 2.0}
        assert list(module.state_dict()) == (["weight"] if rms else ["weight", "bias"])
    plain_y = plain(x, None, 1, None, 1e-5, True)[0]
    torch.testing.assert_close(rms_norm.RMSNorm(16)(x), plain_y)
    centred = triton.RMSNorm(16, zero_centered_weight=True)
    assert not centred.weight.any() and list(centred.state_dict()) == ["weight"]
    torch.testing.assert_close(centred(x), plain_y)
    torch.testing.assert_close(
        triton.RMSNorm(16, dropout_p=0.5).eval()(x, residual, prenorm=True),
        plain(x, residual, 1, None, 1e-5, True),
    )
    torch.testing.assert_close(
        layer_norm.layer_norm(x, torch.ones(16), None, 1e-5), F.layer_norm(x, (16,))
    )


def test_layer_norm_linear():
    torch.manual_seed(9)
    inputs = [leaf(3, 5, 16), leaf(16), leaf(16), leaf(8, 16), leaf(8), leaf(3, 5, 16)]
    for rms in (False, True):
        found = triton.layer_norm_linear_fn(*inputs, prenorm=True, is_rms_norm=rms)

        def define(x, weight, bias, linear, linear_bias, residual, rms=rms):
            y, z = plain(x, residual, weight, bias, 1e-6, rms)
            results = F.linear(y, linear, linear_bias), z
            return *results, *gradients(results, [x, weight, bias, linear, linear_bias, residual])

        held((*found, *gradients(found, inputs)), define, inputs, torch.float32)


# ---- activations and dense layers ---------------------------------------------------------------

TANH = partial(F.gelu, approximate="tanh")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(dtype):
    torch.manual_seed(10)
    x, y, bias, g = (
        leaf(5, 12, dtype=dtype),
        leaf(5, 12, dtype=dtype),
        leaf(12, dtype=dtype),
        torch.randn(5, 12).to(dtype),
    )
    pairs = [
        (activations.bias_gelu_impl, lambda x, b: TANH(x + b), [x, bias]),
        (activations.fast_gelu_impl, TANH, [x]),
        (activations.swiglu, lambda x, y: F.silu(x) * y, [x, y]),
        (activations.sqrelu_fwd, lambda x: F.relu(x).square(), [x]),
    ]
    for ours, theirs, inputs in pairs:

        def define(*xs, theirs=theirs):
            return theirs(*xs), *torch.autograd.grad(theirs(*xs), xs, g.to(xs[0].dtype))

        out = ours(*inputs)
        held((out, *torch.autograd.grad(out, inputs, g)), define, inputs, dtype)
    backwards = [
        (lambda: (activations.gelu_bwd(g, x),), pairs[1]),
        (lambda: activations.bias_gelu_back(g, x, bias), pairs[0]),
        (lambda: activations.swiglu_bwd(x, y, g), pairs[2]),
        (lambda: (activations.sqrelu_bwd(g, x),), pairs[3]),
        (lambda: (activations.relu_bwd(g, x),), (None, F.relu, [x])),
    ]
    for backward, (_, theirs, inputs) in backwards:
        define = lambda *xs, f=theirs: torch.autograd.grad(f(*xs), xs, g.to(xs[0].dtype))  # noqa: E731
        held(backward(), define, inputs, dtype)


@pytest.mark.parametrize("activation", ["gelu_approx", "relu", "sqrelu"])
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("biases", [True, False])
def test_fused_mlp(activation, level, biases):
    torch.manual_seed(11)
    module = fused_dense.FusedMLP(
        8, 12, 6, biases, biases, activation, return_residual=True, checkpoint_lvl=level
    )
    names = [n for n, _ in module.named_parameters()]
    assert names == (
        ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
        if biases
        else ["fc1.weight", "fc2.weight"]
    )
    x = leaf(3, 5, 8)
    out, same = module(x)
    assert same is x
    function = {"gelu_approx": TANH, "relu": F.relu, "sqrelu": lambda x: F.relu(x).square()}[
        activation
    ]

    def define(x, *parameters):
        p = dict(zip(names, parameters, strict=True))
        hidden = function(F.linear(x, p["fc1.weight"], p.get("fc1.bias")))
        y = F.linear(hidden, p["fc2.weight"], p.get("fc2.bias"))
        return y, *gradients([y], [x, *parameters])

    inputs = [x, *module.parameters()]
    held((out, *gradients([out], inputs)), define, inputs, torch.float32)
    assert fused_dense.FusedMLP(8).fc1.out_features == 32


class Group:
    def __init__(self, size):
        self.size = lambda: size


def test_dense():
    torch.manual_seed(12)
    x = torch.randn(3, 8)
    dense = fused_dense.FusedDense(8, 6, return_residual=True)
    out, same = dense(x)
    assert same is x and torch.equal(out, F.linear(x, dense.weight, dense.bias))
    for kind in (fused_dense.ColumnParallelLinear, fused_dense.RowParallelLinear):
        alone = kind(8, 6, Group(1))
        assert torch.equal(alone(x), F.linear(x, alone.weight, alone.bias))
        with pytest.raises(
            RuntimeError, match=f"{kind.__name__}: tensor parallelism is not supported"
        ):
            kind(8, 6, Group(2))
    assert torch.is_tensor(fused_dense.ParallelFusedMLP(8, process_group=Group(1))(x))


X = torch.randn(4, 16)
ERRORS = [
    (lambda: layer_norm.layer_norm(X, torch.ones(3), None, 1e-5), r"layer_norm: weight must be \(C,\) = \(16,\)"),
    (lambda: triton.layer_norm_fn(X, X[0], None, x1=X, rowscale=X[:, 0]), "rowscale has no meaning beside x1"),
    (lambda: triton.rms_norm_fn(X, X[0], None, x1=X[:2]), r"rms_norm_fn: x1 must be x's shape = \(4, 16\)"),
    (lambda: rms_norm.dropout_add_rms_norm(X, None, X[0], None, 0.0, 1e-5, X[0]), "rowscale must have a number for each row"),
    (lambda: rms_norm.dropout_add_rms_norm(X, None, X[0], None, 2.0, 1e-5), r"dropout_p must be in \[0, 1\], got 2"),
    (lambda: fused_dense.fused_mlp_func(X, X, X, activation="tanh"), "activation must be one of 'gelu_approx'"),
    (lambda: fused_dense.fused_mlp_func(X, X, X, checkpoint_lvl=3), "checkpoint_lvl must be 0, 1 or 2, got 3"),
    (lambda: fused_dense.fused_dense_func(X, X, process_group=Group(4)), "process_group has 4 processes"),
]  # fmt: skip


@pytest.mark.parametrize("call, sentence", ERRORS, ids=[s for _, s in ERRORS])
def test_errors(call, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        call()
