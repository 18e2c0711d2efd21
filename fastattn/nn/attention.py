"""MultiheadAttention over the fused operator: input projections, attention, output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention import attention
from ..ops.checks import described, dtype_name
from ..ops.sdpa import scaled_dot_product_attention
from ..ops.softmax import softmax


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: same constructor, state_dict, masks, results and kinds of errors.

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
        averaged, None unless needed. A query nested as (N, L, E), key and value too, gives a nested out.
        """
        if query.is_nested:
            check_nested(query, key, value, key_padding_mask, self.batch_first)
            x, padding = padded(query)
            out, weights = self.attend(x, x, x, padding, need_weights, attn_mask, False)
            out = nested_like(query, out)
        else:
            batched = check_inputs(query, key, value, key_padding_mask, attn_mask, is_causal)
            if not batched:
                query, key, value = with_batch(query, key, value)
                key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
            elif not self.batch_first:
                query, key, value = batch_before_length(query, key, value)
            out, weights = self.attend(
                query, key, value, key_padding_mask, need_weights, attn_mask, is_causal
            )
            if batched and not self.batch_first:
                out = out.transpose(0, 1)
            elif not batched:
                out, weights = out.squeeze(0), None if weights is None else weights.squeeze(0)
        if weights is not None and average_attn_weights:
            weights = weights.mean(-3)
        return out, weights

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """(out, weights) of a batch, (N, L, E) and (N, num_heads, L, S), without weights where possible."""
        is_causal = is_causal and key_padding_mask is None and not need_weights
        if is_causal:
            attn_mask = None  # the hint's word is taken, as torch takes it
        self.check_shapes(query, key, value, key_padding_mask, attn_mask)
        q, k, v = (self.split_heads(x) for x in self.project(query, key, value))  # (N, H, S, D)
        added = k.shape[2] - key.shape[1]  # bias_k and the zero key, which every query sees
        mask, bias = self.merged_masks(attn_mask, key_padding_mask, added)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = explicit_attention(q, k, v, mask=mask, bias=bias, dropout_p=dropout_p)
        elif is_causal:
            out = scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        else:
            out = attention(q, k, v, mask=mask, bias=bias, dropout_p=dropout_p)
        return self.out_proj(out.transpose(1, 2).flatten(2)), weights

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

    def check_shapes(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> None:
        """Of a batch, (N, L, E), with torch's kinds of exceptions."""
        got = described(query=query, key=key, value=value)
        N, L, S = len(query), query.shape[1], key.shape[1]
        widths = (self.embed_dim, self.kdim, self.vdim)
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != widths:
            raise AssertionError(
                f"MultiheadAttention: query, key and value must have {widths} features, got {got}"
            )
        if key.shape[:2] != value.shape[:2]:
            raise AssertionError(
                f"MultiheadAttention: key and value must have one batch and length, got {got}"
            )
        if len(key) != N:
            raise RuntimeError(f"MultiheadAttention: query and key must have one batch, got {got}")
        if key_padding_mask is not None and key_padding_mask.shape != (N, S):
            raise AssertionError(
                f"MultiheadAttention: key_padding_mask must be (N, S) = {(N, S)}, "
                f"got {tuple(key_padding_mask.shape)}"
            )
        shapes = {2: (L, S), 3: (N * self.num_heads, L, S)}
        if attn_mask is not None and attn_mask.shape != shapes[attn_mask.dim()]:
            raise RuntimeError(
                f"MultiheadAttention: attn_mask must be (L, S) = {shapes[2]} or "
                f"(N * num_heads, L, S) = {shapes[3]}, got {tuple(attn_mask.shape)}"
            )


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> bool:
    """Numbers of dimensions and dtypes, with torch's kinds of exceptions; whether there is a batch."""
    name = "MultiheadAttention"
    dims = query.dim()
    if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
        raise AssertionError(
            f"{name}: query, key and value must all be batched (3-D) or all unbatched (2-D), "
            f"got {described(query=query, key=key, value=value)}"
        )
    if key_padding_mask is not None and key_padding_mask.dim() != dims - 1:
        raise AssertionError(
            f"{name}: key_padding_mask must be {dims - 1}-D beside a {dims}-D query, "
            f"got {tuple(key_padding_mask.shape)}"
        )
    if attn_mask is not None and attn_mask.dim() not in (2, 3):
        raise AssertionError(
            f"{name}: attn_mask must be (L, S) or (N * num_heads, L, S), got {tuple(attn_mask.shape)}"
        )
    for which, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
        if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
            raise AssertionError(
                f"{name}: {which} must be bool (True is masked) or float (added), "
                f"got {dtype_name(mask.dtype)}"
            )
    if is_causal and attn_mask is None:
        raise RuntimeError(f"{name}: is_causal is a hint about attn_mask: pass attn_mask too")
    return dims == 3


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """attention() and its weights (N, H, L, S), which the fused one never holds; after dropout."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = softmax(scores if bias is None else scores + bias, mask=mask, causal=causal)
    weights = F.dropout(weights.to(v.dtype), dropout_p)
    return weights @ v, weights


# ---- layouts ------------------------------------------------------------------------------------


def with_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(S, E) -> (1, S, E), one view for tensors that are one, so that they stay one."""
    q = query.unsqueeze(0)
    k = q if key is query else key.unsqueeze(0)
    return q, k, k if value is key else value.unsqueeze(0)


def batch_before_length(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(S, N, E) -> (N, S, E), one view for tensors that are one."""
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    return q, k, k if value is key else value.transpose(0, 1)


def check_nested(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, batch_first: bool
) -> None:
    if query is not key or key is not value or key_padding_mask is not None or not batch_first:
        raise AssertionError(
            "MultiheadAttention: a nested query must be key and value too, with batch_first=True and "
            "without key_padding_mask, for it knows its lengths"
        )


def padded(nested: Tensor) -> tuple[Tensor, Tensor]:
    """(N, S, E) with zeros behind each sequence, and a mask (N, S), True there."""
    lengths = torch.tensor([len(s) for s in nested.unbind()], device=nested.device)
    x = torch.nested.to_padded_tensor(nested, 0.0)
    return x, torch.arange(x.shape[1], device=x.device) >= lengths[:, None]


def nested_like(nested: Tensor, x: Tensor) -> Tensor:
    """x (N, S, E) cut to the lengths of the sequences of `nested`."""
    cut = [row[: len(s)] for row, s in zip(x, nested.unbind(), strict=True)]
    return torch.nested.as_nested_tensor(cut, layout=nested.layout)
