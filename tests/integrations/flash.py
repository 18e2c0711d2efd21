"""flash-attn's attention, naively: from what its documentation says, in its layouts, in any dtype."""

import torch

from fastattn.verify.judge import ratio


def attention_ref(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    learnable_sink=None,
    dropout_p=0.0,
    kept=None,
    lengths=None,
    start=None,
):
    """(out, lse) of q (B, Sq, Hq, D) over k, v (B, Sk, Hkv, D). kept: what dropout keeps. lengths, start (B,):
    keys [start, lengths) of each sequence exist, and lengths is where causal and windows count from."""
    (B, Sq, Hq, D), (Sk, Hkv) = q.shape, k.shape[1:3]
    k, v = (x.repeat_interleave(Hq // Hkv, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * (
        D**-0.5 if softmax_scale is None else softmax_scale
    )
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    lengths = torch.full((B,), Sk) if lengths is None else lengths
    i, j = torch.arange(Sq)[:, None], torch.arange(Sk)
    at = (i + lengths.view(B, 1, 1, 1) - Sq) - j  # how far a key is before its query's diagonal
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype).expand(B, Hq)[..., None, None] * at.abs()
    left, right = window_size
    right = 0 if causal else right
    seen = j < lengths.view(B, 1, 1, 1)
    if start is not None:
        seen = seen & (j >= start.view(B, 1, 1, 1))
    seen = seen & (at <= left if left >= 0 else True) & (at >= -right if right >= 0 else True)
    scores = scores.masked_fill(~seen, -torch.inf)
    whole = scores
    if learnable_sink is not None:
        sink = learnable_sink.to(scores.dtype)[:, None, None].expand(B, Hq, Sq, 1)
        whole = torch.cat([scores, sink], -1)
    lse = torch.logsumexp(whole, -1)
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    if kept is not None:
        weights = torch.where(kept, weights / (1 - dropout_p), 0.0)
    return torch.einsum("bhts,bshd->bthd", weights, v), lse


def held(found, define, inputs, dtype):
    """found: tensors, for outputs and gradients by define(*inputs): by the rule of fastattn.verify.judge."""
    truth = define(*(x.double() if x.is_floating_point() else x for x in inputs))
    naive = define(*inputs)
    for n, (x, t, m) in enumerate(zip(found, truth, naive, strict=True)):
        assert (r := ratio(x.detach(), t.detach(), m.detach(), dtype)) <= 1, (
            f"result {n}: {r:.3g} allowances"
        )


def gradients(outputs, leaves):
    """Of a fixed random function of the outputs, what is infinite left out."""
    generator, loss = torch.Generator().manual_seed(3), 0.0
    for out in outputs:
        weight = torch.randn(out.shape, dtype=torch.float64, generator=generator)
        loss = loss + (torch.where(out.detach().isinf(), 0.0, out.double()) * weight).sum()
    return torch.autograd.grad(loss, leaves)


def leaf(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()
