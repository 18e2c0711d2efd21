"""flash_attn.utils.generation: what its modules need to generate token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class InferenceParams:
    """Where generation stands, and every layer's keys and values.

    seqlen_offset: tokens held, of every sequence; lengths_per_sample (B,) int32: of each by itself, which
    goes first where given. key_value_memory_dict: layer_idx -> (max_batch_size, max_seqlen, 2, Hkv, D), made
    by the first forward. batch_size_offset: the first row of it that a forward's batch takes.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[Any, Tensor] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
