"""The definition against torch.nn.functional in fp64, and its derivatives by gradcheck."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fastattn as fa

torch.manual_seed(0)
Q, K, V = (torch.randn(2, 4, n, 8, dtype=torch.float64) for n in (5, 7, 7))
BIAS = torch.randn(4, 5, 7, dtype=torch.float64)
MASK = torch.rand(2, 1, 5, 7) > 0.3
X, W, B = torch.randn(3, 6).double(), torch.randn(6).double(), torch.randn(6).double()


@pytest.fixture(autouse=True)
def reference():
    with fa.use_backend("reference"):
        yield


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-12)


def test_attention_is_sdpa():
    same(fa.attention(Q, K, V), F.scaled_dot_product_attention(Q, K, V))
    same(
        fa.attention(Q, K, V, mask=MASK, scale=0.3),
        F.scaled_dot_product_attention(Q, K, V, MASK, scale=0.3),
    )
    same(fa.attention(Q, K, V, bias=BIAS), F.scaled_dot_product_attention(Q, K, V, BIAS))
    grouped = fa.attention(Q, K[:, :2], V[:, :2])
    same(grouped, F.scaled_dot_product_attention(Q, K[:, :2], V[:, :2], enable_gqa=True))
    square = fa.attention(K, K, V, causal=True)
    same(square, F.scaled_dot_product_attention(K, K, V, is_causal=True))


@pytest.mark.parametrize("Sq, Sk", [(5, 9), (9, 5), (7, 7)])
@pytest.mark.parametrize("lead", [(2, 3), (2,), (2, 2, 3)])
def test_scaled_dot_product_attention_is_torchs(Sq, Sk, lead):
    q, k, v = torch.randn(*lead, Sq, 8), torch.randn(*lead, Sk, 8), torch.randn(*lead, Sk, 6)
    for options in (
        {}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.rand(Sq, Sk) > 0.3},
        {"attn_mask": torch.randn(*lead, Sq, Sk)},
    ):  # fmt: skip
        mine = fa.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(
            mine, F.scaled_dot_product_attention(q, k, v, **options), atol=2e-6, rtol=2e-6
        )
    with pytest.raises(RuntimeError, match="attn_mask and is_causal cannot both be set"):
        fa.scaled_dot_product_attention(q, k, v, torch.ones(Sq, Sk), is_causal=True)


@pytest.mark.parametrize("shapes, options", [
    ([(5, 8), (7, 8), (7, 6)], {}),
    ([(5, 8), (7, 8), (7, 6)], {"is_causal": True}),
    ([(9, 8), (7, 8), (7, 6)], {"is_causal": True}),
    ([(5, 8), (7, 8), (7, 6)], {"attn_mask": torch.rand(5, 7) > 0.3}),
    ([(4, 5, 8), (2, 7, 8), (2, 7, 6)], {"enable_gqa": True}),
    ([(4, 5, 8), (2, 7, 8), (2, 7, 6)], {"enable_gqa": True, "attn_mask": torch.randn(4, 1, 7)}),
    ([(3, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 6)], {"enable_gqa": True}),
    ([(3, 4, 5, 8), (3, 2, 7, 8), (3, 1, 7, 6)], {"enable_gqa": True}),
    ([(2, 3, 4, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 6)], {"enable_gqa": True, "is_causal": True}),
    ([(2, 3, 4, 5, 8), (1, 4, 7, 8), (3, 4, 7, 6)], {"attn_mask": torch.randn(3, 1, 5, 7)}),
    ([(2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 6)], {}),
], ids=str)  # fmt: skip
def test_scaled_dot_product_attention_takes_torchs_shapes(shapes, options):
    q, k, v = (torch.randn(shape) for shape in shapes)
    mine = fa.scaled_dot_product_attention(q, k, v, **options)
    wanted = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(mine, wanted, atol=2e-6, rtol=2e-6)


def explicit_weights(causal, window, slopes, softcap, sinks):
    """The weights of one query at a time, from the words of the documentation."""
    out = torch.zeros(2, 4, 5, 8, dtype=torch.float64)
    for b, h, i in itertools.product(range(2), range(4), range(5)):
        logits, values = [sinks[h]], [torch.zeros(8).double()]
        for j in range(7):
            at = i + 7 - 5
            left, right = window
            if (causal and j > at) or j < at - left or j > at + right:
                continue
            score = Q[b, h, i] @ K[b, h, j] / 8**0.5
            score = softcap * torch.tanh(score / softcap) - slopes[h] * abs(at - j)
            logits.append(score)
            values.append(V[b, h, j])
        out[b, h, i] = torch.softmax(torch.stack(logits), 0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("causal", [False, True])
def test_positions_alibi_softcap_and_sinks(causal):
    slopes, sinks = torch.rand(4).double(), torch.randn(4).double()
    options = {"causal": causal, "window": (2, 1), "softcap": 2.0}
    mine = fa.attention(Q, K, V, alibi_slopes=slopes, sinks=sinks, **options)
    same(mine, explicit_weights(causal, (2, 1), slopes, 2.0, sinks))


def test_key_lengths_packing_and_lse():
    lengths = torch.tensor([7, 3])
    out, lse = fa.attention(Q, K, V, key_lengths=lengths, return_lse=True)
    alone = fa.attention(Q[1:], K[1:, :, :3], V[1:, :, :3])
    same(out[1:], alone)
    same(
        lse,
        torch.logsumexp(
            (Q @ K.mT / 8**0.5).where(
                (torch.arange(7) < lengths[:, None])[:, None, None], -torch.inf
            ),
            -1,
        ),
    )
    flat = [torch.cat([x[0], x[1, :, :n]], 1).transpose(0, 1) for x, n in ((Q, 4), (K, 6), (V, 6))]
    packed, lse = fa.attention_varlen(
        *flat, torch.tensor([0, 5, 9]), torch.tensor([0, 7, 13]), causal=True, return_lse=True
    )
    same(packed[:5].transpose(0, 1), fa.attention(Q[:1], K[:1], V[:1], causal=True)[0])
    same(
        packed[5:].transpose(0, 1),
        fa.attention(Q[1:, :, :4], K[1:, :, :6], V[1:, :, :6], causal=True)[0],
    )
    assert lse.shape == (4, 9)


def test_dropout_keeps_by_philox():
    """A scalar Philox, written from the paper, decides what is kept."""
    from fastattn.kernels.reference.philox import keep_mask

    def word(counter, seed):
        c, (k0, k1) = list(counter), (seed & 0xFFFFFFFF, seed >> 32)
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k1, a & 0xFFFFFFFF]
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        return c

    assert word((0, 0, 0, 0), 0) == [
        0x6627E8D5,
        0xE169C58D,
        0xBC57AC4C,
        0x9B00DBD8,
    ]  # Random123's own test
    seed, offset = 0x123456789ABCDEF, 0x89ABCDEF
    kept = keep_mask(torch.arange(3), torch.tensor(5), 11, torch.tensor([seed, offset]), 0.3)
    wanted = [
        [word((j // 4, i, 5, offset), seed)[j % 4] >= int(0.3 * 2**32) for j in range(11)]
        for i in range(3)
    ]
    assert kept.tolist() == wanted
    assert keep_mask(
        torch.arange(500), torch.tensor(0), 500, torch.tensor([1, 2]), 0.3
    ).double().mean() == pytest.approx(0.7, abs=0.005)


@pytest.mark.parametrize("order", [gradcheck, gradgradcheck])
def test_attention_with_everything_has_its_derivatives(order):
    q, k, v = (
        torch.randn(2, 4 if n == 3 else 2, n, 3).double().requires_grad_() for n in (3, 4, 4)
    )
    bias = torch.randn(4, 3, 1).double().requires_grad_()
    slopes, sinks = (torch.rand(4).double().requires_grad_() for _ in range(2))
    mask = torch.tensor([True, True, False, True])

    def call(q, k, v, bias, slopes, sinks):
        return fa.attention(
            q, k, v, bias=bias, alibi_slopes=slopes, sinks=sinks, causal=True, window=(3, None), mask=mask,
            softcap=2.0, key_lengths=torch.tensor([4, 3]), dropout_p=0.3, return_lse=True,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    assert order(call, (q, k, v, bias, slopes, sinks))


def test_rows_are_torchs():
    same(fa.layer_norm(X, W, B, 1e-3), F.layer_norm(X, (6,), W, B, 1e-3))
    same(fa.rms_norm(X, W, 1e-3), F.rms_norm(X, (6,), W, 1e-3))
    same(fa.rms_norm(X, W, None), F.rms_norm(X, (6,), W))
    same(fa.softmax(X, 0), X.softmax(0))
    same(fa.gelu(X, bias=B), F.gelu(X + B))
    same(fa.gelu(X, approximate="tanh"), F.gelu(X, approximate="tanh"))
    same(fa.swiglu(X, X + 1), F.silu(X) * (X + 1))
    same(fa.geglu(X, X + 1), F.gelu(X) * (X + 1))
    target = torch.tensor([0, 5, -100])
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"reduction": "none"}):
        same(fa.cross_entropy(X, target, **options), F.cross_entropy(X, target, **options))
    assert fa.cross_entropy(X, torch.full((3,), -100)).isnan()
    rotated = fa.rotary(Q, torch.ones(5, 4).double(), torch.zeros(5, 4).double())
    same(rotated, Q)


@pytest.mark.parametrize("call", [
    lambda x, w, b: fa.layer_norm(x, w, b, residual=x.flip(0), return_residual=True, dropout_p=0.3, generator=torch.Generator().manual_seed(0)),
    lambda x, w, b: fa.rms_norm(x, w, weight_offset=1.0, residual=b.expand_as(x)),
    lambda x, w, b: fa.softmax(x * w, causal=True, scale=0.3) + b,
    lambda x, w, b: fa.cross_entropy(x * w + b, torch.tensor([0, 5, -100]), label_smoothing=0.1, z_loss=0.1),
    lambda x, w, b: fa.linear_cross_entropy(x, w[:, None] * b, torch.tensor([0, 5, -100]), bias=b),
    lambda x, w, b: fa.geglu(fa.gelu(x * w, bias=b, approximate="tanh"), fa.swiglu(x, x + b)),
    lambda x, w, b: fa.rotary(x[None, None], w[:3, None], b[:3, None], interleaved=True),
], ids=["layer_norm", "rms_norm", "softmax", "cross_entropy", "linear_cross_entropy", "activations", "rotary"])  # fmt: skip
@pytest.mark.parametrize("order", [gradcheck, gradgradcheck])
def test_rows_have_their_derivatives(call, order):
    assert order(call, tuple(x.clone().requires_grad_() for x in (X, W, B)))
