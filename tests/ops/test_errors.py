"""Every wrong call raises one sentence: operator, argument, rule, values. The text is the promise."""

import pytest
import torch

import fastattn as fa

Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8)
PACKED = torch.zeros(9, 4, 8)
CU = torch.tensor([0, 4, 9])
X = torch.zeros(3, 6)

ATTENTION = [
    (dict(query=[1]), TypeError, "attention: query must be a tensor, got list"),
    (dict(query=Q.int()), TypeError,
     "attention: query must be float64, float32, float16 or bfloat16, got int32"),
    (dict(value=K.half()), TypeError,
     "attention: query, key, value must have one dtype, got query float32, key float32, value float16"),
    (dict(query=Q[0]), ValueError, "attention: query must be (B, H, S, D), got query (4, 5, 8)"),
    (dict(key=K[:1]), ValueError,
     "attention: query, key and value disagree on B: query (2, 4, 5, 8), key (1, 2, 7, 8), value (2, 2, 7, 8)"),
    (dict(key=K[..., :4]), ValueError,
     "attention: query and key disagree on D: query (2, 4, 5, 8), key (2, 2, 7, 4)"),
    (dict(value=K[:, :, :6]), ValueError,
     "attention: key and value disagree on Sk: key (2, 2, 7, 8), value (2, 2, 6, 8)"),
    (dict(value=K[:, :1]), ValueError,
     "attention: key and value disagree on Hkv: key (2, 2, 7, 8), value (2, 1, 7, 8)"),
    (dict(query=Q[:, :3]), ValueError,
     "attention: the heads of query must be a multiple of the heads of key, got 3 and 2: "
     "query (2, 3, 5, 8), key (2, 2, 7, 8)"),
    (dict(key=K.to("meta")), ValueError,
     "attention: all tensors must be on one device, got query on cpu, key on meta, value on cpu"),
    (dict(scale=float("nan")), ValueError, "attention: scale must be finite, got nan"),
    (dict(scale="1"), TypeError, "attention: scale must be a number, got str"),
    (dict(dropout_p=-0.1), ValueError, "attention: dropout_p must be in [0, 1], got -0.1"),
    (dict(dropout_p=1.5), ValueError, "attention: dropout_p must be in [0, 1], got 1.5"),
    (dict(softcap=-1.0), ValueError, "attention: softcap must be finite and at least 0, got -1.0"),
    (dict(window=3), ValueError,
     "attention: window must be None or (left, right), each None (unlimited) or an int of at least 0, got 3"),
    (dict(window=(-1, 0)), ValueError,
     "attention: window must be None or (left, right), each None (unlimited) or an int of at least 0, "
     "got (-1, 0)"),
    (dict(mask=torch.zeros(5, 7)), TypeError,
     "attention: mask must be bool (True may attend), got float32; a float to be added is a bias"),
    (dict(mask=torch.ones(5, 6, dtype=torch.bool)), ValueError,
     "attention: mask must broadcast to (B, Hq, Sq, Sk) = (2, 4, 5, 7), got mask (5, 6)"),
    (dict(bias=torch.zeros(3, 1, 5, 7)), ValueError,
     "attention: bias must broadcast to (B, Hq, Sq, Sk) = (2, 4, 5, 7), got bias (3, 1, 5, 7)"),
    (dict(bias=torch.zeros(5, 7).int()), TypeError,
     "attention: bias must be float64, float32, float16 or bfloat16, got int32"),
    (dict(key_lengths=torch.zeros(2)), TypeError,
     "attention: key_lengths must be int32 or int64, got float32"),
    (dict(key_lengths=torch.zeros(3).int()), ValueError,
     "attention: key_lengths must be (B,) = (2,), got key_lengths (3,)"),
    (dict(alibi_slopes=torch.zeros(3)), ValueError,
     "attention: alibi_slopes must be (Hq,) or (B, Hq) = (4,) or (2, 4), got alibi_slopes (3,)"),
    (dict(sinks=torch.zeros(2)), ValueError, "attention: sinks must be (Hq,) = (4,), got sinks (2,)"),
    (dict(backend="fast"), ValueError,
     "attention: backend must be one of reference, cpu, triton, cuda, got 'fast'"),
    (dict(backend=""), ValueError, "attention: backend must be one of reference, cpu, triton, cuda, got ''"),
    (dict(causl=True), TypeError, "attention() got an unexpected keyword argument 'causl'"),
    (dict(causal="no"), TypeError, "attention: causal must be True or False, got 'no'"),
    (dict(return_lse=1), TypeError, "attention: return_lse must be True or False, got 1"),
    (dict(window=(True, False)), ValueError,
     "attention: window must be None or (left, right), each None (unlimited) or an int of at least 0, "
     "got (True, False)"),
    (dict(window=torch.zeros(5, 5)), ValueError,
     "attention: window must be None or (left, right), each None (unlimited) or an int of at least 0, "
     "got a tensor (5, 5)"),
    (dict(window=list(range(99))), ValueError, "at least 0, got [0, 1, 2, 3, 4, 5, ...]"),
    (dict(alibi_slopes=[1]), TypeError, "attention: alibi_slopes must be a tensor, got list"),
    (dict(sinks=[1]), TypeError, "attention: sinks must be a tensor, got list"),
    (dict(key_lengths=[1, 2]), TypeError, "attention: key_lengths must be a tensor, got list"),
    (dict(key=K.to_sparse()), TypeError, "attention: key must be a dense tensor, got a sparse_coo one"),
    (dict(generator=3), TypeError, "attention: generator must be a torch.Generator or None, got int"),
]  # fmt: skip


