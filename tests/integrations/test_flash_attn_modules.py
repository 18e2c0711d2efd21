"""flash_attn.modules: parameters by flash-attn's names, results against attention and norms written out."""

import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastattn.integrations.flash_attn.modules.block import Block, ParallelBlock
from fastattn.integrations.flash_attn.modules.mha import MHA, ParallelMHA, get_alibi_slopes
from fastattn.integrations.flash_attn.modules.mlp import (
    GatedMlp,
    Mlp,
    ParallelGatedMlp,
    ParallelMLP,
)
from fastattn.integrations.flash_attn.ops.rms_norm import RMSNorm
from fastattn.integrations.flash_attn.utils.generation import InferenceParams

from .flash import attention_ref
from .test_flash_attn import rotated

PLACE = "device=None dtype=None"
SIGNATURES = {
    MHA: "embed_dim num_heads num_heads_kv=None cross_attn=False qkv_proj_bias=True out_proj_bias=True dropout=0.0 "
    "softmax_scale=None causal=False layer_idx=None dwconv=False rotary_emb_dim=0 rotary_emb_base=10000.0 "
    "rotary_emb_scale_base=None rotary_emb_interleaved=False use_alibi=False window_size=(-1,-1) fused_bias_fc=False "
    f"use_flash_attn=False return_residual=False checkpointing=False {PLACE}",
    Block: "dim mixer_cls=None mlp_cls=None norm_cls dropout_cls prenorm=True resid_dropout1=0.0 resid_dropout2=0.0 "
    "drop_path1=0.0 drop_path2=0.0 fused_dropout_add_ln=False return_residual=False residual_in_fp32=False "
    "sequence_parallel=False mark_shared_params=False",
    Mlp: "in_features hidden_features=None out_features=None activation bias1=True bias2=True return_residual=False "
    f"{PLACE}",
    GatedMlp: "in_features hidden_features=None out_features=None activation bias1=True bias2=True multiple_of=128 "
    f"return_residual=False {PLACE}",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signature(function):
    shown = [
        p.name
        if p.default is p.empty or callable(p.default)
        else f"{p.name}={p.default}".replace(" ", "")
        for p in inspect.signature(function).parameters.values()
    ]
    assert shown == SIGNATURES[function].split()


def expected(m, x, x_kv=None, turn=None, **options):
    """MHA by its own parameters, naively."""
    if m.cross_attn:
        q, kv = (
            F.linear(x, m.Wq.weight, m.Wq.bias),
            F.linear(x if x_kv is None else x_kv, m.Wkv.weight, m.Wkv.bias),
        )
    else:
        q, kv = F.linear(x, m.Wqkv.weight, m.Wqkv.bias).split(
            [m.embed_dim, 2 * m.num_heads_kv * m.head_dim], -1
        )
    q = q.unflatten(-1, (m.num_heads, m.head_dim))
    k, v = kv.unflatten(-1, (2, m.num_heads_kv, m.head_dim)).unbind(2)
    if turn:
        q, k = turn(q), turn(k)
    return F.linear(
        attention_ref(q, k, v, **options)[0].flatten(2), m.out_proj.weight, m.out_proj.bias
    )


CASES = [
    ({}, {}),
    ({"causal": True, "use_flash_attn": True, "softmax_scale": 0.3}, {"causal": True, "softmax_scale": 0.3}),
    ({"num_heads_kv": 2, "window_size": (3, 1)}, {"window_size": (3, 1)}),
    ({"use_alibi": True, "causal": True, "fused_bias_fc": True}, {"causal": True, "alibi_slopes": torch.tensor(get_alibi_slopes(4))}),
    ({"checkpointing": True, "qkv_proj_bias": False, "out_proj_bias": False}, {}),
]  # fmt: skip


@pytest.mark.parametrize("given, options", CASES, ids=[str(g) for g, _ in CASES])
def test_mha(given, options):
    torch.manual_seed(0)
    m, x = MHA(32, 4, **given), torch.randn(2, 9, 32, requires_grad=True)
    names = {"Wqkv.weight", "Wqkv.bias", "out_proj.weight", "out_proj.bias"}
    assert set(m.state_dict()) == {
        n for n in names if given.get("qkv_proj_bias", True) or "weight" in n
    }
    out, wanted = m(x), expected(m, x, **options)
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-5)
    leaves = [x, *m.parameters()]
    for found, true in zip(
        *(torch.autograd.grad(o.square().sum(), leaves) for o in (out, wanted)), strict=True
    ):
        torch.testing.assert_close(found, true, atol=1e-5, rtol=1e-5)
    again, same = MHA(32, 4, **given, return_residual=True), x
    again.load_state_dict(m.state_dict())
    torch.testing.assert_close(again(x), (out, same))


