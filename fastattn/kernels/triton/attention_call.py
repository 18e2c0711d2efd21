"""An attention call as its kernels take it: the schema's arguments as tuples, and the bits of FEATURES."""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles, tune
from .tiles import Dropout, Extras, Heads, Lengths, PerHead, Scale, Scores, Sizes, Stats, Window

LOG2E = 1.4426950408889634
UNLIMITED = 1 << 30  # of a window: more than any length, and no overflow of int32 when added to one


class Call:
    """Arguments by the schema's names (fastattn/ops/attention.py), and what kernels make of them.

    rows: query rows in all heads and sequences. tuples: extras, lengths, sizes, window and scale, as in
    tiles.py.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None,
        alibi_slopes: Tensor | None, sinks: Tensor | None, cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None, key_lengths: Tensor | None, page_table: Tensor | None,
        philox: Tensor | None, scale: float, causal: bool, window_left: int | None,
        window_right: int | None, softcap: float, dropout_p: float, diagonal_at_length: bool,
        max_seqlen_q: int, max_seqlen_k: int,
    ) -> None:  # fmt: skip
        self.query, self.key, self.value = query, key, value
        self.dtype, self.D, self.DV = query.dtype, query.shape[-1], value.shape[-1]
        self.packed, self.paged = cu_seqlens_q is not None, page_table is not None
        self.bias, self.slopes, self.sinks = bias, alibi_slopes, sinks
        Hq, Hkv = query.shape[1], key.shape[2 if self.paged else 1]
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            B = len(cu_seqlens_q) - 1
            Sq = max_seqlen_q or longest(cu_seqlens_q)
            Sk = max_seqlen_k or longest(cu_seqlens_k)
        else:
            B, Sq = query.shape[0], query.shape[2]
            Sk = page_table.shape[1] * key.shape[1] if page_table is not None else key.shape[2]
        self.sizes = Sizes(B, Hq, Hq // max(Hkv, 1), Sq, Sk)
        self.rows = query.shape[0] * Hq * (1 if self.packed else Sq)
        left = UNLIMITED if window_left is None else min(window_left, UNLIMITED)
        right = 0 if causal else UNLIMITED if window_right is None else min(window_right, UNLIMITED)
        self.window = Window(left, right)
        self.dropped = dropout_p > 0 and philox is not None
        self.extras = Extras(
            bias=0 if bias is None else scores(bias),
            mask=0 if mask is None else scores(mask.view(torch.uint8)),
            slopes=0 if alibi_slopes is None else per_head(alibi_slopes),
            sinks=0 if sinks is None else sinks.float().contiguous(),
            softcap=softcap,
            dropout=dropout(philox, dropout_p) if self.dropped else 0,
        )
        self.lengths = Lengths(
            queries=0 if cu_seqlens_q is None else cu_seqlens_q,
            keys=first_given(cu_seqlens_k, key_lengths),
            table=0 if page_table is None else page_table,
            table_batch=0 if page_table is None else page_table.stride(0),
            page_size=key.shape[1] if self.paged else 1,
        )
        self.features = bits(
            LEFT=left < UNLIMITED, RIGHT=right < UNLIMITED, LENGTHS=key_lengths is not None,
            AT_LENGTH=diagonal_at_length and key_lengths is not None, PACKED=self.packed,
            PAGED=self.paged, BIAS=bias is not None, MASK=mask is not None,
            SLOPES=alibi_slopes is not None, SOFTCAP=softcap > 0, SINKS=sinks is not None,
            DROPOUT=self.dropped, SCALE_FIRST=scale <= 0,
            EXACT=query.dtype == torch.float32,
        )  # fmt: skip
        unit = LOG2E if self.features & tiles.MODIFIED.value else scale * LOG2E
        rounded = struct.unpack("f", struct.pack("f", unit))[0]
        self.scale = Scale(scale, rounded, unit - rounded)
        self.tuples = (self.extras, self.lengths, self.sizes, self.window, self.scale)
        # IEEE fp32 unless the user has asked torch for less: torch.set_float32_matmul_precision
        asked = torch.get_float32_matmul_precision() != "highest" and query.device.type != "cpu"
        self.precision = "tf32" if asked else "ieee"

    @property
    def modified(self) -> bool:
        """Whether features take so many registers that other blocks serve better."""
        return self.features & (tiles.HEAVY.value + tiles.PAGED.value) != 0

    def empty_results(self) -> tuple[Tensor, Stats, tuple[Tensor, Tensor]]:
        """out as the operator's fake lays it out, and lse and lse_low."""
        query, shape = self.query, (*self.query.shape[:-1], self.DV)
        if self.packed or query.stride(1) >= query.stride(2):
            out = query.new_empty(shape)
        else:
            B, Hq, Sq, DV = shape
            out = query.new_empty(B, Sq, Hq, DV).transpose(1, 2)
        rows = (shape[1], shape[0]) if self.packed else shape[:-1]
        lse, low = (query.new_empty(rows, dtype=torch.float32) for _ in range(2))
        return out, stats_of(lse, low), (lse, low)

    def key_tensors(self, chosen: tune.Config) -> tuple[tuple[Any, ...], int]:
        """key and value as a kernel reads them, block_n rows at a time, and what FEATURES says of it."""
        if self.paged:
            return (pages(self.key), pages(self.value)), 0
        found, how = as_read((self.key, chosen.block_n), (self.value, chosen.block_n))
        # in registers, to have what lies past a sequence set to 0, tiles spill when their loads have warps
        # of their own
        cleaned = self.features & (tiles.PACKED.value + tiles.LENGTHS.value)
        specialised = how and chosen.specialised and not cleaned
        return found, how + (tiles.SPECIALISED.value if specialised else 0)


