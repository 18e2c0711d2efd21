"""fastattn.nn against torch.nn with the same weights: every mask, every option, gradients too."""

import copy
import itertools
import pickle
import re

import pytest
import torch

import fastattn.nn as fnn

torch.manual_seed(0)
N, L, S, H = 3, 5, 7, 4
PADDING = torch.zeros(N, S, dtype=torch.bool)
PADDING[0, 4:], PADDING[2, 1] = True, True
KEY_PADDING = {"none": None, "bool": PADDING, "float": torch.randn(N, S)}
ATTN_MASK = {
    "none": None,
    "bool": torch.ones(L, S).triu(2).bool(),
    "float": torch.randn(L, S),
    "bool 3-D": torch.rand(N * H, L, S) > 0.8,
    "float 3-D": torch.randn(N * H, L, S),
}


def pair(name, *args, **options):
    """torch's module and ours, one set of weights, in double where only the meaning is at stake."""
    theirs = getattr(torch.nn, name)(*args, **options)
    ours = getattr(fnn, name)(*args, **options)
    assert isinstance(ours, type(theirs))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def close(a, b, tolerance=3e-6):
    assert (a is None) == (b is None)
    if a is not None:
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


def same_gradients(theirs, ours, run, tolerance=1e-5):
    for module in (theirs, ours):
        module.zero_grad()
        run(module).square().sum().backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert q.grad is not None, name
        close(q.grad, p.grad, tolerance)


