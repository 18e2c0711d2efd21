"""The functions of flash_attn_interface against flash-attn's documentation, naively."""

import inspect

import pytest
import torch

import fastattn as fa
from fastattn.integrations import flash_attn
from fastattn.integrations.flash_attn import flash_attn_interface as interface

from .flash import attention_ref, gradients, held, leaf

TAIL = "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None deterministic=False return_attn_probs=False"
LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
WINDOW = "window_size_left window_size_right softcap alibi_slopes"
GIVEN = "dout q k v out softmax_lse dq dk dv"
# flash-attn 2.8's positional parameters -> what later versions added, by keyword alone
SIGNATURES = {
    "flash_attn_func": (f"q k v {TAIL}", "learnable_sink return_lse"),
    "flash_attn_kvpacked_func": (f"q kv {TAIL}", "learnable_sink return_lse"),
    "flash_attn_qkvpacked_func": (f"qkv {TAIL}", "learnable_sink return_lse"),
    "flash_attn_varlen_func": (
        f"q k v {LENGTHS} {TAIL} block_table=None",
        "seqused_q seqused_k page_table learnable_sink return_lse",
    ),
    "flash_attn_varlen_kvpacked_func": (f"q kv {LENGTHS} {TAIL}", "learnable_sink return_lse"),
    "flash_attn_varlen_qkvpacked_func": (
        f"qkv cu_seqlens max_seqlen {TAIL}",
        "learnable_sink return_lse",
    ),
    "flash_attn_with_kvcache": (
        "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None cache_seqlens=None "
        "cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False "
        "window_size=(-1,-1) softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 "
        "return_softmax_lse=False",
        "page_table learnable_sink",
    ),
    "_flash_attn_forward": (f"q k v dropout_p softmax_scale causal {WINDOW} return_softmax", ""),
    "_flash_attn_varlen_forward": (
        f"q k v {LENGTHS} dropout_p softmax_scale causal window_size_left=-1 window_size_right=-1 "
        "softcap=0.0 alibi_slopes=None return_softmax=False block_table=None leftpad_k=None "
        "seqused_k=None zero_tensors=False",
        "",
    ),
    "_flash_attn_backward": (
        f"{GIVEN} dropout_p softmax_scale causal {WINDOW} deterministic rng_state=None",
        "",
    ),
    "_flash_attn_varlen_backward": (
        f"{GIVEN} {LENGTHS} dropout_p softmax_scale causal {WINDOW} deterministic rng_state=None "
        "zero_tensors=False",
        "",
    ),
    "_get_block_size_n": ("device head_dim is_dropout is_causal", ""),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    positional, later = SIGNATURES[name]
    parameters = inspect.signature(getattr(interface, name)).parameters.values()
    shown = [
        p.name if p.default is p.empty else f"{p.name}={p.default}".replace(" ", "")
        for p in parameters
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert shown == positional.split()
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == later.split()
    assert len(parameters) == len(shown) + len(later.split())


def test_names():
    public = [name for name in SIGNATURES if not name.startswith("_")]
    for name in public:
        assert getattr(fa, name) is getattr(flash_attn, name) is getattr(interface, name)
    for name in ("forward", "backward", "varlen_forward", "varlen_backward"):
        assert getattr(interface, f"_wrapped_flash_attn_{name}") is getattr(
            interface, f"_flash_attn_{name}"
        )


# ---- dense --------------------------------------------------------------------------------------

SLOPES = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.05, 0.5, 0.0, 1.0]])
OPTIONS = [
    {},
    {"causal": True},
    {"causal": True, "softmax_scale": 0.3, "deterministic": True},
    {"window_size": (3, 2)},
    {"window_size": torch.tensor([4, -1])},
    {"window_size": (torch.tensor(0), None), "causal": True},
    {"window_size": (-1, 1), "softcap": 2.0},
    {"softcap": -1.0, "alibi_slopes": SLOPES[0]},
    {"alibi_slopes": SLOPES, "causal": True, "window_size": (5, 7)},
]
SIZES = [(5, 11), (11, 5), (1, 7), (9, 9)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def naive_options(options):
    """As attention_ref takes them: ints, -1 for no limit."""
    options = {k: v for k, v in options.items() if k != "deterministic"}
    sides = options.get("window_size", (-1, -1))
    return options | {"window_size": tuple(-1 if n is None else int(n) for n in sides)}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("Sq, Sk", SIZES)
def test_flash_attn_func(options, dtype, Sq, Sk):
    torch.manual_seed(0)
    inputs = (
        leaf(2, Sq, 4, 24, dtype=dtype),
        leaf(2, Sk, 2, 24, dtype=dtype),
        leaf(2, Sk, 2, 24, dtype=dtype),
    )
    out, lse = fa.flash_attn_func(*inputs, **options, return_lse=True)
    assert out.is_contiguous() and out.dtype == dtype and lse.dtype == torch.float32

    def define(*xs):
        results = attention_ref(*xs, **naive_options(options))
        return *results, *gradients(results, xs)

    held((out, lse, *gradients((out, lse), inputs)), define, inputs, dtype)
    with torch.no_grad():
        assert torch.equal(fa.flash_attn_func(*inputs, **options), out)


@pytest.mark.parametrize("options", [{}, {"causal": True, "window_size": (4, -1)}], ids=str)
def test_packed_in_one_tensor(options):
    torch.manual_seed(1)
    qkv, q, kv = leaf(2, 7, 3, 4, 8), leaf(2, 5, 4, 8), leaf(2, 7, 2, 2, 8)
    out = fa.flash_attn_qkvpacked_func(qkv, **options)
    assert torch.equal(out, fa.flash_attn_func(*qkv.unbind(2), **options))
    assert torch.equal(
        gradients([out], qkv)[0],
        gradients([fa.flash_attn_func(*qkv.unbind(2), **options)], qkv)[0],
    )
    out = fa.flash_attn_kvpacked_func(q, kv, **options)
    assert torch.equal(out, fa.flash_attn_func(q, *kv.unbind(2), **options))
    assert gradients([out], kv)[0].shape == kv.shape


def test_learnable_sink():
    torch.manual_seed(2)
    inputs = leaf(2, 5, 4, 8), leaf(2, 7, 2, 8), leaf(2, 7, 2, 8), leaf(4)
    q, k, v, sink = inputs
    out, lse = fa.flash_attn_func(q, k, v, causal=True, learnable_sink=sink, return_lse=True)

    def define(q, k, v, sink):
        results = attention_ref(q, k, v, causal=True, learnable_sink=sink)
        return *results, *gradients(results, [q, k, v, sink])

    held((out, lse, *gradients((out, lse), inputs)), define, inputs, torch.float32)


def test_float64_and_other_value_widths():
    torch.manual_seed(3)
    q, k, v = (
        leaf(1, 3, 2, 8, dtype=torch.float64),
        torch.randn(1, 5, 2, 8).double(),
        torch.randn(1, 5, 2, 12).double(),
    )
    torch.testing.assert_close(fa.flash_attn_func(q, k, v), attention_ref(q, k, v)[0])


# ---- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probs_tell_what_was_dropped(options, dtype):
    torch.manual_seed(4)
    p, inputs = (
        0.25,
        (
            leaf(2, 40, 4, 16, dtype=dtype),
            leaf(2, 64, 2, 16, dtype=dtype),
            leaf(2, 64, 2, 16, dtype=dtype),
        ),
    )
    out, lse, probs = fa.flash_attn_func(*inputs, p, **options, return_attn_probs=True)
    assert probs.shape == (2, 4, 40, 64) and probs.dtype == dtype
    kept = ~torch.signbit(probs)

    def define(*xs):
        results = attention_ref(*xs, dropout_p=p, kept=kept, **options)
        return *results, *gradients(results, xs)

    held((out, lse, *gradients((out, lse), inputs)), define, inputs, dtype)
    seen = probs != 0
    assert abs((kept & seen).sum() / seen.sum() - (1 - p)) < 0.02

    def scaled(q, k, v):  # exp(score - row's largest), from weights without dropout
        eye = torch.eye(64, dtype=q.dtype).expand(2, 2, 64, 64).transpose(1, 2)
        weights = attention_ref(q, k, eye, **options)[0].transpose(1, 2)
        return (weights / weights.amax(-1, keepdim=True),)

    held((probs.abs(),), scaled, inputs, dtype)


def test_probs_without_dropout_are_empty():
    q = torch.randn(1, 3, 2, 8)
    assert fa.flash_attn_func(q, q, q, return_attn_probs=True)[2].shape == (0,)


def test_probs_of_packed_sequences():
    torch.manual_seed(5)
    starts_q, starts_k = [0, 5, 5, 12], [0, 9, 12, 12]
    q, k, v = torch.randn(12, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    cu = torch.tensor(starts_q).int(), torch.tensor(starts_k).int()
    out, lse, probs = fa.flash_attn_varlen_func(
        q, k, v, *cu, 7, 9, 0.3, causal=True, alibi_slopes=torch.rand(3, 4), return_attn_probs=True
    )
    assert out.shape == (12, 4, 8) and lse.shape == (4, 12) and probs.shape == (3, 4, 7, 9)
    part = probs[0, :, :5, :9]
    weights = torch.where(torch.signbit(part), 0.0, part) / part.abs().sum(-1, keepdim=True) / 0.7
    expected = torch.einsum("hts,shd->thd", weights, v[:9].repeat_interleave(2, 1))
    torch.testing.assert_close(out[:5], expected, atol=1e-5, rtol=1e-5)
    assert not probs[1].any() and not probs[2].any() and not out[5:].any()


# ---- packed sequences ---------------------------------------------------------------------------


def sequences(q, k, v, starts_q, starts_k, options):
    """(out, lse) of packed sequences, one by one."""
    outs, lses = [], []
    slopes = options.get("alibi_slopes")
    for b in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        own = {} if slopes is None else {"alibi_slopes": slopes[b] if slopes.dim() == 2 else slopes}
        out, lse = attention_ref(q[None, rows], k[None, keys], v[None, keys], **(options | own))
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, -1)


VARLEN = [
    {},
    {"causal": True, "softmax_scale": 0.5},
    {"window_size": (2, 3), "softcap": 4.0},
    {"causal": True, "alibi_slopes": torch.rand(5, 4)},
]
STARTS = [0, 3, 3, 10, 11, 20], [0, 6, 10, 10, 17, 22]  # sequences of no queries, of no keys


@pytest.mark.parametrize("options", VARLEN, ids=str)
def test_varlen(options):
    torch.manual_seed(6)
    inputs = leaf(20, 4, 16), leaf(22, 2, 16), leaf(22, 2, 16)
    cu = [torch.tensor(s, dtype=torch.int32) for s in STARTS]
    out, lse = fa.flash_attn_varlen_func(*inputs, *cu, 9, 7, **options, return_lse=True)

    def define(*xs):
        results = sequences(*xs, *STARTS, options)
        return *results, *gradients(results, xs)

    held((out, lse, *gradients((out, lse), inputs)), define, inputs, torch.float32)


def test_varlen_in_one_tensor_and_lengths_as_tensors():
    torch.manual_seed(7)
    qkv, cu = torch.randn(20, 3, 4, 8), torch.tensor(STARTS[0]).int()
    most = torch.tensor(9)
    out = fa.flash_attn_varlen_qkvpacked_func(qkv, cu, most, causal=True)
    q, k, v = qkv.unbind(1)
    assert torch.equal(out, fa.flash_attn_varlen_func(q, k, v, cu, cu, most, most, causal=True))
    kv = fa.flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], cu, cu, 9, 9, causal=True)
    assert torch.equal(out, kv)


