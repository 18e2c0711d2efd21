"""Whole models in inference: fastattn's, naive PyTorch (verify/naive.py), and transformers' with torch's own
attention, all with the same weights.

BERT labels every token; in "BERT padded" a batch holds texts of 16 to S tokens, and fastattn skips the
padding. "GPT-2 prefill" fills a cache and gives the next token's logits.
Operations: 2 a weight and token that is no padding, and attention's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import BertConfig, BertForTokenClassification, GPT2Config, GPT2LMHeadModel
from ...verify.naive import State, bert, gpt2, linear
from ..peers import need
from ..workload import NAIVE, OURS, Call, Contestant, Cost, Inputs, Setting, Workload
from .models import config

# E, layers, heads, V: of BERT-base and of GPT-2 with 124 million weights
BASE = (768, 12, 12, None)
TINY = (256, 2, 4, 2048)
LABELS = 9  # as many as names of persons, places and the like take
SHORTEST = 16
RIVAL = "transformers sdpa"
Bind = Callable[[nn.Module, Inputs], Call]


@dataclass(frozen=True)
class Form:
    """A model and how it is called. bind(model, inputs) serves fastattn's and transformers' model alike;
    naive(state, heads, eps, inputs) is the call on bare weights."""

    model: str
    bind: Bind = field(repr=False)
    naive: Callable[[State, int, float, Inputs], Call] = field(repr=False)


def workloads(setting: Setting) -> Iterator[Workload]:
    sizes = setting.pick(TINY, BASE, BASE)
    for case, B, S in setting.pick(
        (("BERT", 2, 128), ("BERT padded", 8, 128), ("GPT-2 prefill", 1, 128)),
        (("BERT", 8, 128), ("BERT padded", 16, 256), ("GPT-2 prefill", 1, 512)),
        (("BERT", 64, 128), ("BERT padded", 64, 512), ("GPT-2 prefill", 8, 1024)),
    ):
        yield workload(setting, case, B, S, sizes)


def workload(
    setting: Setting, case: str, B: int, S: int, sizes: tuple[Any, ...] = BASE
) -> Workload:
    form, padded = FORMS[case], case == "BERT padded"
    fields = fields_of(form.model, S, sizes)
    E, layers, heads, _ = sizes
    lengths = lengths_of(B, S) if padded else [S] * B

    def make(B: int = B) -> Inputs:
        mask = {"mask": mask_of(lengths_of(B, S), S)} if padded else {}
        return {
            **weights(form.model, fields),
            "ids": torch.randint(vocabulary(fields), (B, S)),
            **mask,
        }

    products, shown = layers * 12 * E * E, 1.0 if form.model == "BERT" else 0.5
    flops = 2.0 * products * sum(lengths) + shown * 4 * layers * E * sum(n * n for n in lengths)
    read = products * setting.dtype.itemsize
    if form.model == "GPT-2":
        flops += 2.0 * B * vocabulary(fields) * E
    return Workload(
        "inference", case, {"B": B, "S": S, "E": E, "layers": layers}, setting.dtype, setting.device,
        Cost(flops, read, 0, 0), "flops", make, tuple(contestants(setting, form, fields, heads, padded)),
        make_judged=lambda: make(min(B, 4)), directions=("forward",),
    )  # fmt: skip


def fields_of(model: str, S: int, sizes: tuple[Any, ...]) -> dict[str, Any]:
    fields = config(model, S, *sizes)
    return fields | {"num_labels": LABELS} if model == "BERT" else fields


def vocabulary(fields: dict[str, Any]) -> int:
    return int(fields["vocab_size"])


def lengths_of(B: int, S: int) -> list[int]:
    """From SHORTEST to S, each longer than the last by the same factor: at S 256 a third of B S."""
    if B == 1:
        return [S]
    return [round(SHORTEST * (S / SHORTEST) ** (b / (B - 1))) for b in range(B)]


def mask_of(lengths: list[int], S: int) -> Tensor:
    return (torch.arange(S) < torch.tensor(lengths)[:, None]).long()


# ---- models and their weights -------------------------------------------------------------------


def built(model: str, fields: dict[str, Any], padded: bool = False) -> nn.Module:
    if model == "BERT":
        return BertForTokenClassification(BertConfig(**fields, skip_padding=padded))
    return GPT2LMHeadModel(GPT2Config(**fields))


def weights(model: str, fields: dict[str, Any]) -> Inputs:
    return {n: p.detach().double() for n, p in built(model, fields).named_parameters()}


def with_weights(model: nn.Module, x: Inputs) -> nn.Module:
    """The model with a copy of the inputs' weights, in their dtype, where they lie."""
    named = dict(model.named_parameters())
    model.to(x["ids"].device, next(x[name].dtype for name in named))
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(x[name])
    return model.eval()


def contestants(
    setting: Setting, form: Form, fields: dict[str, Any], heads: int, padded: bool
) -> Iterator[Contestant]:
    eps = 1e-12 if form.model == "BERT" else 1e-5

    def ours(x: Inputs) -> Call:
        return form.bind(with_weights(built(form.model, fields, padded), x), x)

    yield Contestant(OURS, ours, backward=False)
    yield Contestant(NAIVE, lambda x: form.naive(x, heads, eps, x), backward=False)
    yield Contestant(RIVAL, partial(transformers, setting, form, fields), backward=False)


def transformers(setting: Setting, form: Form, fields: dict[str, Any], x: Inputs) -> Call:
    need("transformers", setting)
    hub = importlib.import_module("transformers")
    model, kind = {
        "BERT": (hub.BertForTokenClassification, hub.BertConfig),
        "GPT-2": (hub.GPT2LMHeadModel, hub.GPT2Config),
    }[form.model]
    theirs = kind(**fields, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):
        made = model._from_config(theirs, attn_implementation="sdpa")
    return form.bind(with_weights(made, x), x)


# ---- calls --------------------------------------------------------------------------------------


def label(model: nn.Module, x: Inputs) -> Call:
    """(B, S, LABELS), 0 at padding."""
    ids, mask = x["ids"], x.get("mask")
    if mask is None:
        return lambda: model(ids).logits
    return lambda: model(ids, attention_mask=mask).logits * mask[..., None]


def naive_label(state: State, heads: int, eps: float, x: Inputs) -> Call:
    def call() -> Tensor:
        mask = x.get("mask")
        hidden = bert(state, heads, eps, x["ids"], None if mask is None else mask.bool())
        logits = linear(state, hidden, "classifier")
        return logits if mask is None else logits * mask[..., None]

    return call


def prefill(model: nn.Module, x: Inputs) -> Call:
    """(B, 1, V)"""
    return lambda: model(x["ids"], use_cache=True, logits_to_keep=1).logits


def naive_prefill(state: State, heads: int, eps: float, x: Inputs) -> Call:
    tokens = state["transformer.wte.weight"]
    return lambda: F.linear(gpt2(state, heads, eps, x["ids"])[0][:, -1:], tokens)


FORMS = {
    "BERT": Form("BERT", label, naive_label),
    "BERT padded": Form("BERT", label, naive_label),
    "GPT-2 prefill": Form("GPT-2", prefill, naive_prefill),
}
