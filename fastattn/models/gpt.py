"""GPT-2 (Radford et al. 2019): a decoder of tokens that see what came before, and its text generation.

    x = token + position;   per layer:   x = x + attention(norm(x));   x = x + mlp(norm(x))

Attention, norms, bias + gelu and the loss are fused; generation appends to a KVCache a layer.
Parameters are named as transformers names them, weights of projections (in, out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..nn import LayerNorm
from ..ops.activation import gelu
from ..ops.attention import attention
from ..ops.cache import KVCache, attention_decode
from ..ops.cross_entropy import cross_entropy
from .checkpoint import Config, PretrainedModel

GELU_FORMS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}


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
        if self.activation_function not in GELU_FORMS:
            raise self.error(
                f"activation_function must be one of {', '.join(GELU_FORMS)}, "
                f"got {self.activation_function!r}"
            )


@dataclass
class GPT2Output:
    """last_hidden_state (B, S, E); past_key_values: a KVCache a layer, when caching."""

    last_hidden_state: Tensor
    past_key_values: list[KVCache] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutput:
    """loss: a scalar, when labels were given; logits (B, S, V)."""

    loss: Tensor | None
    logits: Tensor
    past_key_values: list[KVCache] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Conv1D(nn.Module):
    """A linear layer with its weight (in, out), as GPT-2's checkpoints have it."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.flatten(0, -2), self.weight)
        return flat.unflatten(0, x.shape[:-1])


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

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        qkv = self.c_attn(x).unflatten(-1, (3, self.heads, -1))  # (B, S, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, S, D) each, views
        if cache is None:
            dropout_p = self.dropout_p if self.training else 0.0
            out = attention(q, k, v, causal=True, mask=mask, dropout_p=dropout_p, scale=self.scale)
        else:
            if self.training and self.dropout_p > 0:
                raise ValueError(
                    "GPT2Model: a cache and attention dropout do not go together; call model.eval(), or "
                    "set attn_pdrop to 0"
                )
            cache.append(k, v)
            out = attention_decode(q, cache, mask=mask, scale=self.scale)
        return self.resid_dropout(self.c_proj(out.transpose(1, 2).flatten(2)))