@pytest.mark.parametrize("options", VARLEN, ids=str)
def test_seqused(options):
    """Only the first rows of each sequence count; the diagonal ends where they do."""
    torch.manual_seed(8)
    inputs = leaf(20, 4, 16), leaf(22, 2, 16), leaf(22, 2, 16)
    cu = [torch.tensor(s, dtype=torch.int32) for s in STARTS]
    used_q, used_k = torch.tensor([2, 0, 7, 0, 5]), torch.tensor([5, 4, 0, 6, 1])
    out, lse = fa.flash_attn_varlen_func(
        *inputs, *cu, 9, 7, **options, seqused_q=used_q, seqused_k=used_k, return_lse=True
    )
    rows = torch.cat([torch.arange(a, a + n) for a, n in zip(STARTS[0], used_q, strict=False)])
    keys = torch.cat([torch.arange(a, a + n) for a, n in zip(STARTS[1], used_k, strict=False)])
    starts = [[0, *n.cumsum(0).tolist()] for n in (used_q, used_k)]

    def define(q, k, v):
        part, part_lse = sequences(q[rows], k[keys], v[keys], *starts, options)
        whole = torch.zeros_like(q).index_copy(0, rows, part)
        whole_lse = q.new_full((4, 20), -torch.inf).index_copy(1, rows, part_lse)
        return whole, whole_lse, *gradients((whole, whole_lse), [q, k, v])

    held((out, lse, *gradients((out, lse), inputs)), define, inputs, torch.float32)