@pytest.mark.parametrize("padding, mask", [
    (p, m) for p, m in itertools.product(KEY_PADDING, ATTN_MASK)
    if "none" in (p, m) or p == m.split()[0]  # torch deprecates mixing bool and float
])  # fmt: skip
@pytest.mark.parametrize("weights", ["averaged", "whole", "not needed"])
def test_multihead_attention_masks(padding, mask, weights):
    theirs, ours = pair("MultiheadAttention", 16, H, batch_first=True)
    q, k = torch.randn(N, L, 16), torch.randn(N, S, 16)
    options = {
        "key_padding_mask": KEY_PADDING[padding],
        "attn_mask": ATTN_MASK[mask],
        "need_weights": weights != "not needed",
        "average_attn_weights": weights == "averaged",
    }
    for a, b in zip(ours(q, k, k, **options), theirs(q, k, k, **options), strict=True):
        close(a, b)
    same_gradients(theirs, ours, lambda m: m(q, k, k, **options)[0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("options", [
    {}, {"bias": False}, {"kdim": 12, "vdim": 10}, {"add_bias_kv": True}, {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "kdim": 12, "vdim": 10},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_options(batch_first, options, need_weights):
    theirs, ours = pair("MultiheadAttention", 16, H, batch_first=batch_first, **options)
    q, k, v = (
        torch.randn(N, n, options.get(d, 16)) for n, d in ((L, ""), (S, "kdim"), (S, "vdim"))
    )
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    for mask, padding in ((None, None), (ATTN_MASK["bool"], PADDING)):
        masks = dict(attn_mask=mask, key_padding_mask=padding, need_weights=need_weights)
        for a, b in zip(ours(q, k, v, **masks), theirs(q, k, v, **masks), strict=True):
            close(a, b)


def test_multihead_attention_unbatched_and_causal_hint():
    theirs, ours = pair("MultiheadAttention", 16, H)
    x, mask = torch.randn(L, 16), torch.ones(L, L).triu(1).bool()
    for options in ({}, {"attn_mask": mask, "is_causal": True, "need_weights": False}):
        for a, b in zip(ours(x, x, x, **options), theirs(x, x, x, **options), strict=True):
            close(a, b)
    with pytest.raises(RuntimeError, match="is_causal is a hint"):
        ours(x, x, x, is_causal=True)


def test_multihead_attention_row_that_sees_no_key_is_zero():
    ours = fnn.MultiheadAttention(16, H, batch_first=True, bias=False)
    x = torch.randn(1, L, 16)
    nothing = torch.ones(L, L, dtype=torch.bool)
    for need_weights in (False, True):
        out, _ = ours(x, x, x, attn_mask=nothing, need_weights=need_weights)
        assert (out == 0).all()


def test_multihead_attention_dropout_is_for_training_only():
    ours = fnn.MultiheadAttention(16, H, dropout=0.5, batch_first=True)
    x = torch.randn(N, L, 16)
    run = lambda: ours(x, x, x, need_weights=False)[0]  # noqa: E731
    assert not torch.equal(run(), run())
    ours.eval()
    assert torch.equal(run(), run())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "activation", ["relu", "gelu", torch.nn.GELU("tanh"), torch.nn.SiLU()], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
def test_encoder_layer(norm_first, activation, bias):
    theirs, ours = pair(
        "TransformerEncoderLayer",
        16,
        H,
        32,
        0.0,
        activation,
        batch_first=True,
        norm_first=norm_first,
        bias=bias,
    )
    x = torch.randn(N, S, 16)
    run = lambda m: m(x, src_key_padding_mask=PADDING)  # noqa: E731
    close(run(ours)[~PADDING], run(theirs)[~PADDING])
    same_gradients(theirs, ours, lambda m: run(m)[~PADDING])
    causal = torch.nn.Transformer.generate_square_subsequent_mask(S)
    close(ours(x, causal, is_causal=True), theirs(x, causal, is_causal=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_layer_inside_torchs_encoder():
    theirs, ours = pair("TransformerEncoderLayer", 16, H, 32, batch_first=True)
    padding = torch.arange(S) >= torch.tensor([4, 7, 2])[:, None]
    x = torch.randn(N, S, 16)
    outputs = []
    for layer in (theirs, ours):
        encoder = torch.nn.TransformerEncoder(layer, 2).eval()
        with torch.no_grad():
            outputs.append(encoder(x, src_key_padding_mask=padding))
    close(outputs[1], outputs[0])


@pytest.mark.parametrize("shape, options", [
    (16, {}), ((4, 6), {}), (16, {"elementwise_affine": False}), (16, {"bias": False}), (16, {"eps": 0.1}),
], ids=str)  # fmt: skip
def test_layer_norm(shape, options):
    theirs, ours = pair("LayerNorm", shape, **options)
    x = torch.randn(3, 2, *theirs.normalized_shape)
    close(ours(x), theirs(x))
    close(ours(x, residual=x.flip(0)), theirs(x + x.flip(0)))
    if list(ours.parameters()):
        same_gradients(theirs, ours, lambda m: m(x))


@pytest.mark.parametrize("shape, options", [
    (16, {}), ((4, 6), {}), (16, {"elementwise_affine": False}), (16, {"eps": 0.1})
], ids=str)  # fmt: skip
def test_rms_norm(shape, options):
    theirs, ours = pair("RMSNorm", shape, **options)
    x = torch.randn(3, 2, *theirs.normalized_shape)
    close(ours(x), theirs(x))
    close(ours(x, residual=x.flip(0)), theirs(x + x.flip(0)))
    if list(ours.parameters()):
        same_gradients(theirs, ours, lambda m: m(x))


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_softmax(dim):
    theirs, ours = pair("Softmax", dim)
    x = torch.randn(3, 4, 5)
    close(ours(x), theirs(x))


def test_softmax_without_a_dim_warns_as_torch_does():
    with pytest.warns(UserWarning, match="Implicit dimension choice"):
        fnn.Softmax()(torch.randn(2, 3))


@pytest.mark.parametrize("options", [
    {}, {"label_smoothing": 0.1}, {"ignore_index": 2}, {"reduction": "sum"}, {"reduction": "none"},
    {"weight": torch.rand(7)},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (3, 4, 2)])
def test_cross_entropy_loss(options, shape):
    theirs, ours = torch.nn.CrossEntropyLoss(**options), fnn.CrossEntropyLoss(**options)
    x = torch.randn(shape[0], 7, *shape[1:]) if shape else torch.randn(7)
    target = torch.randint(3, 7, shape)
    if shape:
        target[0] = 2
    close(ours(x, target), theirs(x, target))


def test_cross_entropy_loss_with_probabilities():
    x, target = torch.randn(3, 7), torch.rand(3, 7)
    close(fnn.CrossEntropyLoss()(x, target), torch.nn.CrossEntropyLoss()(x, target))


Q, K = torch.randn(N, L, 16), torch.randn(N, S, 16)
BAD_ATTENTION = {
    "int attn_mask": ((Q, K, K), {"attn_mask": torch.ones(L, S, dtype=torch.int32)}),
    "uint8 attn_mask": ((Q, K, K), {"attn_mask": torch.ones(L, S, dtype=torch.uint8)}),
    "int key_padding_mask": ((Q, K, K), {"key_padding_mask": torch.zeros(N, S, dtype=torch.int64)}),
    "attn_mask of one row": ((Q, K, K), {"attn_mask": torch.zeros(1, S)}),
    "4-D attn_mask": ((Q, K, K), {"attn_mask": torch.zeros(N, H, L, S)}),
    "1-D attn_mask": ((Q, K, K), {"attn_mask": torch.zeros(S)}),
    "3-D attn_mask of one head": ((Q, K, K), {"attn_mask": torch.zeros(N, L, S)}),
    "key_padding_mask of one row": ((Q, K, K), {"key_padding_mask": PADDING[:1]}),
    "short key_padding_mask": ((Q, K, K), {"key_padding_mask": PADDING[:, 1:]}),
    "1-D key_padding_mask": ((Q, K, K), {"key_padding_mask": PADDING[0]}),
    "key of another batch": ((Q, K[:1], K[:1]), {}),
    "value of another length": ((Q, K, K[:, 1:]), {}),
    "query of another width": ((Q[..., 1:], K, K), {}),
    "value of another width": ((Q, K, K[..., 1:]), {}),
    "1-D query": ((Q[0, 0],) * 3, {}),
    "unbatched key": ((Q, K[0], K[0]), {}),
    "unbatched with a batch of masks": ((Q[0], K[0], K[0]), {"key_padding_mask": PADDING}),
    "the hint without a mask": ((Q, K, K), {"is_causal": True}),
}


@pytest.mark.parametrize("wrong", BAD_ATTENTION)
@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_raises_where_torch_does(wrong, need_weights):
    args, options = BAD_ATTENTION[wrong]
    theirs, ours = pair("MultiheadAttention", 16, H, batch_first=True)
    with pytest.raises((AssertionError, RuntimeError)) as raised:
        theirs(*args, **options, need_weights=need_weights)
    with pytest.raises(raised.type, match=r"^MultiheadAttention: .*") as own:
        ours(*args, **options, need_weights=need_weights)
    assert own.type is raised.type and "\n" not in str(own.value)


def test_multihead_attention_names_what_is_wrong():
    ours = fnn.MultiheadAttention(16, H, kdim=12, vdim=10)
    for options, sentence in (
        ({"attn_mask": torch.ones(L, L, dtype=torch.int32)}, r"attn_mask must be bool .* got int32"),
        ({"key_padding_mask": PADDING}, r"key_padding_mask must be 1-D beside a 2-D query, got \(3, 7"),
        ({}, r"must have \(16, 12, 10\) features, got query \(1, 5, 16\), key"),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match=sentence):
            ours(Q[0], Q[0], Q[0], **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("weights", ["averaged", "whole", "not needed"])
def test_multihead_attention_of_a_nested_batch(weights):
    theirs, ours = (m.eval() for m in pair("MultiheadAttention", 16, H, batch_first=True))
    x = torch.nested.nested_tensor([torch.randn(n, 16) for n in (4, 7, 2)])
    options = {"need_weights": weights != "not needed", "average_attn_weights": weights != "whole"}
    with torch.no_grad():
        (a, w), (b, v) = ours(x, x, x, **options), theirs(x, x, x, **options)
    assert a.is_nested
    for ours_row, theirs_row in zip(a.unbind(), b.unbind(), strict=True):
        close(ours_row, theirs_row)
    assert (w is None) == (v is None)
    for row, (n, wanted) in enumerate(zip((4, 7, 2), () if v is None else v, strict=False)):
        close(w[row, ..., :n, :n], wanted[..., :n, :n])
    x_with_gradient = torch.nested.nested_tensor(list(x.unbind()), requires_grad=True)
    ours(x_with_gradient, x_with_gradient, x_with_gradient)[0].to_padded_tensor(0).sum().backward()
    assert x_with_gradient.grad.is_nested
    with pytest.raises(AssertionError, match="a nested query must be key and value too"):
        ours(x, x.clone(), x)


@pytest.mark.parametrize("options", [{}, {"bias": False, "norm_first": True}], ids=str)
def test_encoder_layer_draws_torchs_weights(options):
    torch.manual_seed(0)
    theirs = torch.nn.TransformerEncoderLayer(8, 2, 16, **options)
    torch.manual_seed(0)
    ours = fnn.TransformerEncoderLayer(8, 2, 16, **options)
    wanted = theirs.state_dict()
    assert list(ours.state_dict()) == list(wanted)
    assert all(torch.equal(p, wanted[name]) for name, p in ours.state_dict().items())
    assert type(ours.self_attn) is fnn.MultiheadAttention
    assert type(ours.norm1) is type(ours.norm2) is fnn.LayerNorm


def test_encoder_layer_is_copied_and_pickled():
    layer = fnn.TransformerEncoderLayer(8, 2, 16, activation="gelu").eval()
    x = torch.randn(5, 3, 8)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin.self_attn) is fnn.MultiheadAttention
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_norms_of_a_wrong_shape(name):
    for shape, wrong in (((4, 6), (2, 6, 4)), (5, (2, 4)), ((4, 6), (6,))):
        for affine in (True, False):
            theirs, ours = pair(name, shape, elementwise_affine=affine)
            with pytest.raises((RuntimeError, ValueError)):  # RMSNorm has both
                theirs(torch.randn(wrong))
            with pytest.raises(
                RuntimeError, match=rf"^{name}: the input must end in normalized_shape"
            ):
                ours(torch.randn(wrong))
    x = torch.randn(2, 4, 6)
    with pytest.raises(RuntimeError, match=rf"^{name}: residual must have the input's shape"):
        getattr(fnn, name)((4, 6))(x, residual=torch.randn(2, 6, 4))


@pytest.mark.parametrize("norm_first", [False, True])
def test_dtypes_under_autocast_are_torchs(norm_first):
    theirs, ours = pair("TransformerEncoderLayer", 16, H, 32, 0.0, norm_first=norm_first)
    x = torch.randn(S, N, 16)
    norms, norm_own = pair("LayerNorm", 16)
    soft, soft_own = pair("Softmax", -1)
    with torch.autocast("cpu", torch.bfloat16):
        close(ours(x), theirs(x), 0.02)
        half = x.bfloat16()
        close(norm_own(half, residual=x), norms(half + x))
        close(soft_own(half), soft(half), 0.01)
        close(soft_own(x), soft(x))
        weights = [m.self_attn(x, x, x)[1] for m in (ours, theirs)]
        close(*weights, 0.01)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_loss_takes_what_torch_takes(reduction):
    theirs, ours = (m.CrossEntropyLoss(reduction=reduction) for m in (torch.nn, fnn))
    for input, target in (
        (torch.randn(7), torch.tensor([3])),
        (torch.randn(3, 7), torch.tensor([1, 2, 6], dtype=torch.uint8)),
    ):
        close(ours(input, target), theirs(input, target))


@pytest.mark.parametrize("input, target", [
    (torch.tensor(1.0), torch.tensor(0)), (torch.randn(3, 7), [1, 2, 3]),
    (torch.randn(3, 7), torch.tensor([1, 2])), (torch.randn(3, 7), torch.tensor([1, 2, 3]).int()),
    (torch.randn(7), torch.tensor([1, 2])), (torch.randn(3, 7, 2), torch.tensor([1, 2, 3])),
    (torch.randn(3, 7), torch.ones(3, dtype=torch.bool)),
], ids=str)  # fmt: skip
def test_cross_entropy_loss_raises_as_torch_does(input, target):
    with pytest.raises((RuntimeError, TypeError, ValueError)) as raised:
        torch.nn.CrossEntropyLoss()(input, target)
    with pytest.raises(raised.type, match=re.escape(str(raised.value))):
        fnn.CrossEntropyLoss()(input, target)