class GPT2MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc, self.c_proj = Conv1D(inner, config.n_embd), Conv1D(config.n_embd, inner)
        self.approximate = GELU_FORMS[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        h = gelu(x @ self.c_fc.weight, bias=self.c_fc.bias, approximate=self.approximate)
        return self.dropout(self.c_proj(h))


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
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
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: list[KVCache] | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
    ) -> GPT2Output:
        """input_ids (B, S) int, or inputs_embeds (B, S, E). attention_mask: (B, past + S), 1 for a token
        and 0 for padding. past_key_values: from new_cache() or an earlier call; with it, or use_cache,
        keys and values are kept, without gradients."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("GPT2Model: give either input_ids or inputs_embeds")
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, S, E)
        B, S = x.shape[:2]
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache(B, self.config.n_positions)
        past = past_key_values[0].longest if past_key_values else 0
        if past + S > self.config.n_positions:
            raise ValueError(
                f"GPT2Model: {past + S} tokens are more than n_positions = {self.config.n_positions}"
            )
        if position_ids is None:
            position_ids = torch.arange(past, past + S, device=x.device)
        mask = self.attention_mask_of(attention_mask, B, past + S, past_key_values)
        x = self.drop(x + self.wpe(position_ids))
        states = [x]
        for layer, block in enumerate(self.h):
            x = block(x, mask, past_key_values[layer] if past_key_values else None)
            states.append(x)
        x = self.ln_f(x)
        if past_key_values and x.requires_grad:
            x.register_hook(refuse_gradient)
        states[-1] = x
        return GPT2Output(x, past_key_values, tuple(states) if output_hidden_states else None)

    @staticmethod
    def attention_mask_of(
        attention_mask: Tensor | None, B: int, length: int, caches: list[KVCache] | None
    ) -> Tensor | None:
        """bool (B, 1, 1, keys), as long as a cache where there is one."""
        if attention_mask is None:
            return None
        if attention_mask.shape != (B, length):
            raise ValueError(
                f"GPT2Model: attention_mask must be (B, past + S) = {(B, length)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        mask = attention_mask.bool()
        if caches:
            mask = nn.functional.pad(mask, (0, caches[0].max_length - length))
        return mask[:, None, None, :]

    def new_cache(self, batch: int, max_length: int, page_size: int | None = None) -> list[KVCache]:
        """An empty KVCache a layer."""
        heads, weight = self.config.n_head, self.wte.weight
        return [
            KVCache(
                batch, heads, self.config.n_embd // heads, max_length=max_length, page_size=page_size,
                dtype=weight.dtype, device=weight.device,
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
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: list[KVCache] | None = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> CausalLMOutput:
        """labels: (B, S) int, input_ids themselves or -100 where no token is to be predicted: token
        t + 1 is predicted from the first t. logits: (B, S, V)."""
        out = self.transformer(
            input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, use_cache,
            output_hidden_states,
        )  # fmt: skip
        logits = self.lm_head(out.last_hidden_state)
        loss = None if labels is None else cross_entropy(logits[:, :-1], labels[:, 1:])
        return CausalLMOutput(loss, logits, out.past_key_values, out.hidden_states)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues input_ids (B, S), greedily or by sampling: (B, S + new), new <= max_new_tokens.

        attention_mask (B, S): 0 where a shorter prompt was padded, on the left. temperature, top_k and
        top_p act when do_sample, in this order. A row that has produced eos_token_id (the config's by
        default) goes on with pad_token_id (eos by default), and all stop when the last one has.
        """
        check_generation(input_ids, max_new_tokens, temperature, top_k, top_p)
        config = self.config
        ends = as_list(config.eos_token_id if eos_token_id is None else eos_token_id)
        pad = next((p for p in (pad_token_id, config.pad_token_id, *ends) if p is not None), 0)
        B, S = input_ids.shape
        if S + max_new_tokens > config.n_positions:
            raise ValueError(
                f"generate: {S} prompt tokens and {max_new_tokens} new ones are more than n_positions = "
                f"{config.n_positions}"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        padded = attention_mask is not None
        past = self.transformer.new_cache(B, S + max_new_tokens) if use_cache else None
        tokens, running = input_ids, torch.ones(B, dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            fresh = tokens if past is None or past[0].longest == 0 else tokens[:, -1:]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
            hidden = self.transformer(
                fresh, mask if padded else None, positions if padded else None, past_key_values=past
            ).last_hidden_state
            logits = self.lm_head(hidden[:, -1]).float()  # (B, V)
            new = (
                sample(logits, temperature, top_k, top_p, generator)
                if do_sample
                else logits.argmax(-1)
            )
            new = torch.where(running, new, pad)
            tokens = torch.cat([tokens, new[:, None]], 1)
            mask = torch.cat([mask, mask.new_ones(B, 1)], 1)
            running = running & ~torch.isin(new, torch.tensor(ends, device=new.device))
            if not running.any():
                break
        return tokens


def refuse_gradient(grad: Tensor) -> Tensor:
    raise ValueError(
        "GPT2Model: keys and values in a cache have no gradient, so a forward pass with past_key_values or "
        "use_cache has no backward pass; call the model without them"
    )


# ---- generation -------------------------------------------------------------------------------


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """A token for each row of logits (B, V)."""
    logits = keep_top_p(keep_top_k(logits / temperature, top_k), top_p)
    return torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]


def keep_top_k(logits: Tensor, k: int | None) -> Tensor:
    """The k largest of each row, the others -inf (Fan et al. 2018)."""
    if k is None:
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


def check_generation(
    input_ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"generate: input_ids must be (B, S) with S > 0, got {tuple(input_ids.shape)}"
        )
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature <= 0:
        raise ValueError(f"generate: temperature must be positive, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1], got {top_p}")
