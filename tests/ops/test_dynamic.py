"""Compiled for sizes that change: twelve lengths are far more than torch.compile's limit of recompiles."""

import pytest
import torch
import torch._dynamo.testing

import fastattn as fa

D, V = 8, 11
COS, SIN = torch.randn(64, D // 2), torch.randn(64, D // 2)
WEIGHT, ROW = torch.randn(V, D), torch.randn(D)


def heads(n):
    return torch.randn(2 + n % 3, 4, n, D, requires_grad=True)


def rows(n):
    return torch.randn(n, D, requires_grad=True)


def target(x):
    return torch.arange(len(x)) % D


# name -> the call on one tensor, and that tensor for a size
CALLS = {
    "attention": (lambda x: fa.attention(x, x[:, :2], x[:, :2], causal=True, window=(5, 0)), heads),
    "attention_options": (
        lambda x: fa.attention(x, x, x, bias=x[:1, :1, :, :1], key_lengths=torch.full(x.shape[:1], 3), softcap=2.0),
        heads,
    ),
    "attention_varlen": (
        lambda x: fa.attention_varlen(
            x[:, None], x[:, None], x[:, None], *[torch.tensor([0, 2]) * (len(x) // 2)] * 2),
        lambda n: rows(2 * n),
    ),
    "sdpa": (lambda x: fa.scaled_dot_product_attention(x, x, x), heads),
    "sdpa_causal": (lambda x: fa.scaled_dot_product_attention(x, x, x, is_causal=True), heads),
    "sdpa_mask": (lambda x: fa.scaled_dot_product_attention(x, x, x, x[0, 0, :, :1]), heads),
    "sdpa_gqa": (
        lambda x: fa.scaled_dot_product_attention(x, x[:, :2], x[:, :2], enable_gqa=True), heads),
    "layer_norm": (lambda x: fa.layer_norm(x, ROW, ROW, residual=x), rows),
    "rms_norm": (lambda x: fa.rms_norm(x, ROW, eps=None), rows),
    "softmax": (lambda x: fa.softmax(x), rows),
    "softmax_dim": (lambda x: fa.softmax(x, dim=1, mask=x[:, :1] > 0), heads),
    "cross_entropy": (lambda x: fa.cross_entropy(x, target(x), label_smoothing=0.1), rows),
    "cross_entropy_inplace": (
        lambda x: fa.cross_entropy(x * 1.0, target(x), inplace_backward=True), rows),
    "linear_cross_entropy": (lambda x: fa.linear_cross_entropy(x, WEIGHT, target(x)), rows),
    "gelu": (lambda x: fa.gelu(x, bias=ROW), rows),
    "swiglu": (lambda x: fa.swiglu(x, x), heads),
    "geglu": (lambda x: fa.geglu(x, x), rows),
    "rotary": (lambda x: fa.rotary(x, COS, SIN), heads),
    "rotary_positions": (
        lambda x: fa.rotary(x, COS, SIN, positions=torch.arange(x.shape[2]).flip(0)), heads),
}  # fmt: skip


# torch's own, where it traces any autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "name, dynamic", [*((name, True) for name in CALLS), ("attention", None), ("sdpa_mask", None)]
)
def test_twelve_sizes(name, dynamic):
    function, make = CALLS[name]
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=graphs)
    for n in range(5, 17):
        x = make(n)
        y, wanted = compiled(x), function(x)
        torch.testing.assert_close(y, wanted, atol=1e-6, rtol=1e-5)
        found, expected = (torch.autograd.grad(r.sin().sum(), x)[0] for r in (y, wanted))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert graphs.frame_count <= 3
