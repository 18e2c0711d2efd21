// What happens between the products of attention: which query sees which key, what a call's
// features make of a score, and dropout. Forward, backward and the bias's gradient call the same
// functions.
//
// A share of scores lies either way, queries in its rows or keys: functions ask place(r, n, c)
// where an entry stands.
#pragma once
#include "../common/attention.h"
#include "tile.cuh"

namespace fastattn::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLog2eLow = 1.925963033500011e-08f;

// ---- sequences and what is seen by position -----------------------------------------------------

// One sequence of the batch. Key j is on the diagonal of query i where j = i + diagonal.
struct Sequence {
  int64_t b, query_start, key_start;  // starts are 0 unless packed
  int Sq, Sk;                         // Sk: keys that may be read
  int diagonal;
};

FASTATTN_DEVICE Sequence sequence(const AttentionArgs& args, int64_t b) {
  const int Sq = static_cast<int>(args.Sq), Sk = static_cast<int>(args.Sk);
  Sequence s{b, 0, 0, Sq, Sk, Sk - Sq};
  if (args.cu_seqlens_q != nullptr) {
    s.query_start = load(args.cu_seqlens_q + b);
    s.key_start = load(args.cu_seqlens_k + b);
    s.Sq = static_cast<int>(load(args.cu_seqlens_q + b + 1) - s.query_start);
    s.Sk = static_cast<int>(load(args.cu_seqlens_k + b + 1) - s.key_start);
    s.diagonal = s.Sk - s.Sq;
  } else if (args.key_lengths != nullptr) {
    s.Sk = load(args.key_lengths + b);
    if (args.diagonal_at_length) s.diagonal = s.Sk - s.Sq;
  }
  return s;
}

// A half-open range of keys, or of queries.
struct Range {
  int begin, end;
  FASTATTN_DEVICE bool holds(int x) const { return begin <= x && x < end; }
};

FASTATTN_DEVICE Range clipped(int64_t begin, int64_t end, int size) {
  const int64_t last = end < size ? end : size;
  const int64_t first = begin < 0 ? 0 : begin > size ? size : begin;
  return {static_cast<int>(first), static_cast<int>(last < first ? first : last)};
}

// The keys that query i sees by position: causal is a right window of 0.
FASTATTN_DEVICE Range visible(const AttentionArgs& args, const Sequence& s, int i) {
  const int64_t middle = static_cast<int64_t>(i) + s.diagonal;
  return clipped(middle - args.window_left, middle + args.window_right + 1, s.Sk);
}
// The queries that see key j.
FASTATTN_DEVICE Range seeing(const AttentionArgs& args, const Sequence& s, int j) {
  const int64_t middle = static_cast<int64_t>(j) - s.diagonal;
  if (j >= s.Sk) return {0, 0};
  return clipped(middle - args.window_right, middle + args.window_left + 1, s.Sq);
}

// Tiles of a walk: those that every row of the block sees whole, [whole, whole_end), go first, then
// the others of [first, end), which are masked. Others no row sees.
struct Walk {
  int first, whole, whole_end, end;

  FASTATTN_DEVICE int wholes() const { return whole_end - whole; }
  FASTATTN_DEVICE int count() const { return end - first; }
  FASTATTN_DEVICE int tile(int visit) const {
    if (visit < wholes()) return whole + visit;
    visit -= wholes();
    return visit < whole - first ? first + visit : whole_end + visit - (whole - first);
  }
};

// some: what at least one row of the block sees; all: what all of them do.
FASTATTN_DEVICE Walk walk(Range some, Range all, int size) {
  Walk w;
  w.first = some.begin / size;
  w.end = some.begin < some.end ? (some.end + size - 1) / size : w.first;
  w.whole = smaller(larger((all.begin + size - 1) / size, w.first), w.end);
  w.whole_end = smaller(larger(all.end / size, w.whole), w.end);
  return w;
}

// Of a walk what lies in the tiles [begin, end).
FASTATTN_DEVICE Walk part_of(Walk w, int begin, int end) {
  w.first = smaller(larger(w.first, begin), w.end);
  w.end = larger(smaller(w.end, end), w.first);
  w.whole = smaller(larger(w.whole, w.first), w.end);
  w.whole_end = smaller(larger(w.whole_end, w.whole), w.end);
  return w;
}

// Keys seen by the queries [low, high], for positions that grow with the query.
FASTATTN_DEVICE Walk
walk_keys(const AttentionArgs& args, const Sequence& s, int low, int high, int size) {
  const Range first = visible(args, s, low), last = visible(args, s, high);
  return walk({first.begin, last.end}, {last.begin, first.end}, size);
}
// Queries that see the keys [low, high].
FASTATTN_DEVICE Walk
walk_queries(const AttentionArgs& args, const Sequence& s, int low, int high, int size) {
  const Range first = seeing(args, s, low), last = seeing(args, s, high);
  return walk({first.begin, last.end}, {last.begin, first.end}, size);
}