def test_cross_attention():
    torch.manual_seed(1)
    m, x, x_kv = (
        MHA(32, 4, cross_attn=True, num_heads_kv=2),
        torch.randn(2, 5, 32),
        torch.randn(2, 9, 32),
    )
    assert set(m.state_dict()) == {
        f"{n}.{p}" for n in ("Wq", "Wkv", "out_proj") for p in ("weight", "bias")
    }
    torch.testing.assert_close(m(x, x_kv), expected(m, x, x_kv), atol=2e-6, rtol=1e-5)
    some = slice(0, 1)
    torch.testing.assert_close(
        m(x, mixer_subset=some), expected(m, x[:, some], x), atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_padded_and_packed(kv_heads):
    torch.manual_seed(2)
    m, x, lengths = MHA(32, 4, kv_heads, causal=True), torch.randn(2, 9, 32), [9, 5]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    rows, cu = torch.cat([x[0], x[1, :5]]), torch.tensor([0, 9, 14]).int()
    found = m(x, key_padding_mask=mask), m(rows, cu_seqlens=cu, max_seqlen=9)
    for b, n in enumerate(lengths):
        own = expected(m, x[b : b + 1, :n], causal=True)[0]
        torch.testing.assert_close(found[0][b, :n], own, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(found[1][cu[b] : cu[b + 1]], own, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_heads_kv": 2, "window_size": (4, 0)},
        {"use_alibi": True},
        {"rotary_emb_scale_base": 512},
    ],
    ids=str,
)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_rotary_and_generation(given, interleaved, each):
    """The next tokens against a cache give what all tokens at once give."""
    torch.manual_seed(3)
    m = MHA(
        32,
        4,
        causal=True,
        layer_idx=1,
        rotary_emb_dim=6,
        rotary_emb_interleaved=interleaved,
        **given,
    )
    x = torch.randn(2, 9, 32)
    if not given:
        angles = torch.outer(torch.arange(9), 10000.0 ** (-torch.arange(0, 6, 2) / 6))
        places = torch.arange(9).expand(2, 9)
        turn = partial(
            rotated, cos=angles.cos(), sin=angles.sin(), at=places, interleaved=interleaved
        )
        torch.testing.assert_close(
            m(x), expected(m, x, turn=turn, causal=True), atol=2e-6, rtol=1e-5
        )
    with torch.no_grad():
        p = InferenceParams(16, 2, lengths_per_sample=torch.zeros(2).int() if each else None)
        if "rotary_emb_scale_base" in given:  # xPos counts from the middle of its table
            m.rotary_emb._update_cos_sin_cache(16, x.device, x.dtype)
        whole, parts = m(x), []
        for at, n in ((0, 4), (4, 1), (5, 3), (8, 1)):
            p.seqlen_offset = at
            if each:
                p.lengths_per_sample.fill_(at)
            parts.append(m(x[:, at : at + n], inference_params=p))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-6, rtol=1e-5)
    assert p.key_value_memory_dict[1].shape == m.allocate_inference_cache(2, 16).shape


class Group:
    def __init__(self, size):
        self.size = lambda: size


