"""GPT-2 (Radford et al. 2019): a decoder of tokens that see what came before, and its text generation.

    x = token + position;   per layer:   x = x + attention(norm(x));   x = x + mlp(norm(x))

Attention (unless its weights are asked for), norms, bias + gelu and the loss are fused; generation
appends to a KVCache a layer.
Parameters are named as transformers names them, weights of projections (in, out).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..nn import LayerNorm
from ..ops.cache import KVCache, attention_decode
from ..ops.checks import dtype_name, is_tensor
from ..ops.cross_entropy import cross_entropy
from .checkpoint import Config, PretrainedModel
from .layers import (
    ACTIVATIONS,
    activated,
    attend,
    attention_mask_of,
    class_labels,
    embedded,
    look_up,
    mask_argument,
)
from .output import ModelOutput, exported

NO_COMPILED_CACHE = (
    "GPT2Model: a cache's lengths are Python ints, so keys and values are appended outside of compiled "
    "graphs: compile without fullgraph=True, or call without use_cache and past_key_values"
)


@dataclass
class GPT2Config(Config):
    """transformers' GPT2Config."""

    model_type: ClassVar[str] = "gpt2"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    only: ClassVar[dict[str, Any]] = {
        "add_cross_attention": False,
        "reorder_and_upcast_attn": False,
        "is_encoder_decoder": False,
    }

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise self.error(
                f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}"
            )
        if self.activation_function not in ACTIVATIONS:
            raise self.error(
                f"activation_function must be one of {', '.join(ACTIVATIONS)}, "
                f"got {self.activation_function!r}"
            )


@exported
@dataclass
class GPT2Output(ModelOutput):
    """last_hidden_state (B, S, E); past_key_values: a KVCache a layer, when caching; hidden_states: one a
    layer, and the first; attentions: (B, H, S, S) a layer."""

    last_hidden_state: Tensor
    past_key_values: list[KVCache] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@exported
@dataclass
class CausalLMOutput(ModelOutput):
    """loss: a scalar, when labels were given; logits (B, S, V)."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: list[KVCache] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Context(NamedTuple):
    """What a pass tells every layer. mask: of attention_mask_of; weights: a list that gets them."""

    mask: Tensor | None
    causal: bool
    weights: list[Tensor] | None


class Conv1D(nn.Module):
    """A linear layer with its weight (in, out), as GPT-2's checkpoints have it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.flatten(0, -2), self.weight)
        return flat.unflatten(0, x.shape[:-1])

    def product(self, x: Tensor) -> Tensor:
        """forward without the bias, for the activation that adds it."""
        return x @ self.weight


class GPT2Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        E, self.heads = config.n_embd, config.n_head
        self.c_attn, self.c_proj = Conv1D(3 * E, E), Conv1D(E, E)
        self.dropout_p = config.attn_pdrop
        self.resid_dropout = nn.Dropout(config.resid_pdrop)
        self.scale = (E // self.heads) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(self, x: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        qkv = self.c_attn(x).unflatten(-1, (3, self.heads, -1))  # (B, S, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, S, D) each, views
        mask, causal, weights = context
        if cache is not None:
            if self.training and self.dropout_p > 0:
                raise ValueError(
                    "GPT2Model: a cache and attention dropout do not go together; call model.eval(), or "
                    "set attn_pdrop to 0"
                )
            out = attend_past(q, k, v, cache, mask, causal, self.scale)
        else:
            dropout_p = self.dropout_p if self.training else 0.0
            out = attend(
                q, k, v, mask, causal=causal, dropout_p=dropout_p, scale=self.scale, weights=weights
            )
        return self.resid_dropout(self.c_proj(out.transpose(1, 2).flatten(2)))


@torch.compiler.disable(reason=NO_COMPILED_CACHE)
def attend_past(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """Attention of the new tokens, in the cache as well from now on, over all that it holds."""
    dtype = cache.key.dtype  # autocast may have been otherwise when the cache was made
    cache.append(k.to(dtype), v.to(dtype))
    return attention_decode(q, cache, causal=causal, scale=scale, **mask_argument(mask))


@torch.compiler.disable(reason=NO_COMPILED_CACHE)
def tokens_held(caches: list[KVCache]) -> int:
    return caches[0].longest


class GPT2MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc, self.c_proj = Conv1D(inner, config.n_embd), Conv1D(config.n_embd, inner)
        self.act = config.activation_function
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(activated(self.act, self.c_fc, x)))


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), context, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2Pretrained(PretrainedModel):
    config_class = GPT2Config
    base = "transformer"

    def initialise(self, config: GPT2Config) -> None:
        self.config = config
        for name, module in self.named_modules():
            if isinstance(module, (Conv1D, nn.Linear, nn.Embedding)):
                # the residual stream sums 2 * n_layer projections: each is that much smaller
                share = (2 * config.n_layer) ** -0.5 if name.endswith("c_proj") else 1.0
                nn.init.normal_(module.weight, 0.0, config.initializer_range * share)


class GPT2Model(GPT2Pretrained):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.initialise(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: list[KVCache] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> GPT2Output | tuple[Any, ...]:
        """input_ids (B, S) int, or inputs_embeds (B, S, E). attention_mask: (B, past + S) or
        (B, S, past + S), 1 for a token and 0 for padding, or 4-D (B, 1 or H, 1 or S, past + S), bool (True
        may attend) or float (added), which then also says what is causal. token_type_ids (B, S): tokens
        whose embeddings are added. past_key_values: from new_cache() or an earlier call; with it, or
        use_cache, keys and values are kept, without gradients. Other switches left None are the config's;
        output_attentions needs the whole weights, and no cache; return_dict=False gives a tuple."""
        x = embedded("GPT2Model", self.wte, input_ids, inputs_embeds)  # (B, S, E)
        B, S = x.shape[:2]
        if past_key_values is None and self.switch("use_cache", use_cache or False):
            past_key_values = self.new_cache(B, self.config.n_positions)
        past = self.past_tokens(past_key_values, S)
        context = self.context(x, attention_mask, past, past_key_values, output_attentions)
        if position_ids is None:
            position_ids = torch.arange(past, past + S, device=x.device)
        x = x + look_up("GPT2Model", "position_ids", self.wpe, position_ids, (B, S))
        if token_type_ids is not None:
            x = x + look_up("GPT2Model", "token_type_ids", self.wte, token_type_ids, (B, S))
        x = self.drop(x)
        states = [x]
        for layer, block in enumerate(self.h):
            x = block(x, context, past_key_values[layer] if past_key_values else None)
            states.append(x)
        states[-1] = x = self.ln_f(x)
        if past_key_values and x.requires_grad:
            x.register_hook(refuse_gradient)
        kept = tuple(states) if self.switch("output_hidden_states", output_hidden_states) else None
        attentions = None if context.weights is None else tuple(context.weights)
        return self.returned(GPT2Output(x, past_key_values, kept, attentions), return_dict)

    def past_tokens(self, caches: list[KVCache] | None, S: int) -> int:
        """How many tokens came before, with room for S more."""
        if caches is not None and (
            not isinstance(caches, (list, tuple))
            or len(caches) != len(self.h)
            or any(not isinstance(cache, KVCache) for cache in caches)
        ):
            raise TypeError(
                f"GPT2Model: past_key_values must be {len(self.h)} KVCache, from new_cache() or an earlier "
                f"call, got {type(caches).__name__}"
            )
        past = tokens_held(caches) if caches else 0
        if past + S > self.config.n_positions:
            raise ValueError(
                f"GPT2Model: {past + S} tokens are more than n_positions = {self.config.n_positions}"
            )
        return past

    def context(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        past: int,
        caches: list[KVCache] | None,
        output_attentions: bool | None,
    ) -> Context:
        """The mask, as long as a cache where there is one, and a list for the weights."""
        B, S = x.shape[:2]
        wanted = self.switch("output_attentions", output_attentions)
        if wanted and caches:
            raise ValueError(
                "GPT2Model: output_attentions and a cache do not go together; call without "
                "past_key_values and use_cache"
            )
        mask = attention_mask_of("GPT2Model", attention_mask, B, self.config.n_head, S, past + S)
        causal = attention_mask is None or attention_mask.dim() != 4
        if mask is not None and caches and mask.shape[-1] > 1:
            mask = nn.functional.pad(mask, (0, caches[0].max_length - mask.shape[-1]))
        return Context(mask, causal, [] if wanted else None)

    def new_cache(self, batch: int, max_length: int, page_size: int | None = None) -> list[KVCache]:
        """An empty KVCache a layer, in the dtype of the keys that will come: autocast's, where it is on."""
        heads, weight = self.config.n_head, self.wte.weight
        device, dtype = weight.device, weight.dtype
        kind = device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return [
            KVCache(
                batch, heads, self.config.n_embd // heads, max_length=max_length, page_size=page_size,
                dtype=dtype, device=device,
            )
            for _ in self.h
        ]  # fmt: skip


class GPT2LMHeadModel(GPT2Pretrained):
    """GPT-2 with logits over the vocabulary, by the token embedding's weight."""

    tied: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.initialise(config)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: list[KVCache] | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput | tuple[Any, ...]:
        """labels: (B, S) int, input_ids themselves or -100 where no token is to be predicted: token
        t + 1 is predicted from the first t. logits: (B, S, V), or those of the last logits_to_keep tokens
        unless that is 0, or of the tokens that it lists, (n,) int. The rest are GPT2Model's."""
        out = self.transformer(
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids, inputs_embeds,
            use_cache=use_cache, output_attentions=output_attentions,
            output_hidden_states=output_hidden_states, return_dict=True,
        )  # fmt: skip
        logits = self.lm_head(kept_tokens(out.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            if isinstance(logits_to_keep, Tensor) or logits_to_keep:
                raise ValueError(
                    "GPT2LMHeadModel: labels need every logit: logits_to_keep must be 0"
                )
            labels = class_labels("GPT2LMHeadModel", labels, tuple(logits.shape[:2]))
            loss = cross_entropy(logits[:, :-1], labels[:, 1:])
        output = CausalLMOutput(
            loss, logits, out.past_key_values, out.hidden_states, out.attentions
        )
        return self.returned(output, return_dict)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float | None = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        use_cache: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues input_ids (B, S), greedily or by sampling: (B, S + new), new <= max_new_tokens.

        attention_mask (B, S): 0 where a shorter prompt was padded, on the left. temperature, top_k and
        top_p act when do_sample, in this order; None, and a top_k of 0, are off. A row that has produced
        eos_token_id (the config's by default) goes on with pad_token_id (eos by default), and all stop
        when the last one has. use_cache: the config's by default.
        """
        check_prompt(input_ids, attention_mask, max_new_tokens, self.config.n_positions)
        choice = Choice(
            self.switch("do_sample", do_sample or False), temperature, top_k, top_p, generator
        )
        choice.check()
        ends = as_list(self.config.eos_token_id if eos_token_id is None else eos_token_id)
        pad = next((p for p in (pad_token_id, self.config.pad_token_id, *ends) if p is not None), 0)
        B, S = input_ids.shape
        cached = self.switch("use_cache", use_cache)
        past = self.transformer.new_cache(B, S + max_new_tokens) if cached else None
        tokens, running = input_ids, torch.ones(B, dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            new = choice.of(self.next_logits(tokens, attention_mask, past))
            new = torch.where(running, new, pad)
            tokens = torch.cat([tokens, new[:, None]], 1)
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask, attention_mask.new_ones(B, 1)], 1)
            running = running & ~torch.isin(new, torch.tensor(ends, device=new.device))
            if not running.any():
                break
        return tokens

    def next_logits(
        self, tokens: Tensor, attention_mask: Tensor | None, past: list[KVCache] | None
    ) -> Tensor:
        """(B, V) of the token after tokens (B, S), of which a cache holds all but the last or none."""
        fresh = tokens[:, -1:] if past is not None and tokens_held(past) else tokens
        positions = None
        if attention_mask is not None:  # padding on the left has no position
            counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            positions = counted[:, -fresh.shape[1] :]
        hidden = self.transformer(
            fresh, past, attention_mask, position_ids=positions, return_dict=True,
            output_attentions=False, output_hidden_states=False,
        ).last_hidden_state  # fmt: skip
        return self.lm_head(hidden[:, -1]).float()


def kept_tokens(x: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Of x (B, S, E): all for 0, the last n, or those that a tensor (n,) lists."""
    got: object = logits_to_keep
    if isinstance(logits_to_keep, Tensor):
        got = f"{dtype_name(logits_to_keep.dtype)} {tuple(logits_to_keep.shape)}"
        if logits_to_keep.dim() == 1 and logits_to_keep.dtype in (torch.int32, torch.int64):
            return x[:, logits_to_keep]
    elif isinstance(logits_to_keep, int) and logits_to_keep >= 0:
        return x[:, -logits_to_keep:] if logits_to_keep else x
    raise ValueError(
        "GPT2LMHeadModel: logits_to_keep must be an int of at least 0 or a tensor (n,) of ints, "
        f"got {got}"
    )


def refuse_gradient(grad: Tensor) -> Tensor:
    raise ValueError(
        "GPT2Model: keys and values in a cache have no gradient, so a forward pass with past_key_values or "
        "use_cache has no backward pass; call the model without them"
    )


# ---- generation -------------------------------------------------------------------------------


class Choice(NamedTuple):
    """How a token is chosen from logits."""

    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def of(self, logits: Tensor) -> Tensor:
        """A token for each row of logits (B, V)."""
        if not self.do_sample:
            return logits.argmax(-1)
        scaled = logits if self.temperature is None else logits / self.temperature
        kept = keep_top_p(keep_top_k(scaled, self.top_k), self.top_p)
        return torch.multinomial(torch.softmax(kept, -1), 1, generator=self.generator)[:, 0]

    def check(self) -> None:
        t, k, p = self.temperature, self.top_k, self.top_p
        if t is not None and (not is_number(t) or not 0 < t < math.inf):
            raise ValueError(f"generate: temperature must be a positive number or None, got {t!r}")
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 0):
            raise ValueError(f"generate: top_k must be at least 1, or 0 or None for all, got {k!r}")
        if p is not None and (not is_number(p) or not 0 < p <= 1):
            raise ValueError(f"generate: top_p must be in (0, 1] or None, got {p!r}")
        idle = {"temperature": t not in (None, 1), "top_k": bool(k), "top_p": p not in (None, 1)}
        names = [name for name, given in idle.items() if given]
        if names and not self.do_sample:  # 4: past torch.no_grad's frame, to the caller's
            warnings.warn(
                f"generate: {' and '.join(names)} act only with do_sample=True", stacklevel=4
            )


def keep_top_k(logits: Tensor, k: int | None) -> Tensor:
    """The k largest of each row, or all for 0, the others -inf (Fan et al. 2018)."""
    if not k:
        return logits
    smallest = logits.topk(min(k, logits.shape[-1]), -1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float | None) -> Tensor:
    """The fewest tokens that hold p of the probability, the others -inf (Holtzman et al. 2020)."""
    if p is None or p >= 1:
        return logits
    ordered, order = logits.sort(-1)  # ascending
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - p
    drop[..., -1] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)


def as_list(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def check_prompt(
    input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, n_positions: int
) -> None:
    is_tensor("generate", input_ids=input_ids)
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"generate: input_ids must be (B, S) with S > 0, got {tuple(input_ids.shape)}"
        )
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1 or max_new_tokens is True:
        raise ValueError(
            f"generate: max_new_tokens must be an int of at least 1, got {max_new_tokens!r}"
        )
    S = input_ids.shape[1]
    if S + max_new_tokens > n_positions:
        raise ValueError(
            f"generate: {S} prompt tokens and {max_new_tokens} new ones are more than n_positions = "
            f"{n_positions}"
        )
    if attention_mask is None:
        return
    is_tensor("generate", attention_mask=attention_mask)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"generate: attention_mask must be (B, S) = {tuple(input_ids.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    if (
        not attention_mask[:, -1].bool().all()
    ):  # a loop that asks whether rows run may ask this, too
        raise ValueError(
            "generate: attention_mask must end in 1 in every row, for the last token is what is continued; "
            "pad on the left"
        )