// -inf outside of what a row sees: seen(r), a range of what stands at(n, c) in columns.
template <int M, int N, class Seen, class At>
FASTATTN_DEVICE void hide(Share<M, N>& scores, const Seen& seen, const At& at) {
  Range ranges[2 * M];
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) ranges[r] = seen(r);
  for_each(scores, [&](int r, int n, int c, float& x) {
    if (!ranges[r].holds(at(n, c))) x = -kInf;
  });
}

// ---- exponents ----------------------------------------------------------------------------------

// From the unit of scores to log2, in two floats.
struct Unit {
  float high, low;
};
FASTATTN_DEVICE Unit unit_of(const AttentionArgs& args, bool modified) {
  if (modified) return {kLog2e, kLog2eLow};
  const float high = args.scale * kLog2e;
  return {high, fmaf(args.scale, kLog2e, -high) + args.scale * kLog2eLow};
}

// Scores in log2 units less base: one FMA, and in fp32 what rounding the unit left.
template <class T>
FASTATTN_DEVICE float exponent(float score, Unit unit, float base) {
  const float x = fmaf(score, unit.high, -base);
  if (sizeof(T) == 2) return x;
  return fmaf(fmaxf(score, -1e30f), unit.low, x);  // -inf times a negative is inf
}

// ---- features -----------------------------------------------------------------------------------

// Where an entry of a share of scores stands. inside: there is such a query and such a key.
struct Place {
  int head, query, key;
  bool inside;
};

// Whether scores are more than scaled products. (With a scale of 0 or less the largest product is
// not the largest score, so that maximum and scale do not change places.)
inline bool is_modified(const AttentionArgs& args) {
  return args.bias.data != nullptr || args.mask.data != nullptr ||
         args.alibi_slopes.data != nullptr || args.softcap > 0 || !(args.scale > 0);
}

FASTATTN_DEVICE int64_t offset(const Scores& x, const Sequence& s, const Place& p) {
  return x.at(s.b, p.head, p.query) + p.key * x.col;
}

template <class T, int M, int N, class At>
FASTATTN_DEVICE void add_bias(
    Share<M, N>& scores, const Scores& bias, const Sequence& s, const At& place) {
  for_each(scores, [&](int r, int n, int c, float& x) {
    const Place p = place(r, n, c);
    if (p.inside) x += to_float(load(static_cast<const T*>(bias.data) + offset(bias, s, p)));
  });
}

// scale, softcap, bias, ALiBi and mask, in this order. Products become scores; slope receives the
// derivative of softcap where it is wanted.
template <int M, int N, class At>
FASTATTN_DEVICE void modify(
    Share<M, N>& scores, const AttentionArgs& args, const Sequence& s, const At& place,
    Share<M, N>* slope = nullptr) {
  for_each(scores, [&](int, int, int, float& x) { x *= args.scale; });
  if (args.softcap > 0)
    for_each(scores, [&](int r, int n, int c, float& x) {
      const float t = tanhf(x / args.softcap);
      x = args.softcap * t;
      if (slope != nullptr) slope->at(r, n, c) = 1.f - t * t;
    });
  if (args.bias.data != nullptr) switch (args.bias.dtype) {
      case Dtype::f32: add_bias<float>(scores, args.bias, s, place); break;
      case Dtype::bf16: add_bias<bf16>(scores, args.bias, s, place); break;
      case Dtype::f16: add_bias<fp16>(scores, args.bias, s, place); break;
    }
  if (args.alibi_slopes.data != nullptr)
    for_each(scores, [&](int r, int n, int c, float& x) {
      const Place p = place(r, n, c);
      const float distance = fabsf(static_cast<float>(p.query + s.diagonal - p.key));
      x -= load(args.alibi_slopes.data + s.b * args.alibi_slopes.batch + p.head) * distance;
    });
  if (args.mask.data != nullptr)
    for_each(scores, [&](int r, int n, int c, float& x) {
      const Place p = place(r, n, c);
      const uint8_t* mask = static_cast<const uint8_t*>(args.mask.data);
      if (p.inside && load(mask + offset(args.mask, s, p)) == 0) x = -kInf;
    });
}

// ---- dropout: what weights are multiplied by, keep_scale or 0
// -------------------------------------

FASTATTN_DEVICE PhiloxKey philox_of(const AttentionArgs& args) {
  if (!args.dropout) return {};
  return {static_cast<uint64_t>(load(args.philox)), static_cast<uint32_t>(load(args.philox + 1))};
}