ERRORS = [
    (lambda: MHA(32, 4, dwconv=True), "dwconv, a convolution after the projections, is not supported"),
    (lambda: MHA(32, 5), "embed_dim must be a multiple of num_heads"),
    (lambda: MHA(32, 4, cross_attn=True, rotary_emb_dim=4), "rotary_emb_dim has no meaning with cross_attn"),
    (lambda: MHA(32, 4)(torch.randn(1, 2, 32), torch.randn(1, 2, 32)), "x_kv and mixer_subset need cross_attn=True"),
    (lambda: MHA(32, 4)(torch.randn(1, 2, 32), inference_params=InferenceParams(4, 1)), "need layer_idx"),
    (lambda: Block(64, prenorm=False, residual_in_fp32=True), "residual_in_fp32 needs prenorm=True"),
    (lambda: Block(64, norm_cls=nn.Identity, fused_dropout_add_ln=True), "needs nn.LayerNorm or RMSNorm"),
]  # fmt: skip


@pytest.mark.parametrize("call, sentence", ERRORS, ids=[s for _, s in ERRORS])
def test_errors(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_unknown_keywords_and_more_processes_are_refused():
    x = torch.randn(1, 2, 32)
    with pytest.raises(TypeError, match="tau"):
        MHA(32, 4)(x, tau=1)
    for make in (
        lambda g: ParallelMHA(32, 4, g),
        lambda g: ParallelMLP(32, process_group=g),
        lambda g: ParallelGatedMlp(32, g),
    ):
        assert make(Group(1))(x).shape == x.shape
        with pytest.raises(RuntimeError, match="tensor parallelism is not supported"):
            make(Group(2))
    m = ParallelMHA(32, 4, Group(1))
    torch.testing.assert_close(m(torch.randn(6, 32), seqlen=3).shape, torch.Size([6, 32]))


def test_mlps():
    torch.manual_seed(4)
    x = torch.randn(3, 5, 16)
    for activation in (F.gelu, F.relu, partial(F.gelu, approximate="tanh")):
        m = Mlp(16, activation=activation, return_residual=True)
        torch.testing.assert_close(m(x), (m.fc2(activation(m.fc1(x))), x))
        assert m.fc1.out_features == 64
    for activation in (F.sigmoid, F.silu, F.gelu, F.relu):
        g = GatedMlp(16, activation=activation)
        y, gate = g.fc1(x).chunk(2, -1)
        torch.testing.assert_close(g(x), g.fc2(y * activation(gate)), atol=2e-6, rtol=1e-5)
        assert g.fc2.in_features == 128 and list(g.state_dict()) == [
            "fc1.weight",
            "fc1.bias",
            "fc2.weight",
            "fc2.bias",
        ]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm_cls", [nn.LayerNorm, RMSNorm])
def test_blocks(fused, norm_cls):
    torch.manual_seed(5)
    given = {
        "mixer_cls": partial(MHA, num_heads=4),
        "norm_cls": norm_cls,
        "fused_dropout_add_ln": fused,
    }
    x, before = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    pre = Block(32, **given, residual_in_fp32=True)
    h, residual = pre(x, before)
    first = x + before
    mixed = pre.mixer(pre.norm1(first))
    torch.testing.assert_close((h, residual), (pre.mlp(pre.norm2(mixed + first)), mixed + first))
    post = Block(32, **given, prenorm=False, drop_path1=0.5, resid_dropout1=0.5).eval()
    mid = post.norm1(post.mixer(x) + x)
    torch.testing.assert_close(post(x), post.norm2(post.mlp(mid) + mid))
    for tied in (False, True):
        side = ParallelBlock(32, **given, tied_norm=tied)
        a, b, residual = side(x, before, x)
        z = 2 * x + before
        wanted = side.mixer(side.norm1(z)), side.mlp((side.norm1 if tied else side.norm2)(z)), z
        torch.testing.assert_close((a, b, residual), wanted)
    post.train()
    rows = torch.stack([post.drop_path1(torch.ones(2, 3)) for _ in range(50)]).flatten(0, 1)
    assert set(rows.unique().tolist()) == {0.0, 2.0} and (rows == rows[:, :1]).all()
