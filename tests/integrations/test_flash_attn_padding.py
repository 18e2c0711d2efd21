"""flash_attn.bert_padding, and padded attention through it."""

import pytest
import torch

import fastattn as fa
from fastattn.integrations.flash_attn import bert_padding as padding

from .flash import attention_ref

MASK = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]])


@pytest.mark.parametrize("mask", [MASK, MASK.bool()], ids=["int", "bool"])
def test_unpad_and_pad(mask):
    x = torch.randn(4, 5, 3, 2, requires_grad=True)
    packed, indices, cu_seqlens, most, seqused = padding.unpad_input(x, mask)
    assert packed.shape == (10, 3, 2) and torch.equal(packed, x[mask.bool()])
    assert torch.equal(indices, MASK.flatten().nonzero().flatten())
    assert cu_seqlens.tolist() == [0, 2, 2, 7, 10] and cu_seqlens.dtype == torch.int32
    assert most == 5 and type(most) is int
    assert seqused.tolist() == [2, 0, 5, 3] and seqused.dtype == torch.int32
    again = padding.pad_input(packed, indices, 4, 5)
    assert torch.equal(again, x * MASK[..., None, None])
    weight = torch.randn_like(again)
    (again * weight).sum().backward()
    assert torch.equal(x.grad, weight * MASK[..., None, None])


def test_room_that_is_not_used():
    unused = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0] * 5, [0] * 5])
    packed, _, cu_seqlens, most, seqused = padding.unpad_input(torch.randn(4, 5, 2), MASK, unused)
    assert packed.shape == (12, 2) and cu_seqlens.tolist() == [0, 3, 4, 9, 12]
    assert most == 5 and seqused.tolist() == [2, 0, 5, 3]


def test_concatenated_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 4)
    packed, indices, cu_seqlens, most = padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert (
        cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
        and cu_seqlens.dtype == torch.int32
        and most == 6
    )
    assert torch.equal(packed, torch.cat([x[0, :5], x[1, :5], x[2]]))
    assert torch.equal(x.flatten(0, 1)[indices], packed)


def test_first_axis():
    x, indices = torch.randn(5, 3, requires_grad=True), torch.tensor([4, 0, 2])
    chosen, residual = padding.index_first_axis_residual(x, indices)
    assert torch.equal(chosen, x[indices]) and residual is x
    ((chosen * 2).sum() + residual.sum()).backward()
    assert x.grad[:, 0].tolist() == [3, 1, 3, 1, 3]
    for at in (indices, indices.int()):  # transformers passes int32
        assert torch.equal(padding.index_put_first_axis(chosen, at, 5)[indices], x[indices])
        assert torch.equal(padding.index_first_axis(x, at), chosen)


def test_attention_of_a_padded_batch():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 5, 2, 8)
    (pq, indices, cu, most, _), (pk, *_), (pv, *_) = (
        padding.unpad_input(x, MASK) for x in (q, k, v)
    )
    out = padding.pad_input(
        fa.flash_attn_varlen_func(pq, pk, pv, cu, cu, most, most), indices, 4, 5
    )
    for b in range(4):
        at = MASK[b].bool()
        expected = attention_ref(*(x[b : b + 1, at] for x in (q, k, v)))[0]
        torch.testing.assert_close(out[b, at], expected[0])
        assert not out[b, ~at].any()


def test_error():
    with pytest.raises(
        RuntimeError, match=r"unpad_input: attention_mask must be \(B, S\) = \(2, 3\)"
    ):
        padding.unpad_input(torch.randn(2, 3, 4), MASK)