def as_read(*tensors: tuple[Tensor, int], pointers: bool = False) -> tuple[tuple[Any, ...], int]:
    """Tensors as a kernel reads them, so many rows at a time: by descriptors where all of them can be."""
    if tune.has_descriptors() and not pointers and all(describable(x) for x, _ in tensors):
        return tuple(descriptor(x, rows) for x, rows in tensors), tiles.DESCRIPTORS.value
    return tuple(heads(x) for x, _ in tensors), 0


def describable(x: Tensor) -> bool:
    """Whether TMA can read it: 16-byte addresses and strides, rows of 16 bytes to 256 elements. Not fp32,
    whose products are the FP32 units': of tiles laid out for tensor cores they spill by the thousand."""
    strides = (stride for size, stride in zip(x.shape[:-1], x.stride(), strict=False) if size > 1)
    return (
        x.element_size() == 2 and x.numel() > 0 and x.data_ptr() % 16 == 0 and 8 <= x.shape[-1] <= 256
        and all(stride % 8 == 0 and stride > 0 for stride in strides)
    )  # fmt: skip


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """(B, H, S, D), or packed (total, H, D) as one sequence: boxes of `rows` whole rows of a head."""
    x = x.transpose(0, 1).unsqueeze(0) if x.dim() == 3 else x
    # a dimension of 1 may have any stride, but TMA wants a multiple of 16 bytes
    strides = [
        8 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]
    box = [1, 1, rows, max(16, next_power_of_2(x.shape[-1]))]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], box)


def bits(**given: bool) -> int:
    return sum(getattr(tiles, name).value for name, present in given.items() if present)


def first_given(*tensors: Tensor | None) -> Tensor | int:
    return next((x for x in tensors if x is not None), 0)


def longest(cu_seqlens: Tensor) -> int:
    """Waits for the device: pass max_seqlen_q and max_seqlen_k where that matters."""
    return int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0


def heads(x: Tensor) -> Heads:
    """(B, H, S, D), or packed (total, H, D)."""
    if x.dim() == 3:
        return Heads(x, 0, x.stride(1), x.stride(0))
    return Heads(x, x.stride(0), x.stride(1), x.stride(2))


def pages(x: Tensor) -> Heads:
    """(pages, page_size, Hkv, D)."""
    return Heads(x, x.stride(0), x.stride(2), x.stride(1))


def stats_of(first: Tensor, second: Tensor) -> Stats:
    """(B, Hq, Sq), or packed (Hq, total)."""
    if first.dim() == 2:
        return Stats(first, second, 0, first.stride(0))
    return Stats(first, second, first.stride(0), first.stride(1))


def scores(x: Tensor) -> Scores:
    """Four dimensions, each 1 or full."""
    strides = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return Scores(x, *strides)


def per_head(x: Tensor) -> PerHead:
    x = x.float().contiguous()
    return PerHead(x, x.stride(0) if x.dim() == 2 else 0)


def dropout(philox: Tensor | None, p: float) -> Dropout:
    return Dropout(philox, int(p * 2**32) if p < 1 else 0, 1 / (1 - p) if p < 1 else 0.0)


def next_power_of_2(n: int) -> int:
    return int(triton.next_power_of_2(n))
