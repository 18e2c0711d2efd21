"""BERT (Devlin et al. 2018, arXiv:1810.04805): an encoder of tokens that all see each other.

    x = norm(word + position + type);   per layer:
        x = norm(x + dense(attention(q, k, v)));   x = norm(x + dense(gelu(dense(x))))

Every norm takes its residual and dropout in one pass, the first dense of the MLP leaves its bias to
the activation, fused where that is a gelu, and attention is fused unless its weights are asked for.
Parameters are named as transformers names them. With skip_padding, layers see the tokens that
attention_mask keeps and nothing else: (total, E) in place of (B, S, E).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import LayerNorm
from ..ops.attention import attention_varlen
from ..ops.checks import is_tensor
from ..ops.cross_entropy import cross_entropy
from .checkpoint import Config, PretrainedModel
from .layers import (
    ACTIVATIONS,
    Packing,
    activated,
    attend,
    attention_mask_of,
    class_labels,
    embedded,
    look_up,
    packed,
    packing_of,
    padded,
)
from .output import ModelOutput, exported


@dataclass
class BertConfig(Config):
    """transformers' BertConfig, and skip_padding: compute the tokens that attention_mask (B, S) keeps,
    wherever they stand, and no others. Results at padding, which transformers fills with numbers of no
    meaning, are then 0. It needs the weights of attention to be left alone, and no fullgraph=True."""

    model_type: ClassVar[str] = "bert"
    only: ClassVar[dict[str, Any]] = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "is_encoder_decoder": False,
        "add_cross_attention": False,
    }

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: float | None = None
    tie_word_embeddings: bool = True
    skip_padding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise self.error(
                "hidden_size must be a multiple of num_attention_heads, "
                f"got {self.hidden_size} and {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise self.error(
                f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}"
            )


@exported
@dataclass
class BertOutput(ModelOutput):
    """last_hidden_state (B, S, E); pooler_output (B, E); hidden_states: one a layer, and the first;
    attentions: (B, H, S, S) a layer."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@exported
@dataclass
class HeadOutput(ModelOutput):
    """loss: a scalar, when labels were given; logits: the head's."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Context(NamedTuple):
    """What a pass tells every layer. mask: of attention_mask_of; weights: a list that gets them; packing:
    of x (total, E), which then needs no mask."""

    mask: Tensor | None
    weights: list[Tensor] | None = None
    packing: Packing | None = None


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        E = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, E, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, E)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, E)
        self.LayerNorm = LayerNorm(E, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        words = embedded("BertModel", self.word_embeddings, input_ids, inputs_embeds)  # (B, S, E)
        (B, S), P = words.shape[:2], self.position_embeddings.num_embeddings
        if position_ids is not None:
            positions = look_up(
                "BertModel", "position_ids", self.position_embeddings, position_ids, (B, S)
            )
        elif S > P:
            raise ValueError(f"BertModel: {S} tokens are more than max_position_embeddings = {P}")
        else:
            positions = self.position_embeddings.weight[:S]  # (S, E)
        if token_type_ids is None:
            types = self.token_type_embeddings.weight[0]  # (E,)
        else:
            types = look_up(
                "BertModel", "token_type_ids", self.token_type_embeddings, token_type_ids, (B, S)
            )
        return self.dropout(self.LayerNorm(words + types, residual=positions.expand_as(words)))


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        E = config.hidden_size
        self.heads, self.dropout_p = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query, self.key, self.value = nn.Linear(E, E), nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = (
            dense(x).unflatten(-1, (self.heads, -1))  # (B, S, H, D) or (total, H, D)
            for dense in (self.query, self.key, self.value)
        )
        dropout_p = self.dropout_p if self.training else 0.0
        mask, weights, packing = context
        if packing is not None:
            _, at, longest, _ = packing
            out = attention_varlen(q, k, v, at, at, longest, longest, dropout_p=dropout_p)
            return out.flatten(1)  # (total, E)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, S, D), views
        out = attend(q, k, v, mask, dropout_p=dropout_p, weights=weights)
        return out.transpose(1, 2).flatten(2)  # (B, S, E)


class BertResidual(nn.Module):
    """norm(dropout(dense(x)) + residual)"""

    def __init__(self, width: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        dropout_p = self.dropout_p if self.training else 0.0
        return self.LayerNorm(self.dense(x), residual=residual, dropout_p=dropout_p)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertResidual(config.hidden_size, config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.output(self.self(x, context), residual=x)


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = config.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.act, self.dense, x)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertResidual(config.intermediate_size, config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = self.attention(x, context)
        return self.output(self.intermediate(x), residual=x)


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


class BertPretrained(PretrainedModel):
    config_class = BertConfig
    base = "bert"

    def initialise(self, config: BertConfig) -> None:
        self.config = config
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, 0.0, config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])


class BertModel(BertPretrained):
    """The encoder, with a pooler over the first token unless add_pooling_layer is False."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.initialise(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BertOutput | tuple[Any, ...]:
        """input_ids (B, S) int, or inputs_embeds (B, S, E). attention_mask: (B, S) or (B, S, S), 1 for a
        token and 0 for padding, or 4-D (B, 1 or H, 1 or S, S), bool (True may attend) or float (added).
        output_attentions needs the whole (S, S) weights, and computes them. Switches left None are the
        config's; return_dict=False gives a tuple of what is not None."""
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)  # (B, S, E)
        context = self.context(x, attention_mask, output_attentions)
        x = packed(x, context.packing)  # (B, S, E) or (total, E)
        states = [x]
        for layer in self.encoder.layer:
            x = layer(x, context)
            states.append(x)
        x = padded(x, context.packing)
        kept = None
        if self.switch("output_hidden_states", output_hidden_states):
            kept = tuple(padded(state, context.packing) for state in states)
        pooled = self.pooler(x) if self.pooler is not None else None
        attentions = None if context.weights is None else tuple(context.weights)
        return self.returned(BertOutput(x, pooled, kept, attentions), return_dict)

    def context(
        self, x: Tensor, attention_mask: Tensor | None, output_attentions: bool | None
    ) -> Context:
        (B, S), H = x.shape[:2], self.config.num_attention_heads
        mask = attention_mask_of("BertModel", attention_mask, B, H, S, S)
        wanted = self.switch("output_attentions", output_attentions)
        packing = packing_of("BertModel", mask, (B, S)) if self.config.skip_padding else None
        if packing is not None and wanted:
            raise ValueError(
                "BertModel: output_attentions and skip_padding do not go together: weights of (S, S) have "
                "rows and columns of padding"
            )
        return Context(mask, [] if wanted else None, packing)


# ---- heads ------------------------------------------------------------------------------------


class BertTransform(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.act = config.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(activated(self.act, self.dense, x))


class BertPredictions(nn.Module):
    """Logits over the vocabulary, by the word embeddings' weight."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class BertHead(BertPretrained):
    """What models with a head share: the encoder's arguments, then logits, then a loss of labels."""

    bert: BertModel

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> HeadOutput | tuple[Any, ...]:
        """labels: as loss() takes them. The other arguments are BertModel's."""
        out = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_attentions,
            output_hidden_states, return_dict=True,
        )  # fmt: skip
        logits = self.logits(out, attention_mask)
        loss = None if labels is None else self.loss(logits, labels)
        return self.returned(
            HeadOutput(loss, logits, out.hidden_states, out.attentions), return_dict
        )

    def logits(self, out: BertOutput, attention_mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    def of_tokens(self, head: nn.Module, x: Tensor, attention_mask: Tensor | None) -> Tensor:
        """head(x) of x (B, S, E), padding skipped where the encoder skips it."""
        if not self.config.skip_padding:
            return head(x)
        (B, S), H = x.shape[:2], self.config.num_attention_heads
        mask = attention_mask_of("BertModel", attention_mask, B, H, S, S)
        packing = packing_of("BertModel", mask, (B, S))
        return padded(head(packed(x, packing)), packing)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """A class for each token: labels (B, S) int, -100 where it has none; logits (B, S, classes)."""
        return cross_entropy(
            logits, class_labels(type(self).__name__, labels, tuple(logits.shape[:2]))
        )


class BertForMaskedLM(BertHead):
    """Predicts tokens at labels that are not -100."""

    tied: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        predictions = BertPredictions(config)
        self.cls = nn.ModuleDict({"predictions": predictions})
        self.initialise(config)
        if config.tie_word_embeddings:
            predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
        else:  # in transformers' files there is one, which nothing uses
            predictions.bias = nn.Parameter(torch.zeros_like(predictions.decoder.bias))

    def logits(self, out: BertOutput, attention_mask: Tensor | None) -> Tensor:
        head = self.cls["predictions"]
        return self.of_tokens(head, out.last_hidden_state, attention_mask)  # (B, S, V)


class BertForSequenceClassification(BertHead):
    """Labels a text from its pooled first token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 0)
        self.initialise(config)

    def logits(self, out: BertOutput, attention_mask: Tensor | None) -> Tensor:
        return self.classifier(self.dropout(out.pooler_output))  # (B, num_labels)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """labels: (B,) or (B, 1) classes, (B, num_labels) floats for several at once, or (B,) or (B, 1)
        floats to regress: by config.problem_type, or as transformers guesses it."""
        name, B = type(self).__name__, len(logits)
        is_tensor(name, labels=labels)
        kind = self.config.problem_type or guessed_problem(self.config, labels)
        if kind == "single_label_classification":
            return cross_entropy(logits, class_labels(name, labels, (B,), (B, 1)).reshape(B))
        if labels.numel() != logits.numel() or labels.shape[:1] != (B,):
            raise ValueError(
                f"{name}: labels of a {kind} problem must be (B, num_labels) = {tuple(logits.shape)}, "
                f"got {tuple(labels.shape)}"
            )
        labels = labels.reshape(logits.shape).to(logits.dtype)
        loss = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
        return loss(logits, labels)


class BertForTokenClassification(BertHead):
    """Labels every token: named entities, parts of speech."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels or 0)
        self.initialise(config)

    def logits(self, out: BertOutput, attention_mask: Tensor | None) -> Tensor:
        x = self.dropout(out.last_hidden_state)
        return self.of_tokens(self.classifier, x, attention_mask)  # (B, S, num_labels)


def classifier_dropout(config: BertConfig) -> float:
    if config.classifier_dropout is None:
        return config.hidden_dropout_prob
    return config.classifier_dropout


def guessed_problem(config: BertConfig, labels: Tensor) -> str:
    """transformers' guess, from num_labels and the labels' dtype."""
    if config.num_labels == 1:
        return "regression"
    if labels.dtype in (torch.int64, torch.int32):
        return "single_label_classification"
    return "multi_label_classification"
