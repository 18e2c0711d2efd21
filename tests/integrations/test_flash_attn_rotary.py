"""flash_attn.layers.rotary and ops.triton.rotary, against the rotation written out."""

import inspect

import pytest
import torch

from fastattn.integrations.flash_attn.layers import rotary as layers
from fastattn.integrations.flash_attn.ops.triton import rotary as ops

from .test_flash_attn import rotated

SIGNATURES = {
    layers.apply_rotary_emb: "x cos sin interleaved=False inplace=False seqlen_offsets=0 cu_seqlens=None max_seqlen=None",
    layers.apply_rotary_emb_qkv_: "qkv cos sin cos_k=None sin_k=None interleaved=False seqlen_offsets=0 num_heads_q=None",
    layers.apply_rotary_emb_kv_: "kv cos sin interleaved=False seqlen_offsets=0",
    layers.apply_rotary_emb_torch: "x cos sin interleaved=False",
    ops.apply_rotary: "x cos sin seqlen_offsets=0 cu_seqlens=None max_seqlen=None interleaved=False inplace=False conjugate=False",
    layers.RotaryEmbedding: "dim base=10000.0 interleaved=False scale_base=None device=None",
    layers.RotaryEmbedding.forward: "self qkv kv=None seqlen_offset=0 max_seqlen=None num_heads_q=None",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__qualname__)
def test_signature(function):
    shown = [
        p.name if p.default is p.empty else f"{p.name}={p.default}"
        for p in inspect.signature(function).parameters.values()
    ]
    assert shown == SIGNATURES[function].split()


def tables(P, R, dtype=torch.float32):
    angles = torch.rand(P, R // 2) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


OFFSETS = [0, 3, torch.tensor([2, 0]), torch.tensor([1, 5]).int()]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("R", [16, 6])
def test_apply_rotary_emb(interleaved, inplace, offsets, R):
    torch.manual_seed(0)
    (cos, sin), at = tables(20, R), torch.arange(7)
    at = (torch.as_tensor(offsets).long().view(-1, 1) + at).expand(2, 7)
    x = torch.randn(2, 7, 3, 16, requires_grad=True)
    copy = x.detach().clone().requires_grad_()
    expected = rotated(copy, cos, sin, at, interleaved)
    out = layers.apply_rotary_emb(x, cos, sin, interleaved, inplace, offsets)
    torch.testing.assert_close(out, expected)
    assert (out.data_ptr() == x.data_ptr()) is inplace
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, copy.grad)
    back = ops.apply_rotary(
        out.detach(), cos, sin, offsets, interleaved=interleaved, conjugate=True
    )
    torch.testing.assert_close(back, copy.detach())


