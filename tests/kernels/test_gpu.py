"""What the kernels of both GPU backends are held to beside the table of cases: emulated here, or launched
with --device cuda."""

import pytest
import torch

import fastattn as fa


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
