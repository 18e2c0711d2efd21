"""BERT and GPT-2 in naive PyTorch, from a state dict: the twins that the fused models are held to.

No operator of this library is used here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over (B, S, E) projections; mask is True where hidden, and broadcasts to
    the scores."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def linear(state: State, x: Tensor, name: str) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state: State, x: Tensor, name: str, eps: float) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def bert(
    state: State, heads: int, eps: float, ids: Tensor, kept: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The last hidden state (B, S, E) of the weights under "bert."; kept (B, S): False at padding."""
    e = "bert.embeddings"
    words = F.embedding(ids, state[f"{e}.word_embeddings.weight"])
    positions = state[f"{e}.position_embeddings.weight"][: ids.shape[1]]
    types = state[f"{e}.token_type_embeddings.weight"][0]
    x = norm(state, words + positions + types, f"{e}.LayerNorm", eps)
    hidden = None if kept is None else ~kept[:, None, None]
    layer = 0
    while f"bert.encoder.layer.{layer}.output.dense.weight" in state:
        at = f"bert.encoder.layer.{layer}"
        q, k, v = (linear(state, x, f"{at}.attention.self.{n}") for n in ("query", "key", "value"))
        out = linear(state, attend(q, k, v, heads, hidden), f"{at}.attention.output.dense")
        x = norm(state, x + out, f"{at}.attention.output.LayerNorm", eps)
        h = F.gelu(linear(state, x, f"{at}.intermediate.dense"))
        x = norm(state, x + linear(state, h, f"{at}.output.dense"), f"{at}.output.LayerNorm", eps)
        layer += 1
    return x


def bert_masked_lm(
    state: State, heads: int, eps: float, ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """loss and logits of BertForMaskedLM's weights."""
    x, head = bert(state, heads, eps, ids), "cls.predictions"
    x = F.gelu(linear(state, x, f"{head}.transform.dense"))
    x = norm(state, x, f"{head}.transform.LayerNorm", eps)
    logits = F.linear(x, state["bert.embeddings.word_embeddings.weight"], state[f"{head}.bias"])
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def gpt2(
    state: State, heads: int, eps: float, ids: Tensor, past: list[tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:  # fmt: skip
    """The last hidden state (B, S, E) of the weights under "transformer.", of tokens after those whose keys
    and values are past, and keys and values (B, past + S, E) of all, one pair a layer."""

    def conv(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"] + state[f"{name}.bias"]

    S, before = ids.shape[1], past[0][0].shape[1] if past else 0
    later = torch.ones(S, before + S, dtype=torch.bool, device=ids.device).triu(before + 1)
    positions = state["transformer.wpe.weight"][before : before + S]
    x = F.embedding(ids, state["transformer.wte.weight"]) + positions
    held: list[tuple[Tensor, Tensor]] = []
    while f"transformer.h.{len(held)}.ln_1.weight" in state:
        at = f"transformer.h.{len(held)}"
        q, k, v = conv(norm(state, x, f"{at}.ln_1", eps), f"{at}.attn.c_attn").chunk(3, -1)
        if past:
            k, v = (
                torch.cat([old, new], 1) for old, new in zip(past[len(held)], (k, v), strict=True)
            )
        held.append((k, v))
        x = x + conv(attend(q, k, v, heads, later), f"{at}.attn.c_proj")
        h = F.gelu(conv(norm(state, x, f"{at}.ln_2", eps), f"{at}.mlp.c_fc"), approximate="tanh")
        x = x + conv(h, f"{at}.mlp.c_proj")
    return norm(state, x, "transformer.ln_f", eps), held


def gpt2_lm(
    state: State, heads: int, eps: float, ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """loss and logits of GPT2LMHeadModel's weights."""
    logits = F.linear(gpt2(state, heads, eps, ids)[0], state["transformer.wte.weight"])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits
