"""What the attention kernels share: tensors as tuples, positions, tiles of rows, and every feature.

Helpers take indices already shaped for the tile, (M, 1) beside (1, N) or the transpose, and so serve
forward, backward and the bias's gradient alike. FEATURES is a constexpr of the bits below: what a call
does not use is not compiled, and a kernel with none of MODIFIED is the plain form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .philox import keep

# how positions limit what is seen
LEFT = tl.constexpr(1)  # a left window
RIGHT = tl.constexpr(2)  # a right window, or causal
LENGTHS = tl.constexpr(4)  # key_lengths
AT_LENGTH = tl.constexpr(8)  # the diagonal ends at key_lengths
PACKED = tl.constexpr(16)
PAGED = tl.constexpr(32)
# what changes scores or weights
BIAS = tl.constexpr(64)
MASK = tl.constexpr(128)
SLOPES = tl.constexpr(256)
SOFTCAP = tl.constexpr(512)
SINKS = tl.constexpr(1024)
DROPOUT = tl.constexpr(2048)
SCALE_FIRST = tl.constexpr(
    4096
)  # a scale of 0 or less: the largest product is not the largest score
EXACT = tl.constexpr(32768)  # fp32: exponents to the last bit, for another FMA
# how K and V are read
DESCRIPTORS = tl.constexpr(8192)  # by tensor descriptors (TMA)
SPECIALISED = tl.constexpr(16384)  # by warps of their own

# scores are multiplied by scale and changed before their maximum is taken
MODIFIED = tl.constexpr(64 + 128 + 256 + 512 + 4096)
# what costs so many registers and instructions that masking every tile costs little beside it
HEAVY = tl.constexpr(64 + 128 + 256 + 512 + 2048)

LOG2E = tl.constexpr(1.4426950408889634)
# log(2) in two floats
LN2 = tl.constexpr(0.6931471824645996)
LN2_LOW = tl.constexpr(-1.904654299957768e-09)


class Heads(NamedTuple):
    """(B, H, S, D) with a contiguous last dimension: strides in elements. Packed: batch is 0. Pages of
    a cache: batch is a page's stride, row a token's inside it."""

    ptr: Any
    batch: Any
    head: Any
    row: Any


class Scores(NamedTuple):
    """A tensor that broadcasts to (B, Hq, Sq, Sk): strides are 0 where it does."""

    ptr: Any
    batch: Any
    head: Any
    row: Any
    col: Any


class PerHead(NamedTuple):
    """(Hq,) or (B, Hq): batch is the stride of B."""

    ptr: Any
    batch: Any


class Stats(NamedTuple):
    """Two fp32 numbers a row, each contiguous (B, Hq, Sq) or packed (Hq, total)."""

    first: Any
    second: Any
    batch: Any
    head: Any


class Dropout(NamedTuple):
    philox: Any  # (seed, offset)
    drop_below: Any
    keep_scale: Any


class Extras(NamedTuple):
    """Of what FEATURES has; 0 stands for what is absent."""

    bias: Any
    mask: Any
    slopes: Any
    sinks: Any
    softcap: Any
    dropout: Any


class Lengths(NamedTuple):
    """cu_seqlens of a packed call, key_lengths of a dense one, pages of a cache."""

    queries: Any
    keys: Any
    table: Any  # (B, max_pages)
    table_batch: Any
    page_size: Any


class Sizes(NamedTuple):
    B: Any
    Hq: Any
    group: Any  # Hq / Hkv
    Sq: Any
    Sk: Any


class Window(NamedTuple):
    left: Any
    right: Any


class Scale(NamedTuple):
    """unit + unit_low: from the unit in which the maximum is taken to log2, in two floats."""

    natural: Any
    unit: Any
    unit_low: Any


class Spec(NamedTuple):
    """All of these, in one. Made inside a kernel: Triton 3.6 would pass each 1 in it as None."""

    extras: Any
    lengths: Any
    sizes: Any
    window: Any
    scale: Any


class Sequence(NamedTuple):
    """One sequence of the batch. Key j is on the diagonal of query i where j = i + diagonal."""

    b: Any  # int64
    query_start: Any
    key_start: Any
    Sq: Any
    Sk: Any  # keys that may be read
    diagonal: Any


class Rows(NamedTuple):
    """Query head, query index, and whether there is such a row, for each row of a block."""

    head: Any
    query: Any
    inside: Any


@triton.jit
def sequence_of(b, lengths, sizes, FEATURES: tl.constexpr):
    if PACKED & FEATURES:
        query_start = tl.load(lengths.queries + b).to(tl.int64)
        key_start = tl.load(lengths.keys + b).to(tl.int64)
        Sq = (tl.load(lengths.queries + b + 1) - query_start).to(tl.int32)
        Sk = (tl.load(lengths.keys + b + 1) - key_start).to(tl.int32)
        return Sequence(b.to(tl.int64), query_start, key_start, Sq, Sk, Sk - Sq)
    else:
        Sk = sizes.Sk
        if LENGTHS & FEATURES:
            Sk = tl.load(lengths.keys + b)
        if AT_LENGTH & FEATURES:
            return Sequence(b.to(tl.int64), 0, 0, sizes.Sq, Sk, Sk - sizes.Sq)
        else:
            return Sequence(b.to(tl.int64), 0, 0, sizes.Sq, Sk, sizes.Sk - sizes.Sq)


@triton.jit
def rows_of(block, first_head, s, TOGETHER: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of a block of one head, or of the TOGETHER heads that share keys, one after the other."""
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if TOGETHER == 1:
        return Rows(tl.zeros_like(row) + first_head, row, row < s.Sq)
    else:
        member = tl.minimum(row // s.Sq, TOGETHER - 1)  # rows that do not exist have a head too
        return Rows(first_head + member, row % s.Sq, row < TOGETHER * s.Sq)


@triton.jit
def visible(query, key, s, window, FEATURES: tl.constexpr):
    """Where a query sees a key by position: causal is a right window of 0."""
    distance = query + s.diagonal - key
    seen = key < s.Sk
    if LEFT & FEATURES:
        seen = seen & (distance <= window.left)
    if RIGHT & FEATURES:
        seen = seen & (distance >= -window.right)
    return seen


@triton.jit
def seen_keys(low, high, s, window, FEATURES: tl.constexpr):
    """start and end of the keys that some of queries low to high see, and of those that all see."""
    start, end, all_start, all_end = 0, s.Sk, 0, s.Sk
    if LEFT & FEATURES:
        start = tl.maximum(0, low + s.diagonal - window.left)
        all_start = tl.maximum(0, high + s.diagonal - window.left)
    if RIGHT & FEATURES:
        end = tl.minimum(s.Sk, high + s.diagonal + window.right + 1)
        all_end = tl.minimum(s.Sk, low + s.diagonal + window.right + 1)
    return start, end, all_start, all_end


# ---- tiles of rows ------------------------------------------------------------------------------


@triton.jit
def key_rows(x, lengths, s, head, start, end, D: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr,
             FEATURES: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """(BLOCK, COLS) rows from `start` of keys or values; 0 past D, and from `end` on where MASKED."""
    n, d = tl.arange(0, BLOCK), tl.arange(0, COLS)
    if DESCRIPTORS & FEATURES:
        tile = box(x, s, head, s.key_start + start, BLOCK, COLS, FEATURES)
        if (
            MASKED and ((PACKED + LENGTHS) & FEATURES) != 0
        ):  # what lies past may be NaN; else it is 0
            tile = tl.where((start + n < end)[:, None], tile, 0.0)
        return tile
    elif PAGED & FEATURES:
        inside = start + n < end
        slot, row = (start + n) // lengths.page_size, (start + n) % lengths.page_size
        page = tl.load(lengths.table + s.b * lengths.table_batch + slot, mask=inside, other=0)
        offsets = (
            page.to(tl.int64) * x.batch + row.to(tl.int64) * x.row + head.to(tl.int64) * x.head
        )
        return load_tile(
            x.ptr + offsets[:, None] + d[None, :], inside[:, None], d[None, :], D, COLS, True
        )
    else:
        first = x.ptr + s.b * x.batch + head.to(tl.int64) * x.head + (s.key_start + start) * x.row
        ptrs = first + (n.to(tl.int64)[:, None] * x.row + d[None, :])
        return load_tile(ptrs, (start + n < end)[:, None], d[None, :], D, COLS, MASKED)


@triton.jit
def box(x, s, head, row, BLOCK: tl.constexpr, COLS: tl.constexpr, FEATURES: tl.constexpr):
    """(BLOCK, COLS) by a descriptor; 0 outside the tensor."""
    if PACKED & FEATURES:  # one sequence, as the descriptor sees it
        return x.load([0, head, row.to(tl.int32), 0]).reshape(BLOCK, COLS)
    else:
        return x.load([s.b.to(tl.int32), head, row, 0]).reshape(BLOCK, COLS)


@triton.jit
def load_tile(ptrs, inside, d, D: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr):
    if MASKED and D < COLS:
        return tl.load(ptrs, mask=inside & (d < D), other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=inside, other=0.0)
    elif D < COLS:
        return tl.load(ptrs, mask=d < D, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def query_pointers(x, s, rows, COLS: tl.constexpr):
    """(BLOCK_M, COLS) pointers to the rows of a tensor laid out as the query is."""
    at = s.b * x.batch + rows.head.to(tl.int64) * x.head + (s.query_start + rows.query) * x.row
    return x.ptr + at[:, None] + tl.arange(0, COLS)[None, :]


@triton.jit
def query_rows(x, s, rows, D: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr):
    """(BLOCK_M, COLS) rows of the query, or of a tensor laid out alike; 0 past D, and where there is
    none if MASKED."""
    d = tl.arange(0, COLS)[None, :]
    return load_tile(query_pointers(x, s, rows, COLS), rows.inside[:, None], d, D, COLS, MASKED)


@triton.jit
def store_rows(x, s, rows, tile, D: tl.constexpr, COLS: tl.constexpr):
    d = tl.arange(0, COLS)[None, :]
    keep = rows.inside[:, None] & (d < D)
    tl.store(query_pointers(x, s, rows, COLS), tile.to(x.ptr.dtype.element_ty), mask=keep)


@triton.jit
def stat_offsets(x, s, rows):
    return s.b * x.batch + rows.head.to(tl.int64) * x.head + s.query_start + rows.query


@triton.jit
def exponent(scores, scale, base, FEATURES: tl.constexpr):
    """Scores in log2 units less base: one FMA, and in fp32 what rounding the unit left."""
    x = tl.fma(scores, scale.unit, -base)
    if EXACT & FEATURES:
        x = tl.fma(tl.maximum(scores, -1e30), scale.unit_low, x)  # -inf times a negative is inf
    return x


# ---- features -----------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """To 3e-7 relative: a polynomial (Cephes) near 0, where 1 - 2 / (e^2x + 1) cancels."""
    z = x * x
    near = -5.70498872745e-3
    near = near * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    near = near * z * x + x
    size = tl.minimum(tl.abs(x), 30.0)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    far = tl.where(x < 0, -far, far)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x == x, far, x))


@triton.jit
def step(index, stride):
    """index * stride in int64. Triton 3.6 passes a 1 as None where it lies in a tuple of a tuple."""
    if stride is None:
        return index.to(tl.int64)
    else:
        return index.to(tl.int64) * stride


@triton.jit
def score_pointers(x, s, head, query, key):
    at = step(s.b, x.batch) + step(head, x.head) + step(query, x.row)
    return x.ptr + at + step(key, x.col)


@triton.jit
def modified(products, spec, s, head, query, key, inside, FEATURES: tl.constexpr):
    """(score, derivative by the product / scale): scale, softcap, bias, ALiBi and mask, in this order."""
    extras = spec.extras
    score = products * spec.scale.natural
    slope = 1.0
    if SOFTCAP & FEATURES:
        t = tanh(score / extras.softcap)
        score = extras.softcap * t
        slope = 1.0 - t * t
    if BIAS & FEATURES:
        ptrs = score_pointers(extras.bias, s, head, query, key)
        score += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    if SLOPES & FEATURES:
        at = extras.slopes.ptr + step(s.b, extras.slopes.batch) + head
        score -= tl.load(at) * tl.abs(query + s.diagonal - key).to(tl.float32)
    if MASK & FEATURES:
        ptrs = score_pointers(extras.mask, s, head, query, key)
        score = tl.where(tl.load(ptrs, mask=inside, other=0) != 0, score, -float("inf"))
    return score, slope


@triton.jit
def kept(spec, s, head, query, key):
    """What dropout multiplies weights by: keep_scale, or 0."""
    dropout = spec.extras.dropout
    plane = s.b.to(tl.int32) * spec.sizes.Hq + head
    mask = keep(dropout.philox, query, plane, key, dropout.drop_below)
    return tl.where(mask, dropout.keep_scale, 0.0)