@pytest.mark.parametrize("argument", ["block_table", "page_table"])
def test_varlen_over_pages(argument):
    torch.manual_seed(9)
    q, pages_k, pages_v = leaf(20, 4, 16), leaf(9, 3, 2, 16), leaf(9, 3, 2, 16)
    table = torch.tensor([[4, 2, 0], [1, 8, -1], [-1, -1, -1], [3, 5, 7], [6, 8, -1]]).int()
    cu = [torch.tensor(s, dtype=torch.int32) for s in STARTS]
    lengths = cu[1].diff()
    flat = torch.cat([
        table[b, torch.arange(n) // 3].long() * 3 + torch.arange(n) % 3 for b, n in enumerate(lengths)
    ])  # fmt: skip

    def define(q, pages_k, pages_v):
        k, v = (x.flatten(0, 1)[flat] for x in (pages_k, pages_v))
        results = sequences(q, k, v, *STARTS, {"causal": True})
        return *results, *gradients(results, [q, pages_k, pages_v])

    inputs = q, pages_k, pages_v
    for given in ({"cu_seqlens_k": cu[1]}, {"cu_seqlens_k": None, "seqused_k": lengths}):
        results = fa.flash_attn_varlen_func(
            *inputs, cu_seqlens_q=cu[0], max_seqlen_q=9, max_seqlen_k=7, causal=True,
            return_lse=True, **given, **{argument: table},
        )  # fmt: skip
        held((*results, *gradients(results, inputs)), define, inputs, torch.float32)


# ---- a cache ------------------------------------------------------------------------------------


def rotated(x, cos, sin, at, interleaved):
    """x (B, S, H, D), turned by the angles in the rows at (B, S) of cos and sin."""
    cos, sin = cos[at][:, :, None], sin[at][:, :, None]
    R = 2 * cos.shape[-1]
    a, b = (x[..., 0:R:2], x[..., 1:R:2]) if interleaved else x[..., :R].chunk(2, -1)
    turned = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([turned, x[..., R:]], -1)


CACHES = [
    {"causal": True},
    {"window_size": (6, 1), "softcap": 2.0},
    {"alibi_slopes": SLOPES},
]
ROTARY = [None, (8, True), (8, False), (16, True)]


@pytest.mark.parametrize("options", CACHES, ids=str)
@pytest.mark.parametrize("turn", ROTARY, ids=str)
@pytest.mark.parametrize("kind", ["dense", "batch_idx", "leftpad", "pages", "pages leftpad"])
@pytest.mark.parametrize("Sq, S_new", [(1, 1), (3, 3), (2, 4)])
def test_kvcache(options, turn, kind, Sq, S_new):
    """The cache after the call, out and lse, against a cache written by hand."""
    torch.manual_seed(10)
    B, S, lengths = 2, 24, torch.tensor([17, 5]).int()
    q, k, v = torch.randn(B, Sq, 4, 16), torch.randn(B, S_new, 2, 16), torch.randn(B, S_new, 2, 16)
    held_k, held_v = torch.randn(B, S, 2, 16), torch.randn(B, S, 2, 16)
    given = {}
    if "pages" in kind:
        table = torch.randperm(9)[:8].view(2, 4).int()
        cache = tuple(torch.randn(9, 6, 2, 16) for _ in range(2))
        for store, x in zip(cache, (held_k, held_v), strict=True):
            store[table.long()] = x.unflatten(1, (4, 6))
        given["block_table"] = table
        read = lambda store: store[table.long()].flatten(1, 2)  # noqa: E731
    else:
        rows = torch.tensor([2, 0] if kind == "batch_idx" else [0, 1])
        cache = tuple(torch.randn(3 if kind == "batch_idx" else 2, S, 2, 16) for _ in range(2))
        for store, x in zip(cache, (held_k, held_v), strict=True):
            store[rows] = x
        if kind == "batch_idx":
            given["cache_batch_idx"] = rows.int()
        read = lambda store: store[rows]  # noqa: E731
    start = None
    if "leftpad" in kind:
        start = given["cache_leftpad"] = torch.tensor([3, 5]).int()
    at = lengths[:, None].long() + torch.arange(max(Sq, S_new))
    new_q, new_k = q, k
    if turn is not None:
        R, interleaved = turn
        angles = torch.rand(30, R // 2) * 6
        tables = angles.cos(), angles.sin()
        given |= {
            "rotary_cos": tables[0],
            "rotary_sin": tables[1],
            "rotary_interleaved": interleaved,
        }
        local = options.get("causal") or "window_size" in options
        at_q = at[:, :Sq] if local else at[:, :1].expand(-1, Sq)
        new_q, new_k = (
            rotated(q, *tables, at_q, interleaved),
            rotated(k, *tables, at[:, :S_new], interleaved),
        )
    expected_k, expected_v = held_k.clone(), held_v.clone()
    for b in range(B):
        expected_k[b, at[b, :S_new]], expected_v[b, at[b, :S_new]] = new_k[b], v[b]

    out, lse = fa.flash_attn_with_kvcache(
        q,
        *cache,
        k,
        v,
        cache_seqlens=lengths,
        **given,
        **options,
        return_softmax_lse=True,
        num_splits=3,
    )
    torch.testing.assert_close(read(cache[0]), expected_k, atol=1e-6, rtol=1e-6)
    assert torch.equal(read(cache[1]), expected_v) and lengths.tolist() == [17, 5]

    def define(q, k, v):
        return attention_ref(q, k, v, **options, lengths=lengths + S_new, start=start)

    held((out, lse), define, (new_q, expected_k, expected_v), torch.float32)
    again = fa.flash_attn_with_kvcache(
        q if turn is None else new_q, *cache, cache_seqlens=lengths + S_new, **options,
        **{n: x for n, x in given.items() if not n.startswith("rotary")},
    )  # fmt: skip
    torch.testing.assert_close(again, out, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kvcache_of_views_and_ints(dtype):
    """As flash-attn's own MHA calls it: k and v are views of one cache, the length an int."""
    torch.manual_seed(11)
    cache = torch.randn(2, 12, 2, 2, 16).to(dtype)
    q, kv = torch.randn(2, 1, 4, 16).to(dtype), torch.randn(2, 1, 2, 2, 16).to(dtype)
    out = fa.flash_attn_with_kvcache(
        q, cache[:, :, 0], cache[:, :, 1], kv[:, :, 0], kv[:, :, 1], cache_seqlens=7, causal=True
    )
    assert torch.equal(cache[:, 7], kv[:, 0])
    held((out,), lambda *xs: attention_ref(*xs)[:1], (q, cache[:, :8, 0], cache[:, :8, 1]), dtype)
    whole = fa.flash_attn_with_kvcache(q, cache[:, :, 0], cache[:, :, 1])
    held((whole,), lambda *xs: attention_ref(*xs)[:1], (q, cache[:, :, 0], cache[:, :, 1]), dtype)


def test_kvcache_never_reads_beyond_the_tokens():
    q, cache = torch.randn(2, 1, 2, 8), torch.full((2, 10, 2, 8), torch.nan)
    cache[:, 2:6] = torch.randn(2, 4, 2, 8)
    length, leftpad = torch.tensor([6, 5]).int(), torch.tensor([2, 3]).int()
    out = fa.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=length, cache_leftpad=leftpad)
    assert out.isfinite().all()


# ---- private names ------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_private_backward_is_the_gradient(dropout_p):
    torch.manual_seed(12)
    q, k, v, dout = (
        leaf(2, 9, 4, 16),
        leaf(2, 13, 2, 16),
        leaf(2, 13, 2, 16),
        torch.randn(2, 9, 4, 16),
    )
    tail = (0.25, True, 5, -1, 0.0, SLOPES)
    out, lse, probs, state = interface._flash_attn_forward(q, k, v, dropout_p, *tail, True)
    assert not out.requires_grad and state.shape == (2,)
    filled = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    delta = interface._flash_attn_backward(
        dout, q, k, v, out, lse, *filled, dropout_p, *tail, False, rng_state=state
    )
    torch.testing.assert_close(delta, (dout * out).sum(-1).transpose(1, 2))
    kept = ~torch.signbit(probs) if dropout_p else None
    options = {
        "softmax_scale": 0.25,
        "causal": True,
        "window_size": (5, -1),
        "alibi_slopes": SLOPES,
    }

    def define(*xs):
        whole = attention_ref(*xs, **options, dropout_p=dropout_p, kept=kept)[0]
        return torch.autograd.grad(whole, xs, dout.to(whole.dtype))

    held(filled, define, (q, k, v), torch.float32)


def test_private_backward_of_a_part_of_the_keys():
    """Ring attention: out and lse are those of all keys, the gradients are of a part."""
    torch.manual_seed(13)
    q, k, v, dout = (
        torch.randn(2, 6, 4, 8),
        torch.randn(2, 10, 2, 8),
        torch.randn(2, 10, 2, 8),
        torch.randn(2, 6, 4, 8),
    )
    tail = (0.0, 8**-0.5, False, -1, -1, 0.0, None)
    out, lse, _, _ = interface._flash_attn_forward(q, k, v, *tail, False)
    whole = [torch.zeros_like(x) for x in (q, k, v)]
    interface._flash_attn_backward(dout, q, k, v, out, lse, *whole, *tail, False)
    dq = torch.zeros_like(q)
    for keys in (slice(0, 3), slice(3, 10)):
        part = torch.zeros_like(q), torch.zeros_like(k[:, keys]), torch.zeros_like(v[:, keys])
        interface._flash_attn_backward(
            dout, q, k[:, keys], v[:, keys], out, lse, *part, *tail, False
        )
        torch.testing.assert_close(part[1], whole[1][:, keys], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(part[2], whole[2][:, keys], atol=1e-5, rtol=1e-5)
        dq += part[0]
    torch.testing.assert_close(dq, whole[0], atol=1e-5, rtol=1e-5)


def test_private_varlen():
    torch.manual_seed(14)
    inputs = leaf(20, 4, 16), leaf(22, 2, 16), leaf(22, 2, 16)
    cu, dout = [torch.tensor(s, dtype=torch.int32) for s in STARTS], torch.randn(20, 4, 16)
    out, lse, probs, state = interface._flash_attn_varlen_forward(
        *inputs, *cu, 9, 7, 0.0, 0.25, True
    )
    assert probs.numel() == 0
    filled = [torch.full_like(x, torch.nan) for x in inputs]
    interface._flash_attn_varlen_backward(
        dout,
        *inputs,
        out,
        lse,
        *filled,
        *cu,
        9,
        7,
        0.0,
        0.25,
        True,
        -1,
        -1,
        0.0,
        None,
        False,
        state,
    )

    def define(*xs):
        whole, lse = sequences(*xs, *STARTS, {"softmax_scale": 0.25, "causal": True})
        return whole, lse, *torch.autograd.grad(whole, xs, dout.to(whole.dtype))

    held((out, lse, *filled), define, inputs, torch.float32)
    leftpad = torch.tensor([1, 0, 0, 2, 0])
    padded = interface._flash_attn_varlen_forward(
        *inputs, *cu, 9, 7, 0.0, 0.25, True, leftpad_k=leftpad
    )[0]
    keys = torch.cat(
        [torch.arange(a + n, b) for a, b, n in zip(STARTS[1], STARTS[1][1:], leftpad, strict=False)]
    )
    starts_k = [0, *(cu[1].diff() - leftpad).cumsum(0).tolist()]
    q, k, v = inputs
    expected = sequences(
        q, k[keys], v[keys], STARTS[0], starts_k, {"softmax_scale": 0.25, "causal": True}
    )[0]
    torch.testing.assert_close(padded, expected.detach(), atol=1e-5, rtol=1e-5)


# ---- errors, and what torch does with functions ---------------------------------------------------

Q, K = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8)
CU = torch.tensor([0, 4, 10]).int()
P = torch.randn(10, 2, 8)
ERRORS = [
    (lambda: fa.flash_attn_func(Q, K, K[:, :5]), r"flash_attn_func: k and v disagree on Sk: k \(2, 7, 2, 8\)"),
    (lambda: fa.flash_attn_func(Q[:, :, :3], K, K), r"q's heads must be a multiple of k's, got 3 and 2"),
    (lambda: fa.flash_attn_func(Q[0], K, K), r"q must be \(B, S, H, D\)"),
    (lambda: fa.flash_attn_func(Q, K, K, window_size=3), r"window_size must be \(left, right\)"),
    (lambda: fa.flash_attn_func(Q, K, K, 1.5), r"flash_attn_func: dropout_p must be in \[0, 1\], got 1.5"),
    (lambda: fa.flash_attn_func(Q, K, K, alibi_slopes=torch.ones(3)), r"alibi_slopes must be \(Hq,\)"),
    (lambda: fa.flash_attn_qkvpacked_func(torch.randn(2, 5, 2, 4, 8)), r"qkv must be \(B, S, 3, H, D\)"),
    (lambda: fa.flash_attn_varlen_func(P, P, P, CU, CU + 1, 6, 6), "cu_seqlens_k must start at 0"),
    (
        lambda: fa.flash_attn_varlen_func(P, P, P, CU, CU, 6, 6, seqused_k=torch.tensor([5, 1])),
        r"seqused_k must be in \[0, the sequence's length\], got \[5, 1\] for lengths \[4, 6\]",
    ),
    (lambda: fa.flash_attn_varlen_func(P, P, P, CU, None, 6, 6), "cu_seqlens_k may be None only with a block_table"),
    (
        lambda: fa.flash_attn_varlen_func(P, P, P, CU, CU, 6, 6, block_table=CU, page_table=CU),
        "two names of one argument",
    ),
    (
        lambda: fa.flash_attn_with_kvcache(Q, K, K, K[:, :2].repeat(1, 1, 1, 1), K[:, :2], cache_seqlens=6),
        r"\(or its block_table\) has room for 7 tokens a sequence, cache_seqlens are \[6, 6\] and 2 more",
    ),
    (
        lambda: fa.flash_attn_with_kvcache(Q, K, K, block_table=torch.tensor([[0], [2]]), cache_seqlens=3),
        r"block_table must name pages in \[0, 2\), got 2",
    ),
    (lambda: fa.flash_attn_with_kvcache(Q, K, K, K, K), "k and v need cache_seqlens"),
    (lambda: fa.flash_attn_with_kvcache(Q, K, K, K), "k and v are given both or neither, got only k"),
    (
        lambda: fa.flash_attn_with_kvcache(Q, K, K, rotary_cos=Q[0, :, 0], rotary_sin=Q[0, :, 0]),
        "rotary_cos and rotary_sin turn new tokens: give k and v",
    ),
    (
        lambda: interface._flash_attn_backward(
            Q, Q, Q, Q, Q, Q[..., 0], None, None, None, 0.5, 1.0, False, -1, -1, 0.0, None, False
        ),
        "with dropout_p > 0 the backward needs the forward's rng_state",
    ),
]  # fmt: skip


@pytest.mark.parametrize("call, sentence", ERRORS, ids=[s for _, s in ERRORS])
def test_errors(call, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        call()


def test_a_full_cache_is_left_as_it_was():
    cache = torch.randn(2, 8, 2, 8)
    before, new = cache.clone(), torch.randn(2, 2, 2, 8)
    with pytest.raises(RuntimeError, match="block_table"):
        fa.flash_attn_with_kvcache(Q, cache, cache, new, new, cache_seqlens=torch.tensor([2, 7]))
    assert torch.equal(cache, before)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "window_size": (3, -1), "return_lse": True}], ids=str
)
def test_compiles(options):
    torch.manual_seed(15)
    q, k = leaf(2, 5, 4, 8), leaf(2, 7, 2, 8)
    compiled = torch.compile(fa.flash_attn_func, fullgraph=True, backend="aot_eager")
    found, expected = (f(q, k, k, **options) for f in (compiled, fa.flash_attn_func))
    torch.testing.assert_close(found, expected)
    packed = torch.compile(fa.flash_attn_varlen_func, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        packed(P, P, P, CU, CU, 6, 6, **options),
        fa.flash_attn_varlen_func(P, P, P, CU, CU, 6, 6, **options),
    )


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert fa.flash_attn_func(Q, K, K).dtype == torch.bfloat16
