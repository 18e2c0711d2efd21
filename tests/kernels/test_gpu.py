"""What the kernels of both GPU backends are held to beside the table of cases: emulated here, or launched
with --device cuda."""

import pytest
import torch

import fastattn as fa
from fastattn.kernels.reference.philox import keep_mask
from fastattn.verify.cases import attention
from fastattn.verify.judge import DTYPES, judge

from . import pick

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=pick.name)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.mark.parametrize("page_size", [None, 4, 7])
@pytest.mark.parametrize("channels", [0, 12, 16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_append_turns_keys_on_their_way(page_size, channels, interleaved, backend, device):
    """The kernel leaves in the cache what the definition does, in both layouts, for uneven sequences."""
    torch.manual_seed(0)
    k, v = (
        torch.randn(2, 20, 2, 16, device=device).transpose(1, 2),
        torch.randn(2, 2, 20, 12, device=device),
    )
    angles = torch.outer(torch.arange(60.0), 10.0 ** -torch.arange(channels / 2)).to(device)
    rotary = (angles.cos(), angles.sin(), interleaved) if channels else None
    stores = []
    for name in (backend, "reference"):
        cache = fa.KVCache(
            2, 2, 16, max_length=40, page_size=page_size, value_head_dim=12, device=device
        )
        cache.append(k[:, :, :9], v[:, :, :9], new_lengths=[9, 5], backend=name)
        cache.append(k, v, rotary, new_lengths=[20, 13], backend=name)
        stores.append((cache.key, cache.value, cache.lengths))
    for found, wanted in zip(*stores, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("wanted", ["cos", "sin", "both"])
def test_rows_of_the_tables_add_up_all_their_tokens(rows, wanted, backend, device):
    """Few rows turn many tokens each, whose gradients all have one sign; or most turn none."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 300, 16, device=device).transpose(1, 2).contiguous().transpose(1, 2)
    tables = [torch.rand(6, 70, device=device).T for _ in range(2)]  # columns apart in memory
    leaves = [t for t, name in zip(tables, ("cos", "sin"), strict=True) if wanted in (name, "both")]
    for leaf in leaves:
        leaf.requires_grad_()
    positions = torch.randint(0, rows, (2, 300), device=device)
    results = []
    for name in (backend, "reference"):
        y = fa.rotary(x, *tables, positions=positions, interleaved=True, backend=name)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for found, wanted_ in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted_, atol=2e-6, rtol=2e-6)


# ---- attention ----------------------------------------------------------------------------------


def test_heads_wider_than_256_are_declined(backend):
    x = torch.zeros(1, 1, 4, 257)
    with pytest.raises(ValueError, match=f"{backend}: heads of up to 256 channels, got 257"):
        fa.attention(x, x, x, backend=backend)
    sentence = f"{backend} computes bfloat16, float16, float32, not float64"
    with pytest.raises(ValueError, match=sentence):
        fa.attention(*[x[..., :8].double()] * 3, backend=backend)


@pytest.mark.parametrize(
    "Sq, Sk, dtype", [(5, 40, torch.float32), (70, 33, torch.bfloat16)], ids=pick.name
)
def test_dropout_drops_what_the_reference_drops(Sq, Sk, dtype, backend, device):
    """Values that are one-hot in the key show each weight: 0 where dropped."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, h, s, 16, device=device, dtype=dtype) for h, s in ((4, Sq), (2, Sk)))
    v = torch.eye(Sk, device=device, dtype=dtype).expand(2, 2, Sk, Sk)
    generator = torch.Generator(device).manual_seed(3)
    found = fa.attention(q, k, v, dropout_p=0.4, generator=generator, backend=backend) != 0
    generator.manual_seed(3)
    philox = torch.randint(0, 2**31, (2,), dtype=torch.int64, device=device, generator=generator)
    planes = torch.arange(8, device=device).reshape(2, 4, 1)
    kept = keep_mask(torch.arange(Sq, device=device), planes, Sk, philox, 0.4)
    assert torch.equal(found, kept)


@every_dtype
def test_long_sums(dtype, backend, device):
    """A running sum that is rounded to 16 bits once a tile would show here, and only here."""
    case = attention("long", "20x4096", B=1, Hq=1, Sq=20, Sk=4096, D=16, causal=True)
    assert judge(case, dtype, backend, device).passed


@every_dtype
def test_a_row_that_sees_one_key_has_no_gradient_of_its_score_under_dropout(dtype, backend, device):
    """1 / (1 - p) is inexact: sum(dO * O) would leave a rounding of dP in 16 bits in place of 0. What fp32
    leaves, 1e-6 of dP, a slope adds up over 120 rows of distances up to 30."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 2, 30, 16, dtype=dtype, device=device).requires_grad_() for _ in "qkv"
    )
    slopes = torch.rand(2, device=device, requires_grad=True)
    mask = torch.eye(30, dtype=torch.bool, device=device).flip(-1)
    out = fa.attention(q, k, v, mask=mask, alibi_slopes=slopes, dropout_p=0.2, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), (q, k, slopes))
    assert max(x.abs().max().item() for x in grads) < 4e-3


@pytest.mark.parametrize("dtype, D", [(torch.float32, 16), (torch.bfloat16, 64)], ids=pick.name)
def test_neighbours_in_the_batch_change_no_bit(dtype, D, backend, device):
    """Nor does where the sequence lies in memory, at multiples of 16 bytes or not."""
    torch.manual_seed(0)
    for Sq, Sk in ((1, 700), (40, 50)):
        q, k, v = (torch.randn(3, 2, s, D, device=device).to(dtype) for s in (Sq, Sk, Sk))
        lengths = torch.tensor([Sk, 9, 20], device=device)
        options = {"causal": True, "backend": backend}
        together = fa.attention(q, k, v, key_lengths=lengths, **options)
        for b in range(3):
            rows = slice(b, b + 1)
            alone = fa.attention(q[rows], k[rows], v[rows], key_lengths=lengths[rows], **options)
            assert torch.equal(alone[0], together[b])
        apart = [torch.cat([x, x[..., :1]], -1)[..., :D] for x in (q, k, v)]
        assert torch.equal(fa.attention(*apart, key_lengths=lengths, **options), together)


@pytest.mark.parametrize("page_size", [None, 4, 7])
@pytest.mark.parametrize("Sq", [1, 3, 20])
def test_decoding_over_a_cache(page_size, Sq, backend, device):
    """NaN in what is not held; the gradient of the query; slopes and a mask."""
    torch.manual_seed(0)
    cache = fa.KVCache(2, 2, 16, max_length=700, page_size=page_size, device=device)
    cache.key.fill_(torch.nan)
    cache.value.fill_(torch.nan)
    k, v = (torch.randn(2, 2, 650, 16, device=device) for _ in range(2))
    cache.append(k, v, new_lengths=[650, 311])
    q = torch.randn(2, 4, Sq, 16, device=device, requires_grad=True)
    options = {
        "alibi_slopes": torch.rand(4, device=device),
        "window": (600, None),
        "return_lse": True,
    }
    results = []
    for name in (backend, "reference"):
        out, lse = fa.attention_decode(q, cache, **options, backend=name)
        results.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), q)])
    for found, wanted in zip(*results, strict=True):
        largest = max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(found, wanted, atol=2e-6 * largest, rtol=0)
