// What row operators share: how rows become tasks, whole and partial vectors, sums along a row and
// over rows. Every cut depends on R and C alone, so threads never change a bit.

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kTaskEntries = 16384;  // about 10 us of work a task

FA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FA_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
FA_INLINE int64_t cuts(int64_t n, int64_t piece) { return (n + piece - 1) / piece; }
FA_INLINE int64_t rows_per_task(int64_t C) { return larger(1, kTaskEntries / larger(C, 1)); }

template <class T>
FA_INLINE T* row_of(const RowMap& map, int64_t row) {
  return (T*)map.data + map.offset(row);
}

// Asks for a row that comes next: the passes over the present one leave the memory idle.
FA_INLINE void prefetch(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char*)row + at);
  asm volatile("");  // or GCC 12 leaves out calls of a function that does nothing but this
}

// body(row) for every row.
template <class Body>
FA_INLINE void parallel_rows(int64_t R, int64_t C, Body body) {
  const int64_t rows = rows_per_task(C);
  parallel_tasks(cuts(R, rows), [&](int64_t task) {
    const int64_t end = smaller(R, task * rows + rows);
    for (int64_t row = task * rows; row < end; ++row) body(row);
  });
}

// body(row, begin, end) for pieces of rows that cover all columns: an elementwise operator.
template <class Body>
FA_INLINE void parallel_spans(int64_t R, int64_t C, Body body) {
  if (C <= kTaskEntries) return parallel_rows(R, C, [&](int64_t row) { body(row, 0, C); });
  const int64_t pieces = cuts(C, kTaskEntries);
  parallel_tasks(R * pieces, [&](int64_t task) {
    const int64_t begin = task % pieces * kTaskEntries;
    body(task / pieces, begin, smaller(C, begin + kTaskEntries));
  });
}

// ---- vectors along a row -------------------------------------------------------------------

// How much of a vector a step holds: all of it, or the first n lanes at the end of a row.
struct Whole {};
struct First {
  int64_t n;
};
struct Past {};  // all of it, stored past the caches
template <class T>
FA_INLINE Vec load(const T* p, Whole, float = 0.f) {
  return load(p);
}
template <class T>
FA_INLINE Vec load(const T* p, First first, float fill = 0.f) {
  return load_first(p, first.n, fill);
}
template <class T>
FA_INLINE void store(T* p, Vec v, Whole) {
  store(p, v);
}
template <class T>
FA_INLINE void store(T* p, Vec v, First first) {
  store_first(p, v, first.n);
}
template <class T>
FA_INLINE void store(T* p, Vec v, Past) {
  stream(p, v);
}

#define FA_STEP __attribute__((always_inline))  // for the lambdas below

// step(c, Whole or First) along C columns.
template <class Step>
FA_INLINE void for_vectors(int64_t C, Step step) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) step(c, Whole{});
  if (c < C) step(c, First{C - c});
}

// Do a call's tensors, as fp32, leave the caches no room for what it writes? An ordinary store
// reads the line that it writes to: layer_norm of 4096 x 768 took 1.5 ms from memory so, and 0.7
// past it.
FA_INLINE bool goes_past(int64_t entries, int64_t tensors) {
  return entries * tensors * (int64_t)sizeof(float) > (16 << 20);
}

// out = value(c, Whole or First) from column c on, four vectors at a time: a load waits for an
// older store whose address has the same last 12 bits, and malloc's neighbours lie 128 bytes apart
// there.
template <class T, class Value, class How>
FA_INLINE void map_from(int64_t c, T* out, int64_t C, Value value, How how) {
  for (; c + 4 * kLanes <= C; c += 4 * kLanes) {
    Vec v[4];
    FA_FOR (i, 4) v[i] = value(c + i * kLanes, Whole{});
    FA_FOR (i, 4) store(out + c + i * kLanes, v[i], how);
  }
  for (; c + kLanes <= C; c += kLanes) store(out + c, value(c, Whole{}), how);
  if (c < C) store(out + c, value(c, First{C - c}), First{C - c});
}
template <class T, class Value>
FA_INLINE void map_vectors(T* out, int64_t C, bool past, Value value) {
  if (!past) return map_from(0, out, C, value, Whole{});
  const int64_t unaligned = -((intptr_t)out / (intptr_t)sizeof(T)) & (kLanes - 1);
  const First head = {smaller(unaligned, C)};
  if (head.n > 0) store(out, value(0, head), head);
  map_from(head.n, out, C, value, Past{});
}

// The sum of term(c, Whole or First) along C columns, in four chains: an addition takes 3-4 cycles,
// and so does a maximum.
// Lanes past the end must come out as 0.
template <class Term>
FA_INLINE float sum_vectors(int64_t C, Term term) {
  Vec sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes)
    FA_FOR (i, 4) sums[i] += term(c + i * kLanes, Whole{});
  for (; c + kLanes <= C; c += kLanes) sums[0] += term(c, Whole{});
  if (c < C) sums[1] += term(c, First{C - c});
  return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// out = term(c, Whole or First) along C columns, and their sum.
