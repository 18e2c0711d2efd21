"""KVCache and attention_decode against attention over what was appended; merge against the whole."""

import copy
import gc
import pickle

import pytest
import torch

import fastattn as fa

B, HQ, HKV, D, DV = 3, 4, 2, 8, 6


class Mirror:
    """A cache beside plain lists of what each of its sequences should hold."""

    def __init__(self, cache, keys=None, values=None):
        self.cache = cache
        self.keys = keys or [[] for _ in range(B)]
        self.values = values or [[] for _ in range(B)]

    def append(self, S, counts=None, rotary=None):
        key, value = torch.randn(B, HKV, S, D), torch.randn(B, HKV, S, DV)
        starts = [len(k) for k in self.keys]
        self.cache.append(key, value, rotary, new_lengths=counts)
        for b, n in enumerate(counts or [S] * B):
            row = key[b : b + 1]
            if rotary:
                row = fa.rotary(
                    row, *rotary, positions=starts[b] + torch.arange(S), backend="reference"
                )
            self.keys[b] += list(row[0, :, :n].transpose(0, 1))
            self.values[b] += list(value[b, :, :n].transpose(0, 1))

    def fork(self, rows):
        pick = lambda lists: [list(lists[i]) for i in rows]  # noqa: E731
        return Mirror(self.cache.fork(rows), pick(self.keys), pick(self.values))

    def trim(self, lengths):
        self.cache.trim(lengths)
        for held in (self.keys, self.values):
            held[:] = [x[:n] for x, n in zip(held, lengths, strict=True)]

    def check(self, Sq=2, **options):
        assert self.cache.lengths.tolist() == [len(k) for k in self.keys]
        query = torch.randn(B, HQ, Sq, D)
        out, lse = fa.attention_decode(query, self.cache, return_lse=True, **options)
        for b in range(B):
            key, value = (torch.stack(x[b], 1)[None].double() for x in (self.keys, self.values))
            truth = fa.attention(
                query[b : b + 1].double(), key, value, causal=True, return_lse=True, **options
            )
            for found, wanted in zip((out, lse), truth, strict=True):
                torch.testing.assert_close(found[b : b + 1].double(), wanted, atol=2e-6, rtol=2e-6)


paged = pytest.mark.parametrize("page_size", [None, 1, 3, 16])


@paged
@pytest.mark.parametrize(
    "options", [{}, {"window": (3, None), "softcap": 5.0}, {"sinks": torch.zeros(HQ)}], ids=str
)
def test_append_decode_fork_trim(page_size, options):
    torch.manual_seed(0)
    one = Mirror(fa.KVCache(B, HKV, D, max_length=20, page_size=page_size, value_head_dim=DV))
    one.append(5)
    one.check(**options)
    one.append(4, [4, 1, 2])  # right-padded rows
    one.check(**options)
    two = one.fork([2, 0, 0])
    two.append(3)
    one.append(1)
    one.check(1, **options)
    two.check(**options)
    one.trim([3, 2, 6])
    one.append(7)
    one.check(**options)
    two.check(3, **options)


@paged
def test_append_turns_keys_at_their_own_positions(page_size):
    cache = Mirror(fa.KVCache(B, HKV, D, max_length=12, page_size=page_size, value_head_dim=DV))
    angles = torch.outer(torch.arange(12.0), torch.tensor([1.0, 0.1, 0.01, 0.001]))
    rotary = (angles.cos(), angles.sin())
    cache.append(4, [4, 1, 2], rotary=rotary)
    cache.append(3, rotary=rotary)
    cache.check()


@paged
def test_append_needs_angles_for_the_tokens_that_count(page_size):
    cache = fa.KVCache(2, 1, 4, max_length=9, page_size=page_size)
    new, angles = torch.ones(2, 1, 3, 4), torch.ones(5, 2)
    cache.append(new, new, (angles, angles))
    cache.append(new, new, (angles, angles), new_lengths=[2, 0])
    with pytest.raises(ValueError, match="cos has 5 rows and the new tokens reach position 5"):
        cache.append(new, new, (angles, angles), new_lengths=[1, 0])
    assert cache.lengths.tolist() == [5, 3]


