"""Philox4x32-10 (Salmon et al., SC 2011), the one source of dropout masks: as reference/philox.py.

The counter of a quad of columns is (column // 4, row, plane, offset); its four words serve column % 4,
and an entry is kept where its word is at least floor(p * 2^32).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOW: tl.constexpr = tl.constexpr(0xFFFFFFFF)


class Dropout(NamedTuple):
    """philox: (seed, offset) in int64; below: what a word must reach; scale: of what is kept."""

    philox: Any
    below: Any
    scale: Any


def dropout(philox: Tensor | None, p: float) -> Dropout | None:
    """p = 1 drops everything, so its scale does not matter."""
    if philox is None or p <= 0:
        return None
    return Dropout(philox.contiguous(), int(p * 2**32), 1 / (1 - p) if p < 1 else 0.0)


@triton.jit
def philox4x32(c0, c1, c2, c3, seed):
    """Four words in uint32 for each counter; the counters are uint32 and broadcast."""
    key0, key1 = seed & LOW, seed >> 32
    for _ in tl.static_range(10):
        # one 32 x 32 -> 64 bit product gives both halves, and cannot overflow
        first, second = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (second >> 32).to(tl.uint32) ^ c1 ^ key0.to(tl.uint32),
            (second & LOW).to(tl.uint32),
            (first >> 32).to(tl.uint32) ^ c3 ^ key1.to(tl.uint32),
            (first & LOW).to(tl.uint32),
        )
        key0, key1 = (key0 + 0x9E3779B9) & LOW, (key1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


@triton.jit
def keep(philox_ptr, rows, plane, columns, drop_below):
    """True where dropout keeps: the tile of rows (M, 1) and columns (1, N), or (1, M) and (N, 1).

    columns must be N neighbours from a multiple of 4, N a power of 2 and at least 4: so one Philox
    serves four. plane: a scalar, or of a shape that broadcasts with rows.
    """
    N: tl.constexpr = columns.numel
    seed = tl.load(philox_ptr).to(tl.uint64)
    offset = (tl.load(philox_ptr + 1) & LOW).to(tl.uint32)
    quads = tl.min(tl.reshape(columns, (N // 4, 4)), 1) // 4
    across: tl.constexpr = columns.shape[0] == 1
    quads = quads[None, :] if across else quads[:, None]
    row = (rows.to(tl.int64) & LOW).to(tl.uint32)
    plane = (plane.to(tl.int64) & LOW).to(tl.uint32)
    a, b, c, d = philox4x32(quads.to(tl.uint32), row, plane, offset, seed)
    # compared first, so that single bits and not words are moved; int64, for 2^32 drops all
    four = tl.join(tl.join(kept(a, drop_below), kept(c, drop_below)),
                   tl.join(kept(b, drop_below), kept(d, drop_below)))  # fmt: skip
    if across:  # (M, N / 4, 2, 2)
        tile = tl.reshape(four, (rows.numel, N))
    else:
        tile = tl.reshape(tl.permute(four, (0, 2, 3, 1)), (N, rows.numel))
    return tile != 0


@triton.jit
def kept(word, drop_below):
    return (word.to(tl.int64) >= drop_below).to(tl.int8)


@triton.jit
def drop(x, rows, plane, columns, dropout):
    """dropout(x), a tile of `keep`'s shape."""
    kept = keep(dropout.philox, rows, plane, columns, dropout.below)
    return tl.where(kept, x * dropout.scale, 0.0)
