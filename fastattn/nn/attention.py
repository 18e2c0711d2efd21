"""MultiheadAttention over the fused operator: input projections, attention, output projection."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import attention
from ..ops.sdpa import scaled_dot_product_attention
from ..ops.softmax import softmax


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: same constructor, state_dict, masks and results.

    Masks have torch's meaning here: a True entry is masked. A query that sees no key gives 0 where
    torch gives NaN. need_weights=True, torch's default, needs the whole (L, S) matrix and computes
    it; with need_weights=False attention is fused and nothing of that size exists.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query (L, N, E), key (S, N, kdim), value (S, N, vdim), batch before length if batch_first,
        or unbatched without N. key_padding_mask (N, S), attn_mask (L, S) or (N * num_heads, L, S):
        bool or float (added). Returns (out, weights): weights (N, L, S), (N, num_heads, L, S) unless
        averaged, None unless needed.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "MultiheadAttention: is_causal is a hint about attn_mask: pass attn_mask too"
            )
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = swap_first(query, key, value)
        q, k, v = (self.split_heads(x) for x in self.project(query, key, value))  # (N, H, S, D)
        fused_causal = is_causal and key_padding_mask is None and not need_weights
        added = k.shape[2] - key.shape[1]  # bias_k and the zero key, which every query sees
        mask, bias = self.merged_masks(None if fused_causal else attn_mask, key_padding_mask, added)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = attention_weights(q, k, mask, bias)
            weights = F.dropout(weights, dropout_p) if dropout_p else weights
            out = weights @ v
        elif fused_causal:
            out = scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        else:
            out = attention(q, k, v, mask=mask, bias=bias, dropout_p=dropout_p)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (N, L, E)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three input projections, then bias_k, bias_v and the zero key where asked: (N, S, E)."""
        if self._qkv_same_embed_dim and query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = (
                self.in_proj_weight.chunk(3)
                if self._qkv_same_embed_dim
                else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            )
            biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q, k, v = (
                F.linear(x, w, b)
                for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(len(v), 1, -1)], 1)
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(len(x), 1, x.shape[-1])], 1) for x in (k, v))
        return q, k, v

    def split_heads(self, x: Tensor) -> Tensor:
        """(N, S, E) -> (N, H, S, D), a view."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def merged_masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, added: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """torch's masks as attention's: mask (True attends) from the bool ones, bias from the float."""
        mask, bias = None, None
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, None, None, :]
        for given in (attn_mask, key_padding_mask):
            if given is None:
                continue
            given = F.pad(given, (0, added))
            if given.dtype == torch.bool:
                mask = ~given if mask is None else mask & ~given
            else:
                bias = given if bias is None else bias + given
        return mask, bias


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    """softmax of the scores, whole: (N, H, L, S)."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return softmax(scores if bias is None else scores + bias, mask=mask)


def swap_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(S, N, E) -> (N, S, E), one view for tensors that are one, so that they stay one."""
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    return q, k, k if value is key else value.transpose(0, 1)