@paged
def test_full_cache_raises_and_changes_nothing(page_size):
    cache = fa.KVCache(2, 1, 4, max_length=5, page_size=page_size)
    new = torch.ones(2, 1, 3, 4)
    cache.append(new, new, new_lengths=[3, 1])
    with pytest.raises(
        ValueError, match="sequence 0 holds 3 of max_length 5 tokens and cannot take 3 more"
    ):
        cache.append(new, new)
    assert cache.lengths.tolist() == [3, 1]
    cache.append(new, new, new_lengths=[2, 3])
    cache.reset()
    assert cache.lengths.tolist() == [0, 0]


def test_pages_come_back():
    cache = fa.KVCache(2, 1, 4, max_length=8, page_size=2)
    new = torch.ones(2, 1, 5, 4)
    cache.append(new, new)
    fork = cache.fork([0, 0, 1])
    assert sorted(cache._pool.users)[-6:] == [2, 2, 2, 3, 3, 3]
    del fork
    gc.collect()
    cache.trim(0)
    assert set(cache._pool.users) == {0}


@paged
def test_gradient_of_a_decoded_query(page_size):
    """Pages are not laid out as keys are: nothing of a key's gradient may be written there."""
    torch.manual_seed(0)
    key, value = torch.randn(2, HKV, 4, 64), torch.randn(2, HKV, 4, 64)
    cache = fa.KVCache(2, HKV, 64, max_length=4, page_size=page_size)
    cache.append(key, value, new_lengths=[4, 2])
    fork = cache.fork([0, 1] * 16)
    query = torch.randn(32, HQ, 2, 64, requires_grad=True)
    weight = torch.randn(32, HQ, 2, 64)
    out, lse = fa.attention_decode(query, fork, return_lse=True, backend="cpu")
    found = torch.autograd.grad((out * weight).sum() + lse.sum(), query)[0]
    for b, n in ((0, 4), (1, 2), (31, 2)):
        q = query[b : b + 1].detach().double().requires_grad_()
        k, v = (x[b % 2 : b % 2 + 1, :, :n].double() for x in (key, value))
        out, lse = fa.attention(q, k, v, causal=True, return_lse=True)
        wanted = torch.autograd.grad((out * weight[b]).sum() + lse.sum(), q)[0]
        torch.testing.assert_close(found[b].double(), wanted[0], atol=2e-6, rtol=2e-6)


@paged
@pytest.mark.parametrize("name", ["mask", "bias", "alibi_slopes"])
def test_options_of_a_decode(page_size, name):
    """mask and bias are as wide as max_length, which need not be a whole number of pages."""
    torch.manual_seed(0)
    key, value = torch.randn(2, HKV, 9, D), torch.randn(2, HKV, 9, DV)
    cache = fa.KVCache(2, HKV, D, max_length=20, page_size=page_size, value_head_dim=DV)
    cache.append(key, value, new_lengths=[9, 4])
    wide = torch.randn(2, HQ, 2, 20)
    option = {"mask": wide > 0, "bias": wide, "alibi_slopes": wide[0, :, 0, 0].abs()}[name]
    query = torch.randn(2, HQ, 2, D)
    for backend in ("cpu", "reference"):
        out = fa.attention_decode(query, cache, **{name: option}, backend=backend)
        for b, n in enumerate((9, 4)):
            own = option if name == "alibi_slopes" else option[b : b + 1, ..., :n]
            row = slice(b, b + 1)
            wanted = fa.attention(
                query[row], key[row, :, :n], value[row, :, :n], causal=True, **{name: own}
            )
            torch.testing.assert_close(out[row], wanted, atol=2e-6, rtol=2e-6)


def test_pages_have_no_gradient():
    cache = fa.KVCache(1, 1, 4, max_length=4, page_size=2)
    cache.append(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4))
    cache.key.requires_grad_()
    out = fa.attention_decode(torch.ones(1, 1, 1, 4), cache, backend="cpu")
    with pytest.raises(ValueError, match="pages of a cache have no gradient"):
        out.sum().backward()


