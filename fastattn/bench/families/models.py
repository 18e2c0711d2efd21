"""BERT's masked-LM loss and GPT-2's, of one batch: this library's models, the same weights in naive
PyTorch (verify/naive.py), transformers' models, and BERT in ONNX Runtime.

Every contestant is given the weights as inputs, so that one state dict serves all and the gradients of
the weights are judged. Operations: 2 a weight and token, and attention's.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from ...verify.naive import bert_masked_lm, gpt2_lm
from ..peers import need, onnx_call, onnx_session, onnx_type
from ..workload import NAIVE, OURS, Call, Contestant, Cost, Inputs, Refusal, Setting, Workload

NAMES = {"BERT": (BertConfig, BertForMaskedLM), "GPT-2": (GPT2Config, GPT2LMHeadModel)}
DATA = ("ids", "labels")


def workloads(setting: Setting) -> Iterator[Workload]:
    for name, B, S in setting.pick(
        (("BERT", 2, 128), ("GPT-2", 2, 128)),
        (("BERT", 8, 128), ("BERT", 1, 512), ("GPT-2", 1, 512)),
        (("BERT", 64, 128), ("BERT", 16, 512), ("GPT-2", 8, 1024)),
    ):
        sizes = setting.pick((256, 2, 4, 2048), *[(768, 12, 12, None)] * 2)
        yield workload(setting, name, B, S, config(name, S, *sizes))


def config(name: str, S: int, E: int, layers: int, heads: int, V: int | None) -> dict[str, Any]:
    """Without dropout, of which everyone draws another."""
    if name == "BERT":
        return {
            "hidden_size": E, "num_hidden_layers": layers, "num_attention_heads": heads,
            "intermediate_size": 4 * E, "vocab_size": V or 30522, "max_position_embeddings": S,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": None,
        }  # fmt: skip
    return {
        "n_embd": E, "n_layer": layers, "n_head": heads, "vocab_size": V or 50257, "n_positions": S,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip


def workload(setting: Setting, name: str, B: int, S: int, fields: dict[str, Any]) -> Workload:
    kind, model = NAMES[name]
    made = kind(**fields)
    E, layers, heads = (
        (made.hidden_size, made.num_hidden_layers, made.num_attention_heads)
        if isinstance(made, BertConfig)
        else (made.n_embd, made.n_layer, made.n_head)
    )

    def make() -> Inputs:
        weights = {n: p.detach().double() for n, p in model(made).named_parameters()}
        ids = torch.randint(made.vocab_size, (B, S))
        return {**weights, "ids": ids, "labels": ids}

    products = layers * 12 * E * E + made.vocab_size * E + (E * E if name == "BERT" else 0)
    scores = 4.0 * layers * B * S * S * E * (1.0 if name == "BERT" else 0.5)
    flops = 2.0 * B * S * products + scores
    read = products * setting.dtype.itemsize
    eps = made.layer_norm_eps if isinstance(made, BertConfig) else made.layer_norm_epsilon
    return Workload(
        "models", name, {"B": B, "S": S, "E": E, "layers": layers}, setting.dtype, setting.device,
        Cost(flops, read, 2 * flops, 2 * read), "flops", make,
        tuple(contestants(setting, name, fields, heads, eps)),
    )  # fmt: skip


def contestants(
    setting: Setting, name: str, fields: dict[str, Any], heads: int, eps: float
) -> Iterator[Contestant]:
    kind, model = NAMES[name]
    yield Contestant(OURS, lambda x: with_weights(model(kind(**fields)), x))
    yield Contestant(NAIVE, lambda x: naive(name, heads, eps, x))
    for attention in ("eager", "sdpa"):
        bind = partial(transformers, setting, name, fields, attention)
        yield Contestant(f"transformers {attention}", bind)
    if name == "BERT":
        yield Contestant(
            "onnxruntime", lambda x: onnx(setting, heads, eps, x), backward=False, weighs=False
        )


def naive(name: str, heads: int, eps: float, x: Inputs) -> Call:
    weights, ids, labels = split(x)
    function = bert_masked_lm if name == "BERT" else gpt2_lm
    return lambda: function(as_naive(weights), heads, eps, ids, labels)[0]


def split(x: Inputs) -> tuple[Inputs, Tensor, Tensor]:
    return {n: w for n, w in x.items() if n not in DATA}, x["ids"], x["labels"]


def as_naive(weights: Inputs) -> Inputs:
    return {
        n.replace("predictions.decoder.bias", "predictions.bias"): w for n, w in weights.items()
    }


def with_weights(model: nn.Module, x: Inputs) -> Call:
    """The model on weights that are given to it, tied ones once, under either of BERT's names."""
    weights, ids, labels = split(x)
    weights = as_naive(weights)
    named = {n: weights[next(iter(as_naive({n: p})))] for n, p in model.named_parameters()}
    # buffers too; without dropout training is the same, and all is in the graph
    model.to(ids.device).train()
    call = torch.func.functional_call
    return lambda: call(model, named, (ids,), {"labels": labels}).loss


def transformers(
    setting: Setting, name: str, fields: dict[str, Any], attention: str, x: Inputs
) -> Call:
    need("transformers", setting)
    hub = importlib.import_module("transformers")
    model, kind = {
        "BERT": (hub.BertForMaskedLM, hub.BertConfig),
        "GPT-2": (hub.GPT2LMHeadModel, hub.GPT2Config),
    }[name]
    theirs = kind(**fields, bos_token_id=0, eos_token_id=0, use_cache=False)
    with torch.random.fork_rng(devices=[]):
        return with_weights(model._from_config(theirs, attn_implementation=attention), x)


class Twin(nn.Module):
    """Naive BERT as a module, for the exporter."""

    def __init__(self, heads: int, eps: float, weights: Inputs) -> None:
        super().__init__()
        self.heads, self.eps, self.weights = heads, eps, weights

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return bert_masked_lm(self.weights, self.heads, self.eps, ids, labels)[0]


def onnx(setting: Setting, heads: int, eps: float, x: Inputs) -> Call:
    onnx_type(x, setting)
    need("onnxscript", setting)
    weights, ids, labels = split(x)
    frozen = {n: w.detach() for n, w in as_naive(weights).items()}
    inputs = {"ids": ids, "labels": labels}
    program = torch.onnx.export(
        Twin(heads, eps, frozen).eval(), (ids, labels), input_names=list(inputs), output_names=["loss"],
        dynamo=True, verbose=False,
    )  # fmt: skip
    if program is None:
        raise Refusal("torch.onnx.export made nothing of it")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bert.onnx"
        program.save(file)
        return onnx_call(onnx_session(str(file)), inputs)
