"""One token more of GPT-2, after a prompt of S: every weight is read once, so bytes count.

The floor, which nobody can pass, is the time in which this machine reads the weights, and keys and values of
S tokens. A call's token is forgotten after it, so that all calls are one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...verify.naive import State, gpt2
from ..workload import Call, Cost, Inputs, Setting, Workload
from .inference import BASE, TINY, Form, contestants, fields_of, vocabulary, weights


def workloads(setting: Setting) -> Iterator[Workload]:
    B, S = setting.pick((1, 128), (1, 512), (8, 512))
    yield workload(setting, B, S, setting.pick(TINY, BASE, BASE))


def workload(setting: Setting, B: int, S: int, sizes: tuple[Any, ...] = BASE) -> Workload:
    fields = fields_of("GPT-2", S + 1, sizes)
    E, layers, heads, _ = sizes
    V = vocabulary(fields)

    def make() -> Inputs:
        return {**weights("GPT-2", fields), "ids": torch.randint(V, (B, S + 1))}

    products, held = layers * 12 * E * E + V * E, 2 * layers * B * (S + 1) * E
    return Workload(
        "generation", "GPT-2", {"B": B, "S": S, "E": E, "layers": layers}, setting.dtype, setting.device,
        Cost(2.0 * (B * products + held), (products + held) * setting.dtype.itemsize, 0, 0), "read", make,
        tuple(contestants(setting, FORM, fields, heads, padded=False)), directions=("forward",),
    )  # fmt: skip


def step(model: nn.Module, x: Inputs) -> Call:
    """(B, 1, V)"""
    prompt, new = x["ids"][:, :-1], x["ids"][:, -1:]
    with torch.no_grad():
        out = model(prompt, use_cache=True, logits_to_keep=1)
    name = "cache" if "cache" in out else "past_key_values"  # transformers 5 says cache
    held = {name: out[name]}

    def call() -> Tensor:
        logits = model(new, **held, use_cache=True).logits
        forget(held[name], prompt.shape[1])
        return logits

    return call


def forget(held: Any, S: int) -> None:
    """All but S tokens, one less than there are: of a list of KVCache, or of transformers' cache."""
    if not isinstance(held, list):
        held.crop(-1)
        return
    for cache in held:
        cache.trim(S)


def naive_step(state: State, heads: int, eps: float, x: Inputs) -> Call:
    ids, tokens = x["ids"], state["transformer.wte.weight"]
    with torch.no_grad():
        past = gpt2(state, heads, eps, ids[:, :-1])[1]
    return lambda: F.linear(gpt2(state, heads, eps, ids[:, -1:], past)[0], tokens)


FORM = Form("GPT-2", step, naive_step)
