"""Attention backward. With P = exp(score - lse), dP = dropout(dO V^T), delta = sum(dO * O) - dlse:

    dS = P * (dP - delta);  dV = dropout(P)^T dO;  dK = scale dS^T Q;  dQ = scale dS K

Three kernels, each of which owns what it writes, so nothing is atomic and every sum has one order: a
block of keys for dK and dV, over the queries of all heads that share them; a block of queries for dQ;
a tile of the bias for its gradient, over everything along which the bias broadcasts. A kernel before
them computes delta, and lse in log2 units and two floats; with dropout one more computes delta as the sum
of P * dP, since O was rounded after its scaling by 1 / (1 - p): where a row sees one key, dS would be a
rounding of dP in place of 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tune
from .attention_call import Call, as_read, heads, scores, stats_of
from .reduce import sum_rows
from .tiles import (
    DESCRIPTORS,
    DROPOUT,
    HEAVY,
    LEFT,
    LOG2E,
    MODIFIED,
    PACKED,
    RIGHT,
    SLOPES,
    Rows,
    Sequence,
    Spec,
    box,
    exponent,
    kept,
    key_rows,
    modified,
    query_rows,
    rows_of,
    score_pointers,
    seen_keys,
    sequence_of,
    stat_offsets,
    store_rows,
    visible,
)

LOG2E_LOW = tl.constexpr(1.925963033500011e-08)
ALL_ROWS, ALL_COLS = tl.constexpr(1), tl.constexpr(2)  # what a bias broadcasts over


class RowStats(NamedTuple):
    """Of each query row: delta, and lse in log2 units as the sum of two floats."""

    delta: Any
    lse: Any
    lse_low: Any
    batch: Any
    head: Any


@triton.jit
def attention_rows_kernel(out, dout, stats, dlse, result, lengths, sizes, FEATURES: tl.constexpr,
                          DV: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr):  # fmt: skip
    COLS_V: tl.constexpr = max(16, triton.next_power_of_2(DV))
    blocks = tl.cdiv(sizes.Sq, BLOCK_M)
    program = tl.program_id(0)
    s = sequence_of(program // blocks // sizes.Hq, lengths, sizes, FEATURES)
    rows = rows_of(program % blocks, program // blocks % sizes.Hq, s, 1, BLOCK_M)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if (DROPOUT & FEATURES) == 0:
        o = query_rows(out, s, rows, DV, COLS_V, True).to(tl.float32)
        do = query_rows(dout, s, rows, DV, COLS_V, True).to(tl.float32)
        delta = tl.sum(o * do, 1)
    at = stat_offsets(stats, s, rows)
    if HAS_DLSE:
        delta -= tl.load(dlse + at, mask=rows.inside, other=0.0)
    lse = tl.load(stats.first + at, mask=rows.inside, other=0.0)
    low = tl.load(stats.second + at, mask=rows.inside, other=0.0)
    dark = lse == -float("inf")  # sees nothing: its scores are -inf and P is 0, whatever dlse is
    delta, lse = tl.where(dark, 0.0, delta), tl.where(dark, 0.0, lse)
    high = lse * LOG2E
    low = tl.fma(lse, LOG2E, -high) + lse * LOG2E_LOW + low * LOG2E
    tl.store(result.delta + at, delta, mask=rows.inside)
    tl.store(result.lse + at, high, mask=rows.inside)
    tl.store(result.lse_low + at, tl.where(low == low, low, 0.0), mask=rows.inside)


class RowValues(NamedTuple):
    """RowStats of a block of rows."""

    delta: Any
    lse: Any
    lse_low: Any


@triton.jit
def row_values(x, s, rows):
    at = stat_offsets(x, s, rows)
    delta = tl.load(x.delta + at, mask=rows.inside, other=0.0)
    lse = tl.load(x.lse + at, mask=rows.inside, other=0.0)
    return RowValues(delta, lse, tl.load(x.lse_low + at, mask=rows.inside, other=0.0))


@triton.jit
def beside(values, AXIS: tl.constexpr):
    """Shaped for a tile: AXIS 1, its rows are queries; 0, its columns are."""
    delta, lse = tl.expand_dims(values.delta, AXIS), tl.expand_dims(values.lse, AXIS)
    return RowValues(delta, lse, tl.expand_dims(values.lse_low, AXIS))


@triton.jit
def graded(products, dweights, values, spec, s, head, query, key, inside, FEATURES: tl.constexpr,
           MASKED: tl.constexpr):  # fmt: skip
    """(dropout(P), dS, dS times the derivative of softcap) of a tile, whichever way it lies."""
    slope = 1.0
    found = products
    if MODIFIED & FEATURES:
        there = inside & (key < s.Sk)
        found, slope = modified(products, spec, s, head, query, key, there, FEATURES)
    weights = tl.exp2(exponent(found, spec.scale, values.lse, FEATURES) - values.lse_low)
    if MASKED:
        # a row that does not exist has lse 0, and with a feature any score
        weights = tl.where(inside & visible(query, key, s, spec.window, FEATURES), weights, 0.0)
    dropped = weights
    if DROPOUT & FEATURES:
        factor = kept(spec, s, head, query, key)
        dropped, dweights = weights * factor, dweights * factor
    dscores = weights * (dweights - values.delta)
    return dropped, dscores, dscores * slope


@triton.jit
def attention_bwd_delta_kernel(
    query, key, value, dout, stats, extras, lengths, sizes, window, scale, FEATURES: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the sum of P * dP over all keys to stats.delta."""
    COLS: tl.constexpr = max(16, triton.next_power_of_2(D))
    COLS_V: tl.constexpr = max(16, triton.next_power_of_2(DV))
    blocks = tl.cdiv(sizes.Sq, BLOCK_M)
    program = tl.program_id(0)
    low, head = program % blocks * BLOCK_M, program // blocks % sizes.Hq
    spec = Spec(extras, lengths, sizes, window, scale)
    s = sequence_of(program // blocks // sizes.Hq, lengths, sizes, FEATURES)
    rows = rows_of(program % blocks, head, s, 1, BLOCK_M)
    high = tl.minimum(s.Sq, low + BLOCK_M) - 1
    start, end, _free, _free_end = seen_keys(low, high, s, window, FEATURES)
    if low >= s.Sq:
        end = 0

    q = query_rows(query, s, rows, D, COLS, True)
    do = query_rows(dout, s, rows, DV, COLS_V, True)
    given = row_values(stats, s, rows)
    values = beside(RowValues(tl.zeros([BLOCK_M], tl.float32), given.lse, given.lse_low), 1)
    delta, kv_head = given.delta, head // sizes.group
    for n in tl.range(start // BLOCK_N * BLOCK_N, end, BLOCK_N):
        key_index = (n + tl.arange(0, BLOCK_N))[None, :]
        k = key_rows(key, lengths, s, kv_head, n, s.Sk, D, BLOCK_N, COLS, FEATURES, True)
        v = key_rows(value, lengths, s, kv_head, n, s.Sk, DV, BLOCK_N, COLS_V, FEATURES, True)
        products = tl.dot(q, k.T, input_precision=PRECISION)
        dweights = tl.dot(do, v.T, input_precision=PRECISION)
        _, weighted, _ = graded(
            products, dweights, values, spec, s, rows.head[:, None], rows.query[:, None], key_index,
            rows.inside[:, None], FEATURES, True)  # fmt: skip
        delta += tl.sum(weighted, 1)
    tl.store(stats.delta + stat_offsets(stats, s, rows), delta, mask=rows.inside)


# ---- dK and dV ----------------------------------------------------------------------------------


@triton.jit
def query_tile(x, s, rows, head, m, D: tl.constexpr, BLOCK_M: tl.constexpr, COLS: tl.constexpr,
               FEATURES: tl.constexpr):  # fmt: skip
    """(BLOCK_M, COLS) rows from m of the query or of dout, 0 where there is none."""
    if DESCRIPTORS & FEATURES:
        return box(x, s, head, s.query_start + m, BLOCK_M, COLS, FEATURES)
    else:
        return query_rows(x, s, rows, D, COLS, True)


@triton.jit
def attention_bwd_keys_kernel(
    query, key, value, dout, stats, dkey, dvalue, extras, lengths, sizes, window, scale,
    FEATURES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    COLS: tl.constexpr = max(16, triton.next_power_of_2(D))
    COLS_V: tl.constexpr = max(16, triton.next_power_of_2(DV))
    blocks = tl.cdiv(sizes.Sk, BLOCK_N)
    kv_heads = sizes.Hq // sizes.group
    program = tl.program_id(0)
    kv_head = program // blocks % kv_heads
    spec = Spec(extras, lengths, sizes, window, scale)
    s = sequence_of(program // blocks // kv_heads, lengths, sizes, FEATURES)
    first = (
        program % blocks * BLOCK_N
    )  # the first keys of a causal call are seen most: they go first
    key_index = (first + tl.arange(0, BLOCK_N))[:, None]
    # queries that see some of the block's keys
    last = tl.minimum(first + BLOCK_N, s.Sk) - 1
    start, end = 0, s.Sq
    if RIGHT & FEATURES:
        start = tl.maximum(0, first - s.diagonal - window.right) // BLOCK_M * BLOCK_M
    if LEFT & FEATURES:
        end = tl.minimum(s.Sq, last - s.diagonal + window.left + 1)
    if first >= s.Sk:
        end = 0
    turns = tl.cdiv(tl.maximum(end - start, 0), BLOCK_M)

    k = key_rows(key, lengths, s, kv_head, first, s.Sk, D, BLOCK_N, COLS, FEATURES, True)
    v = key_rows(value, lengths, s, kv_head, first, s.Sk, DV, BLOCK_N, COLS_V, FEATURES, True)
    dk = tl.zeros([BLOCK_N, COLS], tl.float32)
    dv = tl.zeros([BLOCK_N, COLS_V], tl.float32)
    # One loop over blocks of queries of all heads, masked throughout: with loops of their own for the
    # blocks that need a mask, as in the forward, k, v, dk and dv spill at a head dimension of 128
    for turn in tl.range(sizes.group * turns):
        head = kv_head * sizes.group + turn // turns
        m = start + turn % turns * BLOCK_M
        index = m + tl.arange(0, BLOCK_M)
        rows = Rows(tl.zeros_like(index) + head, index, index < s.Sq)
        q = query_tile(query, s, rows, head, m, D, BLOCK_M, COLS, FEATURES)
        do = query_tile(dout, s, rows, head, m, DV, BLOCK_M, COLS_V, FEATURES)
        values = beside(row_values(stats, s, rows), 0)
        products = tl.dot(k, q.T, input_precision=PRECISION)
        dweights = tl.dot(v, do.T, input_precision=PRECISION)
        dropped, _, dscores = graded(
            products, dweights, values, spec, s, rows.head[None, :], index[None, :], key_index,
            rows.inside[None, :], FEATURES, True)  # fmt: skip
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    rows_held = s.Sk if PACKED & FEATURES else sizes.Sk
    store_keys(dkey, s, kv_head, key_index, rows_held, dk * scale.natural, D, COLS)
    store_keys(dvalue, s, kv_head, key_index, rows_held, dv, DV, COLS_V)


@triton.jit
def store_keys(x, s, head, key_index, rows_held, tile, D: tl.constexpr, COLS: tl.constexpr):
    """All rows that the tensor has; those past key_lengths are 0."""
    d = tl.arange(0, COLS)[None, :]
    at = s.b * x.batch + head.to(tl.int64) * x.head + (s.key_start + key_index) * x.row
    tile = tl.where(key_index < s.Sk, tile, 0.0).to(x.ptr.dtype.element_ty)
    tl.store(x.ptr + at + d, tile, mask=(key_index < rows_held) & (d < D))


# ---- dQ and the slopes --------------------------------------------------------------------------


@triton.jit
def add_keys(dq, dslope, q, do, values, key, value, spec, s, rows, start, end, FEATURES: tl.constexpr,
             D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
             MASKED: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """What keys [start, end) add to a block of queries. Tiles lie as (queries, keys). MASKED: some may not
    be seen by some queries; WHOLE: all tiles lie within the keys."""
    lengths = spec.lengths
    kv_head = tl.min(rows.head, 0) // spec.sizes.group
    for n in tl.range(start, end, BLOCK_N):
        key_index = (n + tl.arange(0, BLOCK_N))[None, :]
        k = key_rows(key, lengths, s, kv_head, n, s.Sk, D, BLOCK_N, q.shape[1], FEATURES, not WHOLE)
        v = key_rows(
            value, lengths, s, kv_head, n, s.Sk, DV, BLOCK_N, do.shape[1], FEATURES, not WHOLE
        )
        products = tl.dot(q, k.T, input_precision=PRECISION)
        dweights = tl.dot(do, v.T, input_precision=PRECISION)
        _, before, dscores = graded(
            products, dweights, beside(values, 1), spec, s, rows.head[:, None], rows.query[:, None],
            key_index, rows.inside[:, None], FEATURES, MASKED)  # fmt: skip
        if SLOPES & FEATURES:
            distance = tl.abs(rows.query[:, None] + s.diagonal - key_index).to(tl.float32)
            dslope -= tl.sum(before * distance, 1)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, dslope


@triton.jit
def attention_bwd_queries_kernel(
    query, key, value, dout, stats, dquery, slope_shares, extras, lengths, sizes, window, scale,
    FEATURES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """slope_shares: (blocks, B, Hq), each program's share of its slope's gradient."""
    COLS: tl.constexpr = max(16, triton.next_power_of_2(D))
    COLS_V: tl.constexpr = max(16, triton.next_power_of_2(DV))
    blocks = tl.cdiv(sizes.Sq, BLOCK_M)
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    head = program // blocks % sizes.Hq
    spec = Spec(extras, lengths, sizes, window, scale)
    s = sequence_of(program // blocks // sizes.Hq, lengths, sizes, FEATURES)
    rows = rows_of(block, head, s, 1, BLOCK_M)
    low = block * BLOCK_M
    high = tl.minimum(s.Sq, low + BLOCK_M) - 1
    start, end, all_start, all_end = seen_keys(low, high, s, window, FEATURES)
    if low >= s.Sq:
        end = 0
    start = start // BLOCK_N * BLOCK_N
    free = tl.maximum(start, tl.cdiv(all_start, BLOCK_N) * BLOCK_N)
    free_end = tl.maximum(free, tl.minimum(all_end, end) // BLOCK_N * BLOCK_N)
    PLAIN: tl.constexpr = (HEAVY & FEATURES) == 0
    if not PLAIN:  # two loops instead of three
        free, free_end = start, tl.maximum(start, end // BLOCK_N * BLOCK_N)

    q = query_rows(query, s, rows, D, COLS, True)
    do = query_rows(dout, s, rows, DV, COLS_V, True)
    values = row_values(stats, s, rows)
    dq = tl.zeros([BLOCK_M, COLS], tl.float32)
    dslope = tl.zeros([BLOCK_M], tl.float32)
    if LEFT & FEATURES and PLAIN:
        dq, dslope = add_keys(
            dq, dslope, q, do, values, key, value, spec, s, rows, start, tl.minimum(free, end), FEATURES,
            D, DV, BLOCK_N, PRECISION, True, False)  # fmt: skip
    dq, dslope = add_keys(
        dq, dslope, q, do, values, key, value, spec, s, rows, free, free_end, FEATURES, D, DV, BLOCK_N,
        PRECISION, not PLAIN, True)  # fmt: skip
    dq, dslope = add_keys(
        dq, dslope, q, do, values, key, value, spec, s, rows, free_end, end, FEATURES, D, DV, BLOCK_N,
        PRECISION, True, False)  # fmt: skip
    store_rows(dquery, s, rows, dq * scale.natural, D, COLS)
    if SLOPES & FEATURES:
        at = (block.to(tl.int64) * sizes.B + s.b) * sizes.Hq + head
        tl.store(slope_shares + at, tl.sum(tl.where(rows.inside, dslope, 0.0), 0))


# ---- the bias -----------------------------------------------------------------------------------


class Extent(NamedTuple):
    """Sizes of the bias's first two dimensions."""

    batch: Any
    head: Any


@triton.jit
def attention_bwd_bias_kernel(
    query, key, value, dout, stats, dbias, extras, lengths, sizes, window, scale, extent,
    FEATURES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BROADCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS of all sequences, heads, queries and keys that a tile of the bias reaches, in order."""
    COLS: tl.constexpr = max(16, triton.next_power_of_2(D))
    COLS_V: tl.constexpr = max(16, triton.next_power_of_2(DV))
    row_tiles, col_tiles = tl.cdiv(sizes.Sq, BLOCK_M), tl.cdiv(sizes.Sk, BLOCK_N)
    row_programs = 1 if ALL_ROWS & BROADCAST else row_tiles
    col_programs = 1 if ALL_COLS & BROADCAST else col_tiles
    program = tl.program_id(0)
    row_tile, col_tile = program // col_programs % row_programs, program % col_programs
    bias_head = program // col_programs // row_programs % extent.head
    bias_b = program // col_programs // row_programs // extent.head
    spec = Spec(extras, lengths, sizes, window, scale)
    dtile = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for more_b in range(sizes.B // extent.batch):
        s = sequence_of(bias_b + more_b, lengths, sizes, FEATURES)
        for more_heads in range(sizes.Hq // extent.head):
            head = bias_head + more_heads
            for more_rows in range(row_tiles // row_programs):
                rows = rows_of(row_tile + more_rows, head, s, 1, BLOCK_M)
                q = query_rows(query, s, rows, D, COLS, True)
                do = query_rows(dout, s, rows, DV, COLS_V, True)
                values = beside(row_values(stats, s, rows), 1)
                for more_cols in range(col_tiles // col_programs):
                    n = (col_tile + more_cols) * BLOCK_N
                    key_index = (n + tl.arange(0, BLOCK_N))[None, :]
                    k = key_rows(key, lengths, s, head // sizes.group, n, s.Sk, D, BLOCK_N, COLS,
                                 FEATURES, True)  # fmt: skip
                    v = key_rows(value, lengths, s, head // sizes.group, n, s.Sk, DV, BLOCK_N, COLS_V,
                                 FEATURES, True)  # fmt: skip
                    products = tl.dot(q, k.T, input_precision=PRECISION)
                    dweights = tl.dot(do, v.T, input_precision=PRECISION)
                    _, before, _ = graded(
                        products, dweights, values, spec, s, rows.head[:, None], rows.query[:, None],
                        key_index, rows.inside[:, None], FEATURES, True)  # fmt: skip
                    dtile += before
    row = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    col = (col_tile * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    rows_held, cols_held = sizes.Sq, sizes.Sk
    if ALL_ROWS & BROADCAST:
        dtile, row, rows_held = tl.sum(dtile, 0)[None, :], tl.zeros([1, 1], tl.int32), 1
    if ALL_COLS & BROADCAST:
        dtile, col, cols_held = tl.sum(dtile, 1)[:, None], tl.zeros([1, 1], tl.int32), 1
    at = Sequence(bias_b.to(tl.int64), 0, 0, sizes.Sq, sizes.Sk, 0)
    ptrs = score_pointers(dbias, at, bias_head, row, col)
    tile = dtile.to(dbias.ptr.dtype.element_ty)
    tl.store(ptrs, tile, mask=(row < rows_held) & (col < cols_held))


# ---- the launcher -------------------------------------------------------------------------------


def attention_bwd(dout: Tensor | None, dlse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """The operator's schema (fastattn/ops/attention.py) on a GPU's tensors, or interpreted."""
    *inputs, out, lse, lse_low = rest[:15]
    *spec, needs = rest[15:]
    call = Call(*inputs, *spec)
    if dout is None:
        dout = out.new_zeros(out.shape)
    dout = dout if whole_rows(dout) else dout.contiguous()
    nothing = call.query.new_empty(0)
    results = [nothing] * 6
    stats = prepared_rows(call, out, dout, lse, lse_low, dlse)
    common = (heads(dout), stats)
    if call.dropped and call.rows:
        add_weighted(call, common)
    if needs & 0b000110 and not call.paged:  # a cache has no gradient
        results[1:3] = key_gradients(call, dout, stats)
    if needs & 0b010001:
        results[0], results[4] = query_gradients(call, common)
    if needs & 0b001000 and call.bias is not None:
        results[3] = bias_gradient(call, common, call.bias)
    if needs & 0b100000 and call.sinks is not None:
        results[5] = sink_gradient(call.sinks, lse, stats.delta, call.packed)
    return tuple(results)


class Gradient:
    """A gradient laid out as torch.empty_like(x); where that is not by whole rows (x overlaps itself),
    kernels write `written`, which finish() copies."""

    def __init__(self, x: Tensor) -> None:
        self.value = torch.empty_like(x)
        self.written = self.value if whole_rows(self.value) else x.new_empty(x.shape)

    def finish(self) -> Tensor:
        return self.value if self.written is self.value else self.value.copy_(self.written)


def whole_rows(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


def prepared_rows(
    call: Call, out: Tensor, dout: Tensor, lse: Tensor, lse_low: Tensor, dlse: Tensor | None
) -> RowStats:
    given = stats_of(lse, lse_low)
    delta, high, low = (torch.empty_like(lse) for _ in range(3))
    result = RowStats(delta, high, low, given.batch, given.head)
    chosen = tune.attention_rows(call.DV)
    grid = (triton.cdiv(call.sizes.Sq, chosen.block_m) * call.sizes.Hq * call.sizes.B,)
    if call.rows:
        attention_rows_kernel[grid](
            heads(out), heads(dout), given, 0 if dlse is None else dlse.contiguous(), result,
            call.lengths, call.sizes, call.features, call.DV, chosen.block_m, dlse is not None,
            num_warps=chosen.warps,
        )  # fmt: skip
    return result


def add_weighted(call: Call, common: tuple[Any, ...]) -> None:
    """The sum of P * dP to delta; blocks are those of dQ, which does the same and more."""
    chosen = tune.choose("attention_bwd_queries", call.dtype, max(call.D, call.DV), call.modified)
    keys, key_features = call.key_tensors(chosen)
    grid = (triton.cdiv(call.sizes.Sq, chosen.block_m) * call.sizes.Hq * call.sizes.B,)
    attention_bwd_delta_kernel[grid](
        heads(call.query), *keys, *common, *call.tuples, call.features | key_features, call.D, call.DV,
        chosen.block_m, chosen.block_n, call.precision, num_warps=chosen.warps,
        num_stages=chosen.stages,
    )  # fmt: skip


def key_gradients(call: Call, dout: Tensor, stats: RowStats) -> tuple[Tensor, Tensor]:
    dkey, dvalue = Gradient(call.key), Gradient(call.value)
    chosen = tune.choose("attention_bwd_keys", call.dtype, max(call.D, call.DV), call.modified)
    sizes = call.sizes
    grid = (triton.cdiv(sizes.Sk, chosen.block_n) * (sizes.Hq // sizes.group) * sizes.B,)
    if grid[0]:
        M, N = chosen.block_m, chosen.block_n
        tensors = (call.query, call.key, call.value, dout)
        # a descriptor would read the next sequence, which may be NaN, where a packed one ends
        inputs, how = as_read(*zip(tensors, (M, N, N, M), strict=True), pointers=call.packed)
        attention_bwd_keys_kernel[grid](
            *inputs, stats, heads(dkey.written), heads(dvalue.written), *call.tuples,
            call.features | how, call.D, call.DV, M, N, call.precision, num_warps=chosen.warps,
            num_stages=chosen.stages,
        )  # fmt: skip
    return dkey.finish(), dvalue.finish()


def query_gradients(call: Call, common: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """dquery, and the gradient of the slopes."""
    dquery, dslopes = Gradient(call.query), call.query.new_empty(0)
    chosen = tune.choose("attention_bwd_queries", call.dtype, max(call.D, call.DV), call.modified)
    blocks = triton.cdiv(call.sizes.Sq, chosen.block_m)
    shares = call.query.new_zeros(blocks, call.sizes.B, call.sizes.Hq, dtype=torch.float32)
    if call.rows:
        keys, key_features = call.key_tensors(chosen)
        attention_bwd_queries_kernel[(shares.numel(),)](
            heads(call.query), *keys, *common, heads(dquery.written), shares, *call.tuples,
            call.features | key_features, call.D, call.DV, chosen.block_m, chosen.block_n,
            call.precision, num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
    if call.slopes is not None:
        flat = shares.flatten(1) if call.slopes.dim() == 2 else shares.flatten(0, 1)
        dslopes = sum_rows(flat).reshape(call.slopes.shape).to(call.slopes.dtype)
    return dquery.finish(), dslopes


def bias_gradient(call: Call, common: tuple[Any, ...], bias: Tensor) -> Tensor:
    dbias, sizes = torch.empty_like(bias, memory_format=torch.contiguous_format), call.sizes
    chosen = tune.choose("attention_bwd_bias", call.dtype, max(call.D, call.DV))
    batch, head, rows, cols = bias.shape
    full = (sizes.B, sizes.Hq, sizes.Sq, sizes.Sk)
    if 0 in full:
        return dbias.zero_()
    tiles = triton.cdiv(rows, chosen.block_m) * triton.cdiv(cols, chosen.block_n)
    # a dimension of 1 broadcasts, unless there is only one to broadcast to
    broadcast = (rows < sizes.Sq) * ALL_ROWS.value + (cols < sizes.Sk) * ALL_COLS.value
    keys, key_features = call.key_tensors(chosen)
    attention_bwd_bias_kernel[(batch * head * tiles,)](
        heads(call.query), *keys, *common, scores(dbias), *call.tuples, Extent(batch, head),
        call.features | key_features, call.D, call.DV, chosen.block_m, chosen.block_n, broadcast,
        call.precision, num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return dbias


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor, packed: bool) -> Tensor:
    """-sum over rows of exp(sink - lse) * delta: the sink takes part in every row's lse."""
    share = torch.exp(sinks.float()[:, None] - lse)
    share = torch.where(lse == -torch.inf, 0.0, share)
    terms = (share * delta).double()
    return -(terms.sum(1) if packed else terms.sum((0, 2))).to(sinks.dtype)
