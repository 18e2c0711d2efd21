"""BERT and GPT-2 in naive PyTorch, from a state dict: the twins that the fused models are held to.

No operator of this library is used here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over (B, S, E) projections; mask (S, S) is True where hidden."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def bert_masked_lm(
    state: State, heads: int, eps: float, ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """loss and logits of BertForMaskedLM's weights."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"{name}.LayerNorm.weight"], state[f"{name}.LayerNorm.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    e = "bert.embeddings"
    words = state[f"{e}.word_embeddings.weight"]
    positions = state[f"{e}.position_embeddings.weight"][: ids.shape[1]]
    x = norm(F.embedding(ids, words) + positions + state[f"{e}.token_type_embeddings.weight"][0], e)
    layer = 0
    while f"bert.encoder.layer.{layer}.output.dense.weight" in state:
        at = f"bert.encoder.layer.{layer}"
        q, k, v = (linear(x, f"{at}.attention.self.{n}") for n in ("query", "key", "value"))
        out = linear(attend(q, k, v, heads), f"{at}.attention.output.dense")
        x = norm(x + out, f"{at}.attention.output")
        out = linear(F.gelu(linear(x, f"{at}.intermediate.dense")), f"{at}.output.dense")
        x = norm(x + out, f"{at}.output")
        layer += 1
    head = "cls.predictions"
    x = norm(F.gelu(linear(x, f"{head}.transform.dense")), f"{head}.transform")
    logits = F.linear(x, words, state[f"{head}.bias"])
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def gpt2_lm(
    state: State, heads: int, eps: float, ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """loss and logits of GPT2LMHeadModel's weights."""

    def conv(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"] + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    S = ids.shape[1]
    later = torch.ones(S, S, dtype=torch.bool).triu(1)
    tokens = state["transformer.wte.weight"]
    x = F.embedding(ids, tokens) + state["transformer.wpe.weight"][:S]
    layer = 0
    while f"transformer.h.{layer}.ln_1.weight" in state:
        at = f"transformer.h.{layer}"
        q, k, v = conv(norm(x, f"{at}.ln_1"), f"{at}.attn.c_attn").chunk(3, -1)
        x = x + conv(attend(q, k, v, heads, later), f"{at}.attn.c_proj")
        h = F.gelu(conv(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc"), approximate="tanh")
        x = x + conv(h, f"{at}.mlp.c_proj")
        layer += 1
    logits = F.linear(norm(x, "transformer.ln_f"), tokens)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits
