"""Attention forward by the online softmax (Milakov and Gimelshein 2018; Dao et al. 2022).

A program is a block of query rows of one head over all the keys that they see, tile by tile: the tiles
at the edges of what is seen are masked, in loops of their own. Where queries are few, the rows of all
heads that share keys stand together, and a program takes SPLIT keys; attention_join adds the parts.
The maximum is that of the raw products, so that scaling and subtracting are one FMA before exp2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tune
from .attention_call import Call, heads, stats_of
from .tiles import (
    DROPOUT,
    HEAVY,
    LEFT,
    LN2,
    LN2_LOW,
    LOG2E,
    MODIFIED,
    SINKS,
    SPECIALISED,
    Rows,
    Sequence,
    Spec,
    exponent,
    kept,
    key_rows,
    modified,
    query_rows,
    rows_of,
    seen_keys,
    sequence_of,
    store_rows,
    visible,
)


@triton.jit
def attend(acc, row_max, row_sum, q, key, value, spec, s, rows, start, end, FEATURES: tl.constexpr,
           D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
           MASKED: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The running softmax of a block over keys [start, end). MASKED: some may not be seen by some
    queries; WHOLE: all tiles lie within the keys."""
    lengths, scale = spec.lengths, spec.scale
    kv_head = tl.min(rows.head, 0) // spec.sizes.group
    head, query, inside = rows.head[:, None], rows.query[:, None], rows.inside[:, None]
    for n in tl.range(start, end, BLOCK_N, warp_specialize=(SPECIALISED & FEATURES) != 0):
        key_index = (n + tl.arange(0, BLOCK_N))[None, :]
        k = key_rows(key, lengths, s, kv_head, n, s.Sk, D, BLOCK_N, q.shape[1], FEATURES, not WHOLE)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if MODIFIED & FEATURES:
            there = inside & (key_index < s.Sk)
            scores, _ = modified(scores, spec, s, head, query, key_index, there, FEATURES)
        if MASKED:
            seen = visible(query, key_index, s, spec.window, FEATURES)
            scores = tl.where(seen, scores, -float("inf"))
        # in log2 units, as rounded: weights, their sum and lse all count from the same number
        largest = tl.maximum(row_max, tl.max(scores, 1) * scale.unit)
        base = tl.where(largest == -float("inf"), 0.0, largest)  # -inf - -inf would be NaN
        weights = tl.exp2(exponent(scores, scale, base[:, None], FEATURES))
        alpha = tl.exp2(row_max - base)
        row_sum = tl.fma(row_sum, alpha, tl.sum(weights, 1))
        row_max = largest
        if DROPOUT & FEATURES:
            weights *= kept(spec, s, head, query, key_index)
        v = key_rows(
            value, lengths, s, kv_head, n, s.Sk, DV, BLOCK_N, acc.shape[1], FEATURES, not WHOLE
        )
        acc = tl.dot(weights.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def finished(acc, row_max, row_sum, sink, HAS_SINK: tl.constexpr):
    """out, lse and what rounding lse to fp32 left; row_max in log2 units, sink natural."""
    if HAS_SINK:
        highest = tl.maximum(row_max, sink * LOG2E)
        base = tl.where(highest == -float("inf"), 0.0, highest)
        rescale = tl.exp2(row_max - base)
        row_sum = row_sum * rescale + tl.exp2(sink * LOG2E - base)
        acc *= rescale[:, None]
        row_max = highest
    dark = row_sum == 0.0  # sees no key
    row_sum = tl.where(dark, 1.0, row_sum)
    row_max = tl.where(row_max == -float("inf"), 0.0, row_max)
    high = row_max * LN2
    low = tl.fma(row_max, LN2, -high) + row_max * LN2_LOW
    tail = tl.log(row_sum)
    lse = high + tail
    part = lse - high  # the sum of two floats, exactly (Knuth)
    low += (high - (lse - part)) + (tail - part)
    low = tl.where(dark | (lse != lse) | (tl.abs(lse) == float("inf")), 0.0, low)
    return acc / row_sum[:, None], tl.where(dark, -float("inf"), lse), low


@triton.jit
def attention_fwd_kernel(
    query, key, value, out, stats, extras, lengths, sizes, window, scale,
    FEATURES: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TOGETHER: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SPLIT 0: out, and stats = (lse, lse_low). Else a split's share, for attention_join_kernel: the
    unnormalised out (splits * B, Hq, Sq, Dv) in fp32, and stats = (row_max, row_sum)."""
    COLS: tl.constexpr = max(16, triton.next_power_of_2(D))
    COLS_V: tl.constexpr = max(16, triton.next_power_of_2(DV))
    blocks = tl.cdiv(TOGETHER * sizes.Sq, BLOCK_M)
    sets = sizes.Hq // TOGETHER
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks  # the last rows of a causal call see most: they go first
    first_head = program // blocks % sets * TOGETHER
    slot = program // blocks // sets  # split * B + b
    spec = Spec(extras, lengths, sizes, window, scale)
    s = sequence_of(slot % sizes.B, lengths, sizes, FEATURES)
    if block * BLOCK_M < TOGETHER * s.Sq:
        rows = rows_of(block, first_head, s, TOGETHER, BLOCK_M)
        low = block * BLOCK_M if TOGETHER == 1 else 0
        high = tl.minimum(s.Sq, low + BLOCK_M) - 1 if TOGETHER == 1 else s.Sq - 1
        start, end, all_start, all_end = seen_keys(low, high, s, window, FEATURES)
        if SPLIT > 0:
            split = slot // sizes.B
            start, end = tl.maximum(start, split * SPLIT), tl.minimum(end, (split + 1) * SPLIT)
        start = start // BLOCK_N * BLOCK_N
        free = tl.maximum(start, tl.cdiv(all_start, BLOCK_N) * BLOCK_N)
        free_end = tl.maximum(free, tl.minimum(all_end, end) // BLOCK_N * BLOCK_N)
        PLAIN: tl.constexpr = (HEAVY & FEATURES) == 0
        if not PLAIN:  # two loops instead of three
            free, free_end = start, tl.maximum(start, end // BLOCK_N * BLOCK_N)

        q = query_rows(query, s, rows, D, COLS, True)
        acc = tl.zeros([BLOCK_M, COLS_V], tl.float32)
        row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        if LEFT & FEATURES and PLAIN:
            acc, row_max, row_sum = attend(
                acc, row_max, row_sum, q, key, value, spec, s, rows, start, tl.minimum(free, end), FEATURES,
                D, DV, BLOCK_N, PRECISION, True, False)  # fmt: skip
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q, key, value, spec, s, rows, free, free_end, FEATURES, D, DV, BLOCK_N,
            PRECISION, not PLAIN, True)  # fmt: skip
        acc, row_max, row_sum = attend(
            acc, row_max, row_sum, q, key, value, spec, s, rows, free_end, end, FEATURES, D, DV, BLOCK_N,
            PRECISION, True, False)  # fmt: skip

        if SPLIT > 0:
            part = Sequence(slot.to(tl.int64), 0, 0, s.Sq, s.Sk, s.diagonal)
            store_rows(out, part, rows, acc, DV, COLS_V)
            store_stats(stats, part, rows, row_max, row_sum)
        else:
            write(out, stats, extras, s, rows, acc, row_max, row_sum, FEATURES, DV, COLS_V)


@triton.jit
def store_stats(stats, s, rows, first, second):
    at = s.b * stats.batch + rows.head.to(tl.int64) * stats.head + s.query_start + rows.query
    tl.store(stats.first + at, first, mask=rows.inside)
    tl.store(stats.second + at, second, mask=rows.inside)


@triton.jit
def write(out, stats, extras, s, rows, acc, row_max, row_sum, FEATURES: tl.constexpr,
          DV: tl.constexpr, COLS_V: tl.constexpr):  # fmt: skip
    """out, lse and lse_low of a block."""
    sink = 0.0
    if SINKS & FEATURES:
        sink = tl.load(extras.sinks + rows.head, mask=rows.inside, other=0.0)
    result, lse, lse_low = finished(acc, row_max, row_sum, sink, (SINKS & FEATURES) != 0)
    store_rows(out, s, rows, result, DV, COLS_V)
    store_stats(stats, s, rows, lse, lse_low)


@triton.jit
def attention_join_kernel(parts, part_stats, out, stats, extras, sizes, splits,
                          FEATURES: tl.constexpr, DV: tl.constexpr):  # fmt: skip
    """The splits of one query row, in order."""
    COLS_V: tl.constexpr = max(16, triton.next_power_of_2(DV))
    program = tl.program_id(0)
    query = program % sizes.Sq + tl.arange(0, 1)
    head = program // sizes.Sq % sizes.Hq + tl.arange(0, 1)
    b = program // sizes.Sq // sizes.Hq
    rows = Rows(head, query, query >= 0)
    acc = tl.zeros([1, COLS_V], tl.float32)
    row_max = tl.full([1], -float("inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    for split in range(splits):
        part = Sequence((split * sizes.B + b).to(tl.int64), 0, 0, sizes.Sq, sizes.Sk, 0)
        at = part.b * part_stats.batch + head.to(tl.int64) * part_stats.head + query
        theirs = tl.load(part_stats.first + at)
        highest = tl.maximum(row_max, theirs)
        base = tl.where(highest == -float("inf"), 0.0, highest)
        mine_share, their_share = tl.exp2(row_max - base), tl.exp2(theirs - base)
        row_sum = row_sum * mine_share + tl.load(part_stats.second + at) * their_share
        rest = query_rows(parts, part, rows, DV, COLS_V, True)
        acc = acc * mine_share[:, None] + rest * their_share[:, None]
        row_max = highest
    s = Sequence(b.to(tl.int64), 0, 0, sizes.Sq, sizes.Sk, 0)
    write(out, stats, extras, s, rows, acc, row_max, row_sum, FEATURES, DV, COLS_V)


# Below this many queries the heads of a group share a block, and keys are split. Both depend on Sq and
# Sk alone, so that neither the batch nor what runs beside changes a bit.
FEW_QUERIES = 16


def attention_fwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's schema (fastattn/ops/attention.py) on a GPU's tensors, or interpreted."""
    call = Call(*arguments)
    out, stats, (lse, lse_low) = call.empty_results()
    if call.rows == 0:
        return out, lse, lse_low
    few = call.sizes.Sq <= FEW_QUERIES and not call.packed
    together = call.sizes.group if few else 1
    Sq = None if call.packed else call.sizes.Sq  # of a packed call it depends on the batch
    chosen = tune.attention_fwd(call.dtype, max(call.D, call.DV), Sq, call.modified)
    split = tune.SPLIT_KEYS if few and call.sizes.Sk > tune.SPLIT_KEYS else 0
    splits = triton.cdiv(call.sizes.Sk, split) if split else 1
    results = (heads(out), stats)
    if split:
        parts = out.new_empty(splits * call.sizes.B, *out.shape[1:], dtype=torch.float32)
        first, second = (parts.new_empty(parts.shape[:-1]) for _ in range(2))
        results = (heads(parts), stats_of(first, second))
    blocks = triton.cdiv(together * call.sizes.Sq, chosen.block_m)
    grid = (blocks * (call.sizes.Hq // together) * call.sizes.B * splits,)
    keys, key_features = call.key_tensors(chosen)
    attention_fwd_kernel[grid](
        heads(call.query), *keys, *results, *call.tuples, call.features | key_features, call.D, call.DV,
        chosen.block_m, chosen.block_n, together, split, call.precision, num_warps=chosen.warps,
        num_stages=chosen.stages,
    )  # fmt: skip
    if split:
        attention_join_kernel[(call.rows,)](
            *results, heads(out), stats, call.extras, call.sizes, splits, call.features, call.DV,
            num_warps=1,
        )  # fmt: skip
    return out, lse, lse_low