// The words of the four keys that an entry's is one of.
FASTATTN_DEVICE PhiloxWords
words_of(const AttentionArgs& args, const PhiloxKey& philox, const Sequence& s, const Place& p) {
  const uint32_t plane = static_cast<uint32_t>(s.b * args.Hq + p.head);
  return philox4x32(
      static_cast<uint32_t>(p.key / 4), static_cast<uint32_t>(p.query), plane, philox.offset,
      philox.seed);
}
FASTATTN_DEVICE uint32_t pick(const uint32_t (&x)[4], int i) {
  const uint32_t low = i % 2 == 0 ? x[0] : x[1], high = i % 2 == 0 ? x[2] : x[3];
  return i < 2 ? low : high;
}
FASTATTN_DEVICE float factor_of(const AttentionArgs& args, uint32_t word) {
  return word >= args.drop_below ? args.keep_scale : 0.f;
}

// function(r, n, c, factor) for the entries of a share with keys in columns. Two neighbouring lanes
// hold the keys of four words: in a pair of n, each computes those of one and hands half over.
template <int M, int N, class At, class Function>
FASTATTN_DEVICE void for_each_factor_by_row(
    const AttentionArgs& args, const PhiloxKey& philox, const Sequence& s, const At& place,
    const Function& function) {
  const bool odd = lane_index() % 2 == 1;
#pragma unroll
  for (int n = 0; n < N; n += 2)
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) {
      const PhiloxWords four = words_of(args, philox, s, place(r, odd ? n + 1 : n, 0));
      const uint32_t mine[2] = {
          odd ? four.word[2] : four.word[0], odd ? four.word[3] : four.word[1]};
      const uint32_t theirs[2] = {
          shuffle_xor(odd ? four.word[0] : four.word[2], 1),
          shuffle_xor(odd ? four.word[1] : four.word[3], 1)};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        function(r, n, c, factor_of(args, odd ? theirs[c] : mine[c]));
        if (n + 1 < N) function(r, n + 1, c, factor_of(args, odd ? mine[c] : theirs[c]));
      }
    }
}

// The same with keys in rows. Four lanes hold the keys of four words, and four entries each in a
// square of queries and rows: each computes the words of one entry, for the keys of all.
template <int M, int N, class At, class Function>
FASTATTN_DEVICE void for_each_factor_by_column(
    const AttentionArgs& args, const PhiloxKey& philox, const Sequence& s, const At& place,
    const Function& function) {
  const int lane = lane_index() / 4 % 4;  // of the four
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const PhiloxWords four = words_of(args, philox, s, place(2 * m + lane / 2, n, lane % 2));
      uint32_t got[4];
#pragma unroll
      for (int step = 0; step < 4; ++step)
        got[step] = shuffle_xor(pick(four.word, lane ^ step), 4 * step);
#pragma unroll
      for (int entry = 0; entry < 4; ++entry)
        function(2 * m + entry / 2, n, entry % 2, factor_of(args, pick(got, lane ^ entry)));
    }
}

// ---- rows of tensors ----------------------------------------------------------------------------

template <class T>
FASTATTN_DEVICE T* row_at(const Heads& x, int64_t b, int64_t head, int64_t i) {
  return static_cast<T*>(x.data) + x.at(b, head, i);
}

// Keys or values [first, first + ROWS) of a head; zeros from the end of the sequence on. PLAIN: no
// pages, and aligned.
template <bool PLAIN, int ROWS, int THREADS, class T, int COLS>
FASTATTN_DEVICE void copy_keys(
    Tile<T, COLS> tile, const AttentionArgs& args, const Heads& x, const Sequence& s, int head,
    int first, int cols, bool aligned) {
  if (PLAIN || args.paging.table == nullptr) {
    const T* rows = row_at<const T>(x, s.b, head, s.key_start + first);
    copy_rows<ROWS, THREADS>(tile, cols, PLAIN || aligned, [&](int r) -> const T* {
      return first + r < s.Sk ? rows + r * x.row : nullptr;
    });
    return;
  }
  const int page_size = static_cast<int>(args.paging.page_size);
  const int32_t* table = args.paging.table + s.b * args.paging.batch;
  copy_rows<ROWS, THREADS>(tile, cols, aligned, [&](int r) -> const T* {
    const int j = first + r;
    return j < s.Sk ? row_at<const T>(x, load(table + j / page_size), head, j % page_size)
                    : nullptr;
  });
}

// Whether rows of a (B, H, S, ...) tensor can be copied 16 bytes at a time.
template <class T>
bool is_aligned(const Heads& x, int64_t B, int64_t H, int64_t S) {
  const int64_t entries = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (B <= 1 || x.batch % entries == 0) &&
         (H <= 1 || x.head % entries == 0) && (S <= 1 || x.row % entries == 0);
}
template <class T>
bool are_keys_aligned(const AttentionArgs& args, const Heads& x) {
  const bool paged = args.paging.table != nullptr;  // then one sequence has many pages
  return is_aligned<T>(x, paged ? 2 : args.B, args.Hkv, args.Sk);
}

}  // namespace fastattn::cuda