@pytest.mark.parametrize(
    "wrong, kind, sentence", ATTENTION, ids=lambda x: x if isinstance(x, str) else ""
)
def test_attention(wrong, kind, sentence):
    with pytest.raises(kind) as raised:
        fa.attention(**{"query": Q, "key": K, "value": K, **wrong})
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("lengths, sentence", [
    ([3, 8], "attention: key_lengths must be in [0, 7], entry 1 is 8"),
    ([-1, 2], "attention: key_lengths must be in [0, 7], entry 0 is -1"),
    ([2**32 + 1, 2], "attention: key_lengths must be in [0, 7], entry 0 is 2147483647"),
    ([2, -(2**32) + 1], "attention: key_lengths must be in [0, 7], entry 1 is -2147483648"),
])  # fmt: skip
def test_key_lengths_out_of_range(backend, lengths, sentence):
    with pytest.raises(ValueError) as raised:
        fa.attention(Q, K, K, key_lengths=torch.tensor(lengths), backend=backend)
    assert str(raised.value) == sentence


VARLEN = [
    (dict(query=PACKED[None]), "attention_varlen: query must be packed (total, H, D), got query (1, 9, 4, 8)"),
    (dict(cu_seqlens_q=CU.float()), "attention_varlen: cu_seqlens_q must be int32 or int64, got float32"),
    (dict(cu_seqlens_q=CU[None]), "attention_varlen: cu_seqlens_q must be (B + 1,), got cu_seqlens_q (1, 3)"),
    (dict(cu_seqlens_q=CU[:0]), "attention_varlen: cu_seqlens_q must have B + 1 entries, the first 0, got none"),
    (dict(cu_seqlens_k=CU[:2]),
     "attention_varlen: cu_seqlens_q and cu_seqlens_k disagree on B + 1: cu_seqlens_q (3,), cu_seqlens_k (2,)"),
    (dict(cu_seqlens_q=torch.tensor([0, 5, 3])),
     "attention_varlen: cu_seqlens_q must start at 0 and not decrease: entry 2 is 3 after 5"),
    (dict(cu_seqlens_k=torch.tensor([1, 4, 9])),
     "attention_varlen: cu_seqlens_k must start at 0 and not decrease: entry 0 is 1 after 0"),
    (dict(cu_seqlens_q=torch.tensor([0, 4, 8])),
     "attention_varlen: cu_seqlens_q must end at the packed total 9, got 8"),
    (dict(cu_seqlens_q=torch.tensor([0, 2**32 + 4, 9])),
     "attention_varlen: cu_seqlens_q must start at 0 and not decrease: entry 2 is 9 after 2147483647"),
    (dict(cu_seqlens_q=None), "attention_varlen: cu_seqlens_q must be a tensor, got NoneType"),
    (dict(max_seqlen_q="x"), "attention_varlen: max_seqlen_q must be an int, got 'x'"),
    (dict(max_seqlen_k=-5), "attention_varlen: max_seqlen_k must be an int of at least 0, got -5"),
    (dict(key=PACKED[:, :3]), "attention_varlen: key and value disagree on Hkv: key (9, 3, 8), value (9, 4, 8)"),
    (dict(scale="1"), "attention_varlen: scale must be a number, got str"),
    (dict(mask=torch.ones(1, dtype=torch.bool)),
     "attention_varlen: mask is not defined for packed sequences; cut or pad them, or use attention"),
]  # fmt: skip


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("wrong, sentence", VARLEN, ids=lambda x: x if isinstance(x, str) else "")
def test_attention_varlen(wrong, sentence, backend):
    call = {"query": PACKED, "key": PACKED, "value": PACKED, "cu_seqlens_q": CU, "cu_seqlens_k": CU}
    with pytest.raises((ValueError, TypeError)) as raised:
        fa.attention_varlen(**{**call, **wrong}, backend=backend)
    assert str(raised.value) == sentence


