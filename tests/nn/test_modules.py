"""fastattn.nn against torch.nn with the same weights: every mask, every option, gradients too."""

import itertools

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
