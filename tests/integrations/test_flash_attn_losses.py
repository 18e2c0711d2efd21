"""flash_attn.losses.cross_entropy and ops.triton.cross_entropy, against torch."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from fastattn.integrations.flash_attn.losses.cross_entropy import CrossEntropyLoss
from fastattn.integrations.flash_attn.ops.triton.cross_entropy import cross_entropy_loss

from .flash import held


def test_signatures():
    shown = [
        p.name if p.default is p.empty else f"{p.name}={p.default}"
        for p in inspect.signature(cross_entropy_loss).parameters.values()
    ]
    assert " ".join(shown) == (
        "logits labels precomputed_lse=None label_smoothing=0.0 logit_scale=1.0 lse_square_scale=0.0 "
        "ignore_index=-100 inplace_backward=False process_group=None"
    )
    assert str(inspect.signature(CrossEntropyLoss)).count("=") == 8
    assert " ".join(inspect.signature(CrossEntropyLoss).parameters) == (
        "ignore_index reduction label_smoothing logit_scale lse_square_scale inplace_backward "
        "process_group return_z_loss"
    )
    assert list(inspect.signature(CrossEntropyLoss.forward).parameters) == (
        ["self", "input", "target", "precomputed_lse"]
    )


LABELS = torch.tensor([3, -100, 0, 30, 7, 7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("z", [0.0, 0.02])
@pytest.mark.parametrize("inplace", [False, True])
def test_loss_of_rows(dtype, smoothing, scale, z, inplace):
    torch.manual_seed(0)
    logits = (torch.randn(6, 31) * 3).to(dtype).requires_grad_()
    copy = logits.detach().clone()
    losses, z_losses = cross_entropy_loss(
        logits, LABELS, None, smoothing, scale, z, inplace_backward=inplace
    )
    assert losses.dtype == z_losses.dtype == torch.float32 and not z_losses.requires_grad
    losses.backward(torch.arange(6.0))

    def define(x):
        x = x.detach().requires_grad_()
        lse = torch.logsumexp(x * scale, -1)
        z_part = (z * lse.square()).masked_fill(LABELS == -100, 0)
        loss = (
            F.cross_entropy(x * scale, LABELS, label_smoothing=smoothing, reduction="none") + z_part
        )
        (grad,) = torch.autograd.grad(loss, x, torch.arange(6.0).to(x.dtype))
        return loss, z_part, grad

    held((losses, z_losses, logits.grad), define, (copy,), dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_module(reduction):
    torch.manual_seed(1)
    logits = torch.randn(6, 31)
    module = CrossEntropyLoss(reduction=reduction, lse_square_scale=0.1, return_z_loss=True)
    loss, z_loss = module(logits, LABELS, precomputed_lse=logits.logsumexp(-1))
    z_part = (0.1 * logits.logsumexp(-1).square())[LABELS != -100]
    rows = F.cross_entropy(logits, LABELS, reduction="none")
    expected = rows + torch.zeros(6).masked_scatter(LABELS != -100, z_part)
    if reduction == "none":
        torch.testing.assert_close(loss, expected)
    else:
        count = 5 if reduction == "mean" else 1
        torch.testing.assert_close((loss, z_loss), (expected.sum() / count, z_part.sum() / count))
    plain = CrossEntropyLoss(reduction=reduction)(logits, LABELS)
    torch.testing.assert_close(plain, F.cross_entropy(logits, LABELS, reduction=reduction))


class Group:
    def size(self):
        return 2


def test_errors():
    logits = torch.randn(6, 31)
    with pytest.raises(
        RuntimeError, match="tensor parallelism is not supported: process_group has 2"
    ):
        cross_entropy_loss(logits, LABELS, process_group=Group())
    with pytest.raises(
        RuntimeError, match="precomputed_lse is not the logits' log-sum-exp, by up to 2"
    ):
        cross_entropy_loss(logits, LABELS, logits.logsumexp(-1) + 2)
    with pytest.raises(
        RuntimeError, match=r"cross_entropy_loss: target 31 at row 5 is outside \[0, 31\)"
    ):
        cross_entropy_loss(logits, torch.tensor([0, 1, 2, 3, 4, 31]))
    with pytest.raises(
        NotImplementedError, match="reduction must be one of mean, none, sum, got 'max'"
    ):
        CrossEntropyLoss(reduction="max")