OTHERS = [
    (lambda: fa.softmax(X, dim=2), "softmax: dim must be a dimension of x (3, 6), got 2"),
    (lambda: fa.softmax(X, mask=X), "softmax: mask must be bool (True keeps), got float32"),
    (lambda: fa.softmax(X, mask=X[:, :5].bool()), "softmax: mask must broadcast to x = (3, 6), got mask (3, 5)"),
    (lambda: fa.softmax(X, dim=0, causal=True),
     "softmax: causal needs rows and columns and dim=-1, got x (3, 6), dim=0"),
    (lambda: fa.softmax(X, scale=float("inf")), "softmax: scale must be finite, got inf"),
    (lambda: fa.layer_norm(X, X[0, :5]), "layer_norm: weight must be (C,) = (6,), got weight (5,)"),
    (lambda: fa.layer_norm(X, residual=X[:2]),
     "layer_norm: residual must be x's shape = (3, 6), got residual (2, 6)"),
    (lambda: fa.layer_norm(X, eps=-1.0), "layer_norm: eps must be finite and at least 0, got -1.0"),
    (lambda: fa.rms_norm(X, dropout_p=2), "rms_norm: dropout_p must be in [0, 1], got 2"),
    (lambda: fa.rms_norm(X[0, 0]), "rms_norm: x must be (..., C), got x ()"),
    (lambda: fa.cross_entropy(X, torch.zeros(3)),
     "cross_entropy: target must be int64 class indices, got float32"),
    (lambda: fa.cross_entropy(X, torch.zeros(2).long()),
     "cross_entropy: target must be one class for each row = (3,), got target (2,)"),
    (lambda: fa.cross_entropy(X, torch.tensor([0, 6, 1])),
     "cross_entropy: target 6 at row 1 is outside [0, 6) and is not ignore_index -100"),
    (lambda: fa.cross_entropy(X, torch.tensor([0, -1, 1]), backend="reference"),
     "cross_entropy: target -1 at row 1 is outside [0, 6) and is not ignore_index -100"),
    (lambda: fa.cross_entropy(X, torch.zeros(3).long(), reduction="avg"),
     "cross_entropy: reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    (lambda: fa.gelu(X, approximate="erf"), "gelu: approximate must be one of 'none', 'tanh', got 'erf'"),
    (lambda: fa.gelu(X, bias=X[0, :2]), "gelu: bias must be (C,) = (6,), got bias (2,)"),
    (lambda: fa.swiglu(X, X[:2]), "swiglu: up must be gate's shape = (3, 6), got up (2, 6)"),
    (lambda: fa.rotary(Q, X, X[:2]), "rotary: sin must be cos's shape = (3, 6), got sin (2, 6)"),
    (lambda: fa.rotary(Q, X, X), "rotary: cos has more than D / 2 columns: cos (3, 6), x (2, 4, 5, 8)"),
    (lambda: fa.rotary(Q, X[:, :4], X[:, :4]), "rotary: cos has fewer rows than S: cos (3, 4), x (2, 4, 5, 8)"),
    (lambda: fa.rotary(Q, X[:, :4], X[:, :4], positions=torch.tensor([0, 1, 2, 3, 0])),
     "rotary: positions must be in [0, 3), the rows of cos; got 3"),
    (lambda: fa.scaled_dot_product_attention(Q, K, K),
     "scaled_dot_product_attention: leading dimensions must broadcast, got query (2, 4, 5, 8), "
     "key (2, 2, 7, 8), value (2, 2, 7, 8); grouped queries need enable_gqa=True"),
    *((lambda x=x: fa.scaled_dot_product_attention(x, Q, Q),
       f"scaled_dot_product_attention: query must be a tensor, got {type(x).__name__}")
      for x in (None, [1.0], Q.numpy())),
    (lambda: fa.scaled_dot_product_attention(Q, Q, Q, torch.ones(5, 4)),
     "scaled_dot_product_attention: attn_mask must broadcast to (..., L, S) = (2, 4, 5, 5), got attn_mask (5, 4)"),
    (lambda: fa.scaled_dot_product_attention(Q, Q, Q, torch.ones(5, 5).int()),
     "scaled_dot_product_attention: attn_mask must be bool or float64, float32, float16 or bfloat16, got int32"),
    (lambda: fa.scaled_dot_product_attention(Q, Q, Q, [1]),
     "scaled_dot_product_attention: attn_mask must be a tensor, got list"),
    (lambda: fa.scaled_dot_product_attention(Q, Q[..., :3], Q),
     "scaled_dot_product_attention: query and key disagree on D: query (2, 4, 5, 8), key (2, 4, 5, 3)"),
    (lambda: fa.scaled_dot_product_attention(Q, Q, Q, is_causal=1),
     "scaled_dot_product_attention: is_causal must be True or False, got 1"),
    (lambda: fa.scaled_dot_product_attention(Q, Q, Q, enable_gqa="yes"),
     "scaled_dot_product_attention: enable_gqa must be True or False, got 'yes'"),
    (lambda: fa.scaled_dot_product_attention(Q[0, 0, 0], Q, Q),
     "scaled_dot_product_attention: query must be (..., L, E), got query (8,)"),
    (lambda: fa.softmax(torch.tensor(1.0), backend="bogus"),
     "softmax: backend must be one of reference, cpu, triton, cuda, got 'bogus'"),
    (lambda: fa.softmax(X[:0], backend="bogus"),
     "softmax: backend must be one of reference, cpu, triton, cuda, got 'bogus'"),
    (lambda: fa.softmax(X, dim=None), "softmax: dim must be an int, got None"),
    (lambda: fa.softmax(X, causal=None), "softmax: causal must be True or False, got None"),
    (lambda: fa.softmax(X.to_sparse()), "softmax: x must be a dense tensor, got a sparse_coo one"),
    (lambda: fa.softmax(torch.nested.nested_tensor([X[0], X[1, :2]], layout=torch.jagged)),
     "softmax: x must be a dense tensor, got a nested one"),
    (lambda: fa.layer_norm(X, return_residual=None),
     "layer_norm: return_residual must be True or False, got None"),
    (lambda: fa.layer_norm(X, generator=3),
     "layer_norm: generator must be a torch.Generator or None, got int"),
    (lambda: fa.layer_norm(X.double(), backend="cuda"),
     "layer_norm: backend 'cuda' cannot take this call on cpu. cuda: cuda computes bfloat16, float16, float32, not float64"),
    (lambda: fa.rms_norm([1.0], eps=None), "rms_norm: x must be a tensor, got list"),
    (lambda: fa.rms_norm(X.int(), eps=None),
     "rms_norm: x must be float64, float32, float16 or bfloat16, got int32"),
    (lambda: fa.cross_entropy(X, torch.zeros(3).long(), ignore_index=1.7),
     "cross_entropy: ignore_index must be an int, got 1.7"),
    (lambda: fa.cross_entropy(X, torch.zeros(3).long(), ignore_index=None),
     "cross_entropy: ignore_index must be an int, got None"),
    (lambda: fa.cross_entropy(X, torch.zeros(3).long(), ignore_index=2**70),
     f"cross_entropy: ignore_index must be an int of at most {2**63 - 1}, got {2**70}"),
    (lambda: fa.cross_entropy(X, torch.zeros(3).long(), inplace_backward="no"),
     "cross_entropy: inplace_backward must be True or False, got 'no'"),
    (lambda: fa.cross_entropy(X, torch.zeros(3).long(), reduction=X),
     "cross_entropy: reduction must be one of 'mean', 'sum', 'none', got a tensor (3, 6)"),
    (lambda: fa.cross_entropy(X[:, :0], torch.zeros(3).long()),
     "cross_entropy: target 0 at row 0 is outside [0, 0) and is not ignore_index -100"),
    *((lambda b=b: fa.linear_cross_entropy(X, X, torch.tensor([0, 3, 1]), backend=b),
       "linear_cross_entropy: target 3 at row 1 is outside [0, 3) and is not ignore_index -100")
      for b in ("cpu", "reference")),
    (lambda: fa.linear_cross_entropy(X, X, torch.zeros(3).long(), bias=[1.0]),
     "linear_cross_entropy: bias must be a tensor, got list"),
    (lambda: fa.gelu(X, bias=[1.0]), "gelu: bias must be a tensor, got list"),
    (lambda: fa.swiglu(X.double(), X.double(), backend="cuda"),
     "swiglu: backend 'cuda' cannot take this call on cpu. cuda: cuda computes bfloat16, float16, float32, not float64"),
    (lambda: fa.rotary(Q, X, X, interleaved="no"), "rotary: interleaved must be True or False, got 'no'"),
    (lambda: fa.rotary(Q, X, X, positions=[1]), "rotary: positions must be a tensor, got list"),
    (lambda: fa.merge(None, [Q]), "merge: outs must be a sequence of tensors, got None"),
    (lambda: fa.merge([Q.int()], [Q[..., 0]]),
     "merge: outs[0] must be float64, float32, float16 or bfloat16, got int32"),
    (lambda: fa.merge([Q, Q.half()], [Q[..., 0]] * 2),
     "merge: outs[0], outs[1] must have one dtype, got outs[0] float32, outs[1] float16"),
    (lambda: fa.merge([Q], [Q[..., 0].to("meta")]),
     "merge: all tensors must be on one device, got outs on cpu, lses on meta"),
    (lambda: fa.merge([Q], [1.0]), "merge: lses[0] must be a tensor, got float"),
    (lambda: fa.explain(Q, K, K, bogus=1), "explain() got an unexpected keyword argument 'bogus'"),
    (lambda: fa.explain(Q, K, K, backend="bogus"),
     "explain: backend must be one of reference, cpu, triton, cuda, got 'bogus'"),
    (lambda: fa.explain(Q, K, K, cu_seqlens_q=CU, cu_seqlens_k=CU),
     "explain: query must be packed (total, H, D), got query (2, 4, 5, 8)"),
    (lambda: fa.explain(Q, K, K, packed=True), "explain() got an unexpected keyword argument 'packed'"),
    (lambda: fa.use_backend("bogus").__enter__(),
     "use_backend: backend must be one of reference, cpu, triton, cuda, got 'bogus'"),
]  # fmt: skip


@pytest.mark.parametrize("call, sentence", OTHERS, ids=[s for _, s in OTHERS])
def test_other_operators(call, sentence):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
        call()
    assert str(raised.value) == sentence


CACHE = [
    (lambda c: fa.KVCache(2, 1, 8, max_length=4, page_size=0),
     "KVCache: page_size must be an int of at least 1, got 0"),
    (lambda c: fa.KVCache(2, 1, 8, max_length=4, value_head_dim=-1),
     "KVCache: value_head_dim must be an int of at least 1, got -1"),
    (lambda c: fa.KVCache(True, 1, 8, max_length=4), "KVCache: batch must be an int, got True"),
    (lambda c: fa.KVCache(2, 1, 8, max_length=4, dtype="bfloat16"),
     "KVCache: dtype must be float64, float32, float16 or bfloat16, got 'bfloat16'"),
    (lambda c: c.append([1], [2]), "KVCache.append: key must be a tensor, got list"),
    (lambda c: c.append(NEW, NEW, new_lengths=5), "KVCache.append: new_lengths must be ints, (B,), got 5"),
    (lambda c: c.append(NEW, NEW, new_lengths=[1, 0.5]),
     "KVCache.append: new_lengths must be ints, (B,), got [1, 0.5]"),
    (lambda c: c.append(NEW, NEW, rotary=5),
     "KVCache.append: rotary must be (cos, sin) or (cos, sin, interleaved), got 5"),
    (lambda c: c.append(NEW, NEW, rotary=(X[:2, :4], X[:2, :4])),
     "KVCache.append: cos has 2 rows and the new tokens reach position 2"),
    (lambda c: c.append(NEW, NEW, rotary=(1, 2)), "KVCache.append: cos must be a tensor, got int"),
    (lambda c: c.trim(None), "KVCache.trim: lengths must be ints, (B,), got None"),
    (lambda c: c.fork(1), "KVCache.fork: indices must be ints, (B,), got 1"),
    (lambda c: fa.attention_decode(Q, None), "attention_decode: cache must be a KVCache, got NoneType"),
    (lambda c: fa.attention_decode(Q[..., :4], c),
     "attention_decode: query and key disagree on D: query (2, 4, 5, 4), key (2, 1, 4, 8)"),
    (lambda c: fa.attention_decode(Q, c, causal="no"),
     "attention_decode: causal must be True or False, got 'no'"),
]  # fmt: skip
NEW = torch.zeros(2, 1, 3, 8)


@pytest.mark.parametrize("call, sentence", CACHE, ids=[s for _, s in CACHE])
def test_cache(call, sentence):
    with pytest.raises((ValueError, TypeError)) as raised:
        call(fa.KVCache(2, 1, 8, max_length=4))
    assert str(raised.value) == sentence


def test_a_window_wider_than_any_length_is_none():
    out = fa.attention(Q, K, K, window=(2**70, 2**31), causal=True)
    assert torch.equal(out, fa.attention(Q, K, K, causal=True))


def test_what_torch_raises_in_sdpa_is_raised():
    for call in (fa, torch.nn.functional):
        with pytest.raises(RuntimeError):
            call.scaled_dot_product_attention(Q, Q[..., :3], Q)
        with pytest.raises(TypeError):
            call.scaled_dot_product_attention(None, Q, Q)