@pytest.mark.parametrize("offsets", [0, 2, torch.tensor([3, 1, 0, 2])], ids=str)
def test_packed(offsets):
    torch.manual_seed(1)
    cu = torch.tensor([0, 4, 4, 9, 12]).int()
    x, (cos, sin) = torch.randn(12, 3, 16), tables(20, 8)
    out = layers.apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets, cu_seqlens=cu, max_seqlen=5)
    for b in range(4):
        rows = slice(cu[b], cu[b + 1])
        at = torch.arange(cu[b + 1] - cu[b]) + (offsets[b] if torch.is_tensor(offsets) else offsets)
        torch.testing.assert_close(out[rows], rotated(x[None, rows], cos, sin, at[None], False)[0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("own_tables", [False, True])
@pytest.mark.parametrize("kind", ["three", "grouped", "made"])
def test_qkv_in_place(interleaved, own_tables, kind):
    """A leaf, heads of two numbers, and a result of a projection, as modules pass it."""
    torch.manual_seed(2)
    shape = (2, 5, 8, 16) if kind == "grouped" else (2, 5, 3, 4, 16)
    leaf = torch.randn(*shape, requires_grad=True)
    copy = leaf.detach().clone().requires_grad_()
    (cos, sin), keys = tables(9, 12), tables(9, 12) if own_tables else (None, None)
    given = leaf * 2 if kind == "made" else leaf
    out = layers.apply_rotary_emb_qkv_(
        given, cos, sin, *keys, interleaved, 2, 4 if kind == "grouped" else None
    )
    assert out.data_ptr() == given.data_ptr()
    whole, at = copy * 2 if kind == "made" else copy, (torch.arange(5) + 2).expand(2, 5)
    q, k, v = whole.split([4, 2, 2], 2) if kind == "grouped" else whole.unbind(2)
    cos_k, sin_k = keys if own_tables else (cos, sin)
    parts = rotated(q, cos, sin, at, interleaved), rotated(k, cos_k, sin_k, at, interleaved), v
    expected = torch.cat(parts, 2) if kind == "grouped" else torch.stack(parts, 2)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(leaf.grad, copy.grad)


def test_kv_in_place_and_tables_of_every_token():
    torch.manual_seed(3)
    kv, (cos, sin) = torch.randn(2, 5, 2, 4, 16), tables(9, 16)
    before, at = kv.clone(), torch.arange(5).expand(2, 5)
    assert layers.apply_rotary_emb_kv_(kv, cos, sin) is kv
    torch.testing.assert_close(kv[:, :, 0], rotated(before[:, :, 0], cos, sin, at, False))
    assert torch.equal(kv[:, :, 1], before[:, :, 1])
    own = torch.randint(0, 9, (2, 5))
    found = layers.apply_rotary_emb_torch(before[:, :, 0], cos[own], sin[own], True)
    torch.testing.assert_close(found, rotated(before[:, :, 0], cos, sin, own, True))


@pytest.mark.parametrize("scale_base", [None, 512])
@pytest.mark.parametrize("offset", [0, 4, torch.tensor([1, 4])], ids=str)
def test_module(scale_base, offset):
    torch.manual_seed(4)
    module = layers.RotaryEmbedding(8, base=100.0, scale_base=scale_base)
    assert not module.state_dict()
    S, reach = 6, 12 if torch.is_tensor(offset) else 6 + offset
    angles = torch.outer(torch.arange(reach), 100.0 ** (-torch.arange(0, 8, 2) / 8))
    cos, sin = angles.cos(), angles.sin()
    scale = 1.0
    if scale_base:
        power = (torch.arange(reach) - reach // 2) / scale_base
        scale = ((torch.arange(0, 8, 2) + 0.4 * 8) / (1.4 * 8)) ** power[:, None]
    at = (torch.as_tensor(offset).view(-1, 1) + torch.arange(S)).expand(2, S)
    qkv = torch.randn(2, S, 3, 4, 16)
    q, k, v = (x.clone() for x in qkv.unbind(2))
    given = {"max_seqlen": reach} if torch.is_tensor(offset) else {}
    expected_q = rotated(q, cos * scale, sin * scale, at, False)
    expected_k = rotated(k, cos / scale, sin / scale, at, False)
    out = module(qkv.clone(), seqlen_offset=offset, **given)
    torch.testing.assert_close(out, torch.stack([expected_q, expected_k, v], 2))
    out_q, out_kv = module(q.clone(), torch.stack([k, v], 2), seqlen_offset=offset, **given)
    torch.testing.assert_close((out_q, out_kv), (expected_q, torch.stack([expected_k, v], 2)))


def test_module_in_bfloat16_keeps_its_angles():
    module = layers.RotaryEmbedding(8).to(torch.bfloat16)
    module(torch.randn(1, 3000, 3, 1, 8).to(torch.bfloat16))
    angles = torch.outer(torch.arange(3000.0), 10000.0 ** (-torch.arange(0, 8, 2) / 8))
    assert torch.equal(module._cos_cached, angles.cos().to(torch.bfloat16))
    with torch.inference_mode():
        fresh = layers.RotaryEmbedding(8)
        fresh(torch.randn(1, 5, 3, 1, 8))
    fresh(torch.randn(1, 5, 3, 1, 8, requires_grad=True)).sum().backward()


X, (COS, SIN) = torch.randn(2, 7, 3, 16), tables(9, 16)
ERRORS = [
    (lambda: layers.apply_rotary_emb(X, COS, SIN, seqlen_offsets=3), "cos has 9 rows, and tokens reach position 9"),
    (lambda: layers.apply_rotary_emb(X, COS, SIN, seqlen_offsets=torch.tensor([0, 4])), r"positions must be in \[0, 9\)"),
    (lambda: layers.apply_rotary_emb(X, COS, SIN, seqlen_offsets=torch.tensor([0])), r"seqlen_offsets must be \(B,\) = \(2,\)"),
    (lambda: layers.apply_rotary_emb(X[0], COS, SIN), r"x must be \(B, S, H, D\)"),
    (lambda: layers.apply_rotary_emb_qkv_(X, COS, SIN), "needs num_heads_q"),
    (lambda: layers.apply_rotary_emb_qkv_(X, COS, SIN, num_heads_q=2), r"qkv must be \(B, S, 2 \+ 2 Hkv, D\)"),
    (lambda: layers.apply_rotary_emb_kv_(X[:, :, :, None], COS, SIN), r"kv must be \(B, S, 2, H, D\)"),
    (lambda: layers.RotaryEmbedding(8)(X[:, :, None].expand(2, 7, 3, 3, 16), seqlen_offset=torch.tensor([1, 2])), "needs max_seqlen"),
]  # fmt: skip


@pytest.mark.parametrize("call, sentence", ERRORS, ids=[s for _, s in ERRORS])
def test_errors(call, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        call()
