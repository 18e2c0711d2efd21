"""TransformerEncoderLayer of fused pieces: attention, residual and norm in one pass, bias and gelu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.activation import gelu
from .attention import MultiheadAttention, nested_like, padded
from .norm import LayerNorm


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: same constructor, state_dict and results."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first,
            bias, device, dtype,
        )  # fmt: skip
        # torch's children, with the weights that it drew, under the classes whose forward is fused
        self.self_attn.__class__ = MultiheadAttention
        self.norm1.__class__ = self.norm2.__class__ = LayerNorm

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src: (S, N, E), (N, S, E) if batch_first, or (S, E). A nested src is padded and nested again:
        torch.nn.TransformerEncoder makes one of padded batches in inference.
        """
        if src.is_nested:
            return self.forward_nested(src, src_mask, is_causal)
        if self.norm_first:
            x = src + self.attend(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            return x + self.feed_forward(self.norm2(x))
        x = self.norm1(self.attend(src, src_mask, src_key_padding_mask, is_causal), residual=src)
        return self.norm2(self.feed_forward(x), residual=x)

    def attend(
        self, x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> Tensor:
        out, _ = self.self_attn(
            x,
            x,
            x,
            attn_mask=mask,
            key_padding_mask=padding,
            need_weights=False,
            is_causal=is_causal,
        )
        return self.dropout1(out)

    def feed_forward(self, x: Tensor) -> Tensor:
        if self.activation is F.gelu or isinstance(self.activation, torch.nn.GELU):
            approximate = getattr(self.activation, "approximate", "none")
            h = gelu(
                F.linear(x, self.linear1.weight), bias=self.linear1.bias, approximate=approximate
            )
        else:
            h = self.activation(self.linear1(x))
        return self.dropout2(self.linear2(self.dropout(h)))

    def forward_nested(self, src: Tensor, src_mask: Tensor | None, is_causal: bool) -> Tensor:
        x, padding = padded(src)
        return nested_like(src, self.forward(x, src_mask, padding, is_causal))