template <class Term>
FA_INLINE float sum_mapped(float* out, int64_t C, Term term) {
  Vec sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes) {
    Vec v[4];
    FA_FOR (i, 4) sums[i] += v[i] = term(c + i * kLanes, Whole{});
    FA_FOR (i, 4) store(out + c + i * kLanes, v[i]);
  }
  const auto step = [&](int64_t c, auto n) FA_STEP {
    const Vec v = term(c, n);
    store(out + c, v, n);
    sums[0] += v;
  };
  for (; c + kLanes <= C; c += kLanes) step(c, Whole{});
  if (c < C) step(c, First{C - c});
  return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The largest entry(c, Whole or First), where one is a number; lanes past the end are -inf.
template <class Entry>
FA_INLINE float max_vectors(int64_t C, Entry entry) {
  Vec most[4];
  FA_FOR (i, 4) most[i] = splat(-kInf);
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes)
    FA_FOR (i, 4) most[i] = max(entry(c + i * kLanes, Whole{}), most[i]);
  for (; c + kLanes <= C; c += kLanes) most[0] = max(entry(c, Whole{}), most[0]);
  if (c < C) most[1] = max(entry(c, First{C - c}), most[1]);
  return reduce_max(max(max(most[0], most[1]), max(most[2], most[3])));
}

// sum_vectors of terms that are pairs, two sums in one pass.
struct VecPair {
  Vec a, b;
};
struct Pair {
  float a, b;
};
template <class Term>
FA_INLINE Pair sum_pairs(int64_t C, Term term) {
  VecPair sums[4] = {};
  const auto add_to = [](VecPair* sum, VecPair terms) FA_STEP {
    sum->a += terms.a;
    sum->b += terms.b;
  };
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes)
    FA_FOR (i, 4) add_to(&sums[i], term(c + i * kLanes, Whole{}));
  for (; c + kLanes <= C; c += kLanes) add_to(&sums[0], term(c, Whole{}));
  if (c < C) add_to(&sums[1], term(c, First{C - c}));
  return {
      reduce_sum((sums[0].a + sums[1].a) + (sums[2].a + sums[3].a)),
      reduce_sum((sums[0].b + sums[1].b) + (sums[2].b + sums[3].b))};
}

// out = a, out = a + b, each in its own dtype.
template <class A, class Out>
static void convert(const A* a, Out* out, int64_t C) {
  map_vectors(out, C, false, [=](int64_t c, auto n) FA_STEP { return load(a + c, n); });
}
template <class A, class B>
static void add(const A* a, const B* b, float* out, int64_t C) {
  map_vectors(
      out, C, false, [=](int64_t c, auto n) FA_STEP { return load(a + c, n) + load(b + c, n); });
}

// ---- sums over rows ------------------------------------------------------------------------

// Rows in at most 64 blocks (fewer where a row is long: partial sums stay below 2 MB), each summed
// by itself in pieces of 64 rows; then the blocks' sums are added in order. Short chains of
// additions keep the rounding error that of a tree.
struct RowBlocks {
  int64_t R, width, rows, count;

  RowBlocks(int64_t R, int64_t C, int64_t width) : R(R), width(width) {
    const int64_t most = larger(8, smaller(64, (1 << 19) / larger(width, 1)));
    rows = larger(rows_per_task(C), cuts(R, most));
    count = cuts(R, rows);
  }
};

// add_row(row, sums) adds a row's terms to sums[0, width); the total of block b is at
// result + b * width. Slots 1 and 2 of the scratch.
template <class AddRow>
FA_INLINE float* sum_blocks(const RowBlocks& blocks, AddRow add_row) {
  constexpr int64_t piece_rows = 64;
  float* totals = thread_scratch(1, blocks.count * blocks.width);
  parallel_tasks(blocks.count, [&](int64_t block) {
    float* total = totals + block * blocks.width;
    float* piece = thread_scratch(2, blocks.width);
    std::memset(total, 0, blocks.width * sizeof(float));
    const int64_t end = smaller(blocks.R, (block + 1) * blocks.rows);
    for (int64_t first = block * blocks.rows; first < end; first += piece_rows) {
      std::memset(piece, 0, blocks.width * sizeof(float));
      for (int64_t row = first; row < smaller(end, first + piece_rows); ++row) add_row(row, piece);
      add(total, piece, total, blocks.width);
    }
  });
  return totals;
}

// out[c] = the sum over blocks of totals[block][first + c].
template <class T>
static void add_blocks(
    const RowBlocks& blocks, const float* totals, int64_t first, void* out, int64_t C) {
  parallel_spans(1, C, [&](int64_t, int64_t begin, int64_t end) {
    const float* column = totals + first + begin;
    T* sums = (T*)out + begin;
    for_vectors(end - begin, [&](int64_t c, auto n) FA_STEP {
      Vec sum = {};
      for (int64_t b = 0; b < blocks.count; ++b) sum += load(column + b * blocks.width + c, n);
      store(sums + c, sum, n);
    });
  });
}

}  // namespace fastattn::FASTATTN_ISA
