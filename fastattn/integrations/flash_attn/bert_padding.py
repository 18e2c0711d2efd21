"""flash_attn.bert_padding: padded (B, S, ...) to packed (total, ...) and back, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import checks
from ._attend import raises_runtime_errors


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """input (rows, ...) at indices (total,): (total, ...)."""
    checks.is_tensor("index_first_axis", input=input, indices=indices)
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...) with values (total, ...) at indices (total,), 0 elsewhere."""
    checks.is_tensor("index_put_first_axis", values=values, indices=indices)
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices.long(), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(index_first_axis(input, indices), input)."""
    return index_first_axis(input, indices), input


@raises_runtime_errors
def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(hidden (total, ...), indices (total,), cu_seqlens (B + 1,) int32, max_seqlen, seqused (B,) int32).

    hidden_states: (B, S, ...). attention_mask: (B, S) bool or int, 1 for a token. unused_mask: likewise, 1
    for room that is not used: it counts in all results but seqused. Waits for a GPU.
    """
    check_mask("unpad_input", hidden_states, "attention_mask", attention_mask)
    kept = attention_mask
    if unused_mask is not None:
        check_mask("unpad_input", hidden_states, "unused_mask", unused_mask)
        kept = attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    seqused = attention_mask.sum(-1, dtype=torch.int32)
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, cu_seqlens_of(lengths), longest(lengths), seqused


@raises_runtime_errors
def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(hidden (total, ...), indices (total,), cu_seqlens (N + 1,) int32, max_seqlen), for N sequences.

    attention_mask_in_length: (B, S) int, whose nonzero entries are the lengths of the sequences that share a
    row, in order: [2, 3, 0, 0, 0, 0] is one of 2 tokens, one of 3 and one token of padding.
    """
    name = "unpad_input_for_concatenated_sequences"
    check_mask(name, hidden_states, "attention_mask_in_length", attention_mask_in_length)
    tokens = attention_mask_in_length.sum(-1, keepdim=True)
    S = attention_mask_in_length.shape[1]
    kept = torch.arange(S, device=tokens.device) < tokens
    indices = kept.flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths != 0]
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, cu_seqlens_of(lengths), longest(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """(batch, seqlen, ...) with hidden_states (total, ...) at unpad_input's indices, 0 elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(
        0, (batch, seqlen)
    )


def cu_seqlens_of(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def longest(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0


def check_mask(name: str, hidden_states: Tensor, argument: str, mask: Tensor) -> None:
    checks.is_tensor(name, hidden_states=hidden_states, **{argument: mask})
    if hidden_states.dim() < 2:
        raise ValueError(
            f"{name}: hidden_states must be (B, S, ...), got {checks.described(hidden_states=hidden_states)}"
        )
    checks.has_shape(name, argument, mask, hidden_states.shape[:2], layout="(B, S)")
