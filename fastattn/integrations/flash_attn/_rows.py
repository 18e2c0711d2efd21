"""Some tokens of each sequence, out of packed rows or pages, as a packed tensor of their own.

This is how seqused_*, leftpad and a block_table reach the packed operator, which takes whole sequences: by
one gather, through which gradients flow, and one wait for a GPU, to learn how many rows there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...ops import checks


class Rows(NamedTuple):
    """at (total,), the places of the rows chosen, and cu_seqlens (B + 1,) int32 of what they make."""

    at: Tensor
    cu_seqlens: Tensor

    def take(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.at)

    def put(self, x: Tensor, rows: int, fill: float, dim: int = 0) -> Tensor:
        """x's rows where they came from, along dim; fill elsewhere."""
        shape = [rows if d == dim else n for d, n in enumerate(x.shape)]
        return x.new_full(shape, fill).index_copy(dim, self.at, x)


def rows(
    starts: Tensor, lengths: Tensor, page_table: Tensor | None = None, page_size: int = 1
) -> Rows:
    """Rows starts[b] to starts[b] + lengths[b] of each sequence; in pages, starts counts within b's."""
    starts, lengths = starts.long(), lengths.long()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    total = int(cu_seqlens[-1])
    sequence = torch.repeat_interleave(lengths, output_size=total)
    index = torch.arange(total, device=starts.device) - (cu_seqlens[:-1] - starts)[sequence]
    if page_table is not None:
        page = page_table.long()[sequence, index // page_size]
        index = page * page_size + index % page_size
    return Rows(index, cu_seqlens.int())


def used(name: str, argument: str, cu_seqlens: Tensor, seqused: Tensor) -> Rows:
    """The first seqused[b] rows of each packed sequence."""
    checks.is_tensor(name, **{argument: seqused})
    checks.is_integer(name, **{argument: seqused})
    lengths = cu_seqlens.diff()
    checks.has_shape(name, argument, seqused, lengths.shape, layout="(B,)")
    if checks.can_read(seqused, cu_seqlens) and ((seqused < 0) | (seqused > lengths)).any():
        raise ValueError(
            f"{name}: {argument} must be in [0, the sequence's length], got {seqused.tolist()} "
            f"for lengths {lengths.tolist()}"
        )
    return rows(cu_seqlens[:-1], seqused)


def check_page_table(name: str, page_table: Tensor, pages: Tensor, B: int, lengths: Tensor) -> None:
    """page_table (B, max_pages) names pages (pages, page_size, Hkv, D) wherever lengths (B,) reach."""
    checks.is_tensor(name, block_table=page_table)
    checks.is_integer(name, block_table=page_table)
    checks.has_dims(name, "block_table", page_table, 2, layout="(B, max_pages)")
    if len(page_table) != B:
        raise ValueError(
            f"{name}: block_table must have a row for each of B = {B} sequences, got {len(page_table)}"
        )
    if not checks.can_read(page_table, lengths):
        return
    count, page_size = pages.shape[:2]
    capacity = page_table.shape[1] * page_size
    if (lengths > capacity).any():
        raise ValueError(
            f"{name}: block_table has room for {capacity} tokens a sequence ({page_table.shape[1]} pages "
            f"of {page_size}), the lengths are {lengths.tolist()}"
        )
    slots = torch.arange(page_table.shape[1]) * page_size
    wrong = (slots < lengths[:, None]) & ((page_table < 0) | (page_table >= count))
    if wrong.any():
        raise ValueError(
            f"{name}: block_table must name pages in [0, {count}), got {int(page_table[wrong][0])}"
        )
