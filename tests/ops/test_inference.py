"""The short way of a call without gradients: the same bits, and nobody who should see it is passed by."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn as fa
from fastattn.ops import inference

pytestmark = pytest.mark.skipif(inference._operator is None, reason="no CPU kernels")
SHAPES = [
    (2, 4, 4, 7, 7, 64, 64),
    (1, 6, 2, 1, 33, 32, 16),
    (2, 2, 1, 20, 5, 24, 40),
    (1, 2, 2, 0, 3, 8, 8),
]


def tensors(B, Hq, Hkv, Sq, Sk, D, Dv, dtype=torch.float32):
    return (
        torch.randn(B, Hq, Sq, D).to(dtype),
        torch.randn(B, Hkv, Sk, D).to(dtype),
        torch.randn(B, Hkv, Sk, Dv).to(dtype),
    )


def refuse(*arguments):
    raise AssertionError("the short way was taken")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits(shape, causal, dtype):
    q, k, v = tensors(*shape, dtype=dtype)
    short = inference.attend(q, k, v, causal)
    assert short is not None
    assert torch.equal(short, fa.attention(q, k, v, causal=causal, backend="cpu"))
    assert torch.equal(short, fa.attention(q, k, v, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
def test_the_same_bits_from_a_cache(causal):
    q, k, v = tensors(2, 4, 2, 3, 9, 32, 32)
    cache = fa.KVCache(2, 2, 32, max_length=12)
    cache.append(k, v, new_lengths=[9, 5])
    general = fa.attention_decode(q, cache, causal=causal, backend="cpu")
    assert torch.equal(inference.attend(q, cache.key, cache.value, causal, cache.lengths), general)
    assert torch.equal(fa.attention_decode(q, cache, causal=causal), general)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (lambda q, k, v: (q, k[:, :, :, :5], v), "D"),
        (lambda q, k, v: (q, k, v[:, :1].expand(-1, 3, -1, -1)), "Hkv"),
        (lambda q, k, v: (q[0], k, v), "query"),
        (lambda q, k, v: (q, k.double(), v), "dtype"),
        (lambda q, k, v: (q.to_sparse(), k, v), "query"),
    ],
)
def test_what_is_wrong_goes_the_general_way_and_is_told(wrong, sentence):
    arguments = wrong(*tensors(1, 2, 2, 4, 4, 8, 8))
    assert inference.attend(*arguments, False) is None
    with pytest.raises((ValueError, TypeError), match=sentence):
        fa.attention(*arguments)


def test_gradients_modes_and_transforms_are_not_passed_by(monkeypatch):
    q, k, v = tensors(2, 2, 2, 4, 4, 8, 8)
    monkeypatch.setattr(inference, "_operator", refuse)

    class Watch(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen += (str(function),)
            return function(*args, **(kwargs or {}))

    with Watch() as watch:
        fa.attention(q, k, v)
    assert any("attention_fwd" in name for name in watch.seen)
    fa.attention(q.clone().requires_grad_(), k, v).sum().backward()
    torch.func.vmap(fa.attention)(*(x[:, None] for x in (q, k, v)))
    with torch.autograd.forward_ad.dual_level():
        fa.attention(q, k, v)
    with fa.use_backend("reference"):
        fa.attention(q, k, v)
    with torch.autocast("cpu"):
        assert fa.attention(q, k, v).dtype == torch.bfloat16
    assert fa.attention(*(x.double() for x in (q, k, v))).dtype == torch.float64
    with pytest.raises(AssertionError, match="short way"):
        fa.attention(q, k, v)


@pytest.mark.parametrize("shape", [(5, 7, 33), (64,), (0, 8), (3, 4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [(), ("weight",), ("residual", "weight")])
def test_the_same_bits_of_a_norm(shape, dtype, given):
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight, bias = torch.randn(2, shape[-1]).to(dtype)
    weight = weight if "weight" in given else None
    residual = residual if "residual" in given else None
    for rms, norm, more in ((False, fa.layer_norm, {"bias": bias}), (True, fa.rms_norm, {})):
        short = inference.normalise(x, residual, weight, more.get("bias"), rms, 1e-5)
        assert short is not None
        general = norm(x, weight, eps=1e-5, residual=residual, **more, backend="cpu")
        assert torch.equal(short, general)
        assert torch.equal(norm(x, weight, eps=1e-5, residual=residual, **more), general)


def test_a_norm_that_goes_the_general_way(monkeypatch):
    monkeypatch.setattr(inference, "_norm", refuse)
    x, weight = torch.randn(3, 8), torch.randn(8)
    fa.layer_norm(x.clone().requires_grad_(), weight)
    fa.layer_norm(x, weight.double())
    fa.layer_norm(x, return_residual=True)
    fa.layer_norm(x, dropout_p=0.5)
    fa.rms_norm(x, weight, weight_offset=1.0)
    fa.layer_norm(x.double())
    with fa.use_backend("reference"):
        fa.layer_norm(x)
    for wrong in (
        {"x": x[..., :5]}, {"eps": -1.0}, {"eps": float("nan")}, {"residual": x[:1]}, {"dropout_p": -1.0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="layer_norm: "):
            fa.layer_norm(**{"x": x, "weight": weight, **wrong})
    with pytest.raises(TypeError, match="layer_norm: "):
        fa.layer_norm(x, weight, return_residual=0)