def test_wrong_use():
    cache = fa.KVCache(2, 1, 4, max_length=8)
    with pytest.raises(ValueError, match="KVCache: max_length must be an int of at least 1, got 0"):
        fa.KVCache(2, 1, 4, max_length=0)
    with pytest.raises(TypeError, match="key must have the cache's dtype float32, got float16"):
        cache.append(torch.ones(2, 1, 1, 4).half(), torch.ones(2, 1, 1, 4))
    with pytest.raises(
        ValueError, match=r"key must be \(B, Hkv, S, D\) = \(2, 1, 1, 4\), got key \(2, 2, 1, 4\)"
    ):
        cache.append(torch.ones(2, 2, 1, 4), torch.ones(2, 1, 1, 4))
    with pytest.raises(
        ValueError, match=r"lengths must be at most those held, \[0, 0\], got \[1, 0\]"
    ):
        cache.trim([1, 0])
    with pytest.raises(ValueError, match=r"indices must be in \[0, 2\), got \[2\]"):
        cache.fork([2])
    with pytest.raises(ValueError, match="query and cache disagree on B"):
        fa.attention_decode(torch.ones(3, 1, 1, 4), cache)


def test_merge_is_attention_over_all_keys():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 8, requires_grad=True) for n in (3, 9, 9))
    weight = torch.randn(2, 2, 3, 8)

    def loss(out, lse):
        return (out * weight).sum() + lse.square().sum()

    parts = [
        fa.attention(q, k[:, :, i:j], v[:, :, i:j], return_lse=True)
        for i, j in ((0, 2), (2, 2), (2, 9))
    ]
    merged = fa.merge(*zip(*parts, strict=True))
    whole = fa.attention(q, k, v, return_lse=True)
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)
    for a, b in zip(
        *(torch.autograd.grad(loss(*x), (q, k, v)) for x in (merged, whole)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_merge_has_the_gradients_of_its_formula():
    outs = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: fa.merge(x[:3], x[3:]), outs + lses)
    nothing = [x.detach().clone().requires_grad_() for x in lses]
    nothing[0].data[0, 0, 0] = -torch.inf
    for x in nothing:
        x.data[0, 1, 2] = -torch.inf
    out, lse = fa.merge(outs, nothing)
    loss = out.square().sum() + lse.exp().sum()
    for grad in torch.autograd.grad(loss, outs + nothing):
        assert grad.isfinite().all()


def test_merge_of_packed_parts_and_of_nothing():
    out, lse = fa.merge([torch.ones(5, 2, 4), torch.zeros(5, 2, 4)], [torch.zeros(2, 5)] * 2)
    assert (out == 0.5).all() and torch.allclose(lse, torch.tensor(2.0).log())
    out, lse = fa.merge([torch.zeros(1, 1, 2, 4)] * 2, [torch.full((1, 1, 2), -torch.inf)] * 2)
    assert (out == 0).all() and (lse == -torch.inf).all()
    with pytest.raises(ValueError, match="merge: lses must be outs' shape without Dv"):
        fa.merge([torch.zeros(1, 1, 2, 4)], [torch.zeros(1, 1, 3)])


@pytest.mark.parametrize("page_size", [None, 3])
def test_copies_share_nothing_that_matters(page_size):
    """A shallow copy is a fork; a deep one, and a pickle, has memory of its own and counts its pages."""
    torch.manual_seed(0)
    k = torch.randn(2, 1, 4, 8)
    cache = fa.KVCache(2, 1, 8, max_length=9, page_size=page_size)
    cache.append(k, k)
    query = torch.randn(2, 1, 1, 8)
    wanted = fa.attention_decode(query, cache)
    for make in (copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))):
        twin = make(cache)
        twin.append(9 * k, k)
        del twin
        cache.append(5 * k[:, :, :1], k[:, :, :1])  # would take a page that a copy gave back
        cache.trim(4)
        assert torch.equal(fa.attention_decode(query, cache), wanted)
    fork = cache.fork([0, 0])
    alone = pickle.loads(pickle.dumps(fork))
    assert torch.equal(fa.attention_decode(query, alone), fa.attention_decode(query, fork))
    alone.reset()
    if page_size is not None:
        assert set(alone._pool.users) == {0}
