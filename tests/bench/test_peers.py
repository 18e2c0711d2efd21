"""The peers that need a GPU, called as they are to be called: fakes of their modules with the signatures of
flash-attn 2.8, xformers 0.0.34 and Liger 0.6, which compute on the CPU and check what they are given."""

import importlib
import inspect
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, flex_attention

from fastattn.bench import peers
from fastattn.bench.families import attention as attention_family
from fastattn.bench.harness import judged
from fastattn.bench.workload import Setting


class OnGpu(Setting):
    """Asks for a GPU's peers, on the CPU's tensors."""

    on_gpu = True


SETTING = OnGpu(torch.float32)


def laid_out(*tensors):
    """(B, S, H, D) as these libraries take them: 4 dimensions, the last contiguous."""
    assert all(x.dim() == 4 and x.stride(-1) == 1 for x in tensors)
    assert len({x.dtype for x in tensors}) == 1
    return [x.transpose(1, 2) for x in tensors]


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
                    softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
    q, k, v = laid_out(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None,
                            cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None,
                            softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                            rotary_interleaved=True, alibi_slopes=None, num_splits=0,
                            return_softmax_lse=False):  # fmt: skip
    q, k_cache, v_cache = laid_out(q.detach(), k_cache.detach(), v_cache.detach())
    out = F.scaled_dot_product_attention(q, k_cache, v_cache, enable_gqa=True)
    return out.transpose(1, 2)


class LowerTriangularMask:
    """Its top-left diagonal is ours where Sq is Sk."""


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None,
                               output_dtype=None):  # fmt: skip
    assert attn_bias is None or isinstance(attn_bias, LowerTriangularMask)
    return flash_attn_func(query, key, value, causal=attn_bias is not None)


class InPlace(torch.autograd.Function):
    """Writes a gradient over its input, as Liger does: everyone after it would see that."""

    @staticmethod
    def forward(ctx, x, function):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            out = function(leaf)
            (ctx.gradient,) = torch.autograd.grad(out.sum(), leaf)
        out = out.detach()
        x.detach().fill_(torch.nan)
        return out

    @staticmethod
    def backward(ctx, dout):
        return ctx.gradient * dout, None


def liger_cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
                        reduction="mean", label_smoothing=0.0, lse_square_scale=0.0, softcap=None,
                        return_z_loss=False):  # fmt: skip
    assert input.dim() == 2 and target.dtype == torch.int64
    return InPlace.apply(input, lambda x: F.cross_entropy(x, target))


def liger_fused_linear_cross_entropy(input, weight, target, bias=None, ce_weight=None, ignore_index=-100,
                                     lse_square_scale=0.0, label_smoothing=0.0, reduction="mean",
                                     softcap=None, return_z_loss=False):  # fmt: skip
    return F.cross_entropy(input @ weight.T, target)


def liger_layer_norm(X, W, B, eps):
    return F.layer_norm(X, W.shape, W, B, eps)


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert not in_place, "it would write over the gradient that everyone is given"
    return F.rms_norm(X, W.shape, W, eps)


def liger_swiglu(a, b):
    return InPlace.apply(a, lambda x: F.silu(x)) * b


class LigerSoftmaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_):
        y = input_.softmax(-1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dout):
        (y,) = ctx.saved_tensors
        return y * (dout - (dout * y).sum(-1, keepdim=True))


FAKES = {
    "flash_attn": (flash_attn_func, flash_attn_with_kvcache),
    "xformers": (),
    "xformers.ops": (memory_efficient_attention, LowerTriangularMask),
    "liger_kernel": (),
    "liger_kernel.transformers": (),
    "liger_kernel.transformers.functional": (
        liger_cross_entropy, liger_fused_linear_cross_entropy, liger_layer_norm, liger_rms_norm,
        liger_swiglu,
    ),
    "liger_kernel.ops": (),
    "liger_kernel.ops.softmax": (LigerSoftmaxFunction,),
}  # fmt: skip


@pytest.fixture
def installed(monkeypatch):
    for name, members in FAKES.items():
        module = types.ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        for member in members:
            setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)


CALLS = [
    ("attention", lambda f: f.workload(SETTING, 2, 2, 33, 16, True), ("flash-attn", "xformers")),
    ("attention", lambda f: f.workload(SETTING, 2, 2, 33, 16, False), ("flash-attn", "xformers")),
    ("decode", lambda f: f.workload(SETTING, 2, 4, 2, 33, 16), ("flash-attn",)),
    ("norm", lambda f: f.workload(SETTING, "layer_norm", 7, 33), ("liger",)),
    ("norm", lambda f: f.workload(SETTING, "rms_norm", 7, 33), ("liger",)),
    ("softmax", lambda f: f.workload(SETTING, (7, 33), False), ("liger",)),
    ("cross_entropy", lambda f: f.workload(SETTING, 7, 50), ("liger",)),
    ("linear_cross_entropy", lambda f: f.workload(SETTING, 7, 16, 50), ("liger",)),
    ("activation", lambda f: f.workload(SETTING, "swiglu", 7, 33), ("liger",)),
]


@pytest.mark.parametrize("family, make, names", CALLS)
def test_peers_are_called_as_they_ask_to_be(family, make, names, installed):
    file = importlib.import_module(f"fastattn.bench.families.{family}")
    found = {c.name: error for c, error, _ in judged(make(file))}
    for name in names:
        assert found[name] <= 1, found[name]
    assert found["fastattn"] <= 1 and found["naive"] <= 1  # nobody wrote over their inputs


def test_all_peers_of_gpus_are_covered():
    assert {name.partition(".")[0] for name in FAKES} == set(peers.GPU_ONLY)


@pytest.mark.parametrize("causal", [True, False])
def test_flex_attention_is_compiled_and_given_a_mask_of_its_own(causal, monkeypatch):
    calls, real = [], flex_attention.flex_attention
    monkeypatch.setattr(attention_family.torch, "compile", lambda function, dynamic: function)

    def noted(*arguments, **options):
        calls.append(inspect.signature(real).bind(*arguments, **options).arguments)
        return arguments[0]

    monkeypatch.setattr(flex_attention, "flex_attention", noted)
    x = {name: torch.randn(1, 2, 20, 16, requires_grad=True) for name in ("query", "key", "value")}
    with pytest.raises(peers.Refusal, match="--compile asks for it"):
        attention_family.flex(x, SETTING, causal)
    attention_family.flex(x, OnGpu(torch.float32, compile=True), causal)()
    (call,) = calls
    assert call["query"] is x["query"]  # with its gradient
    mask = call["block_mask"]
    assert (
        mask is None if not causal else mask.mask_mod(0, 0, 3, 3) and not mask.mask_mod(0, 0, 3, 4)
    )


def test_a_gpu_s_sdpa_is_asked_backend_by_backend():
    found = attention_family.sdpa_backends(SETTING)
    assert found == {
        "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH,
    }  # fmt: skip
    small = attention_family.workload(SETTING, 1, 2, 20, 16, True)
    told = {c.name: error for c, error, _ in judged(small)}
    assert told["sdpa math"] <= 1 and told["sdpa flash"] <= 1
    # here as on a GPU that lacks one: a reason, and the others go on
    assert "No viable backend" in told["sdpa cudnn"] or "No available kernel" in told["sdpa cudnn"]
