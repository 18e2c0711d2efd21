// What attention is made of: queries in vector lanes, keys and values broadcast from memory.
//
// A block of query rows is cut into groups of NV vectors (NV = 3, 2 or 1: W = NV * kLanes rows).
// Inside a group everything is transposed: QT (D x W), scores ST (keys x W), OT (Dv x W). So K and
// V are read as they lie, softmax is vertical, and only Q in and O out are transposed. The tile of
// a product is MR rows of broadcast scalars by NV vectors: 3 x 4 fills AVX2's 16 registers, 3 x 8
// AVX-512's 32.
//
// The operands of a product are words, fp32 or, with FASTATTN_PAIRS, pairs of bf16. A pair holds
// two neighbours of the dimension that the product sums over: of D in K by QT, of keys in V by P,
// of queries in P by dO. So a dimension of n entries is `words<Word>(n)` words, the last one filled
// up with 0.

namespace fastattn::FASTATTN_ISA {

#if defined(FASTATTN_AVX512) || defined(__aarch64__)
constexpr int tile_rows(int vectors) { return vectors == 1 ? 16 : 8; }
#else
constexpr int tile_rows(int vectors) { return vectors == 1 ? 8 : 4; }
#endif

constexpr int kGroupVectors = 3;
constexpr int kBlockVectors = 4 * kGroupVectors;
constexpr int kBlockRows = kBlockVectors * kLanes;
constexpr int64_t kTileKeys = 64;

// Whether products take a dtype in pairs. In fp32 bf16 would be exact, at half the rate.
FA_INLINE constexpr bool in_pairs([[maybe_unused]] Dtype dtype) {
#if defined(FASTATTN_PAIRS)
  return dtype == Dtype::bf16;
#else
  return false;
#endif
}

template <class Word>
constexpr int kPerWord = 1;  // terms of a sum
template <>
constexpr int kPerWord<bf16x2> = 2;
template <class Word>
FA_INLINE int64_t words(int64_t entries) {
  return cuts(entries, kPerWord<Word>);
}
template <class Word>
FA_INLINE Word* scratch(int slot, int64_t words) {
  return (Word*)thread_scratch(slot, words);
}

// Word rows in memory, `stride` apart.
template <class Word>
struct Tile {
  const Word* data;
  int64_t stride;
};

// ---- transposes ------------------------------------------------------------------------------

#if FASTATTN_LANES == 4
#define FA_ZIP(a, b, first) __builtin_shufflevector(a, b, first, first + 4, first + 1, first + 5)
#elif FASTATTN_LANES == 8
#define FA_ZIP(a, b, first) \
  __builtin_shufflevector(  \
      a, b, first, first + 8, first + 1, first + 9, first + 2, first + 10, first + 3, first + 11)
#else
#define FA_ZIP(a, b, first)                                                                       \
  __builtin_shufflevector(                                                                        \
      a, b, first, first + 16, first + 1, first + 17, first + 2, first + 18, first + 3,           \
      first + 19, first + 4, first + 20, first + 5, first + 21, first + 6, first + 22, first + 7, \
      first + 23)
#endif

// kLanes x kLanes in place: log2(kLanes) rounds of zipping row k with row k + kLanes / 2.
template <class V>
FA_INLINE void transpose(V (&x)[kLanes]) {
  for (int round = 1; round < kLanes; round *= 2) {
    V y[kLanes];
    FA_FOR (k, kLanes / 2) {
      y[2 * k] = FA_ZIP(x[k], x[k + kLanes / 2], 0);
      y[2 * k + 1] = FA_ZIP(x[k], x[k + kLanes / 2], kLanes / 2);
    }
    FA_FOR (k, kLanes) x[k] = y[k];
  }
}

// Lane k of the result is the sum of x[k]'s lanes: the same rounds, each halving the vectors by a
// sum.
FA_INLINE Vec add_lanes(Vec (&x)[kLanes]) {
  FA_FOR (round, 4) {
    const int half = kLanes >> (round + 1);
    FA_FOR (k, half) x[k] = FA_ZIP(x[k], x[k + half], 0) + FA_ZIP(x[k], x[k + half], kLanes / 2);
  }
  return x[0];
}

template <class T>
FA_INLINE float to_word(T x) {
  return to_float(x);
}
FA_INLINE bf16x2 to_word(bf16x2 x) { return x; }

// kLanes rows (null is a row of zeros) of `cols` entries as columns: entry c of row l goes to
// out[c * W + l].
template <class T, class Word>
static void pack_rows(const void* const* rows, int64_t cols, Word* out, int64_t W) {
  using V = decltype(load((const T*)nullptr));
  bool all = true;
  for (int l = 0; l < kLanes; ++l) all = all && rows[l] != nullptr;
  int64_t c = 0;
  if (all)
    for (; c + kLanes <= cols; c += kLanes) {
      V x[kLanes];
      FA_FOR (l, kLanes) x[l] = load((const T*)rows[l] + c);
      transpose(x);
      FA_FOR (l, kLanes) store(out + (c + l) * W, x[l]);
    }
  for (int l = 0; l < kLanes; ++l)
    for (int64_t d = c; d < cols; ++d)
      out[d * W + l] = rows[l] == nullptr ? Word{} : to_word(((const T*)rows[l])[d]);
}
static void pack(Dtype dtype, const void* const* rows, int64_t cols, float* out, int64_t W) {
  FASTATTN_DISPATCH(dtype, pack_rows, rows, cols, out, W);
}
static void pack(Dtype, const void* const* rows, int64_t cols, bf16x2* out, int64_t W) {
  pack_rows<bf16x2>(rows, cols / 2, out, W);
  if (cols % 2 == 0) return;
  for (int l = 0; l < kLanes; ++l)
    out[cols / 2 * W + l] = {rows[l] == nullptr ? bf16{} : ((const bf16*)rows[l])[cols - 1], {}};
}

// The way back: body(l, c, n, x) with entries [c, c + n) of row l, which are column c of `in` on.
template <class Body>
FA_INLINE void unpack_lanes(const float* in, int64_t W, int64_t cols, Body body) {
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) {
    Vec x[kLanes];  // not set to 0 first, which would take as long as the rest
    FA_FOR (l, kLanes) x[l] = load(in + (c + l) * W);
    transpose(x);
    FA_FOR (l, kLanes) body(l, c, kLanes, x[l]);
  }
  if (c == cols) return;
  Vec x[kLanes] = {};
  for (int64_t l = 0; l < cols - c; ++l) x[l] = load(in + (c + l) * W);
  transpose(x);
  for (int l = 0; l < kLanes; ++l) body(l, c, cols - c, x[l]);
}

// Column c of `in`, times factors, becomes entry c of every row that is not null.
template <class T>
static void unpack_rows(
    const float* in, int64_t W, int64_t cols, const float* factors, void* const* rows) {
  unpack_lanes(in, W, cols, [&](int l, int64_t c, int64_t n, Vec x) __attribute__((always_inline)) {
    if (rows[l] == nullptr) return;
    T* out = (T*)rows[l] + c;
    if (n == kLanes)
      store(out, x * splat(factors[l]));
    else
      store_first(out, x * splat(factors[l]), n);
  });
}
static void unpack(
    Dtype dtype, const float* in, int64_t W, int64_t cols, const float* factors,
    void* const* rows) {
  FASTATTN_DISPATCH(dtype, unpack_rows, in, W, cols, factors, rows);
}

// Adds column c of `in`, times factor, to entry c of every fp32 row that is not null.
static void unpack_add(const float* in, int64_t W, int64_t cols, float factor, void* const* rows) {
  unpack_lanes(in, W, cols, [&](int l, int64_t c, int64_t n, Vec x) __attribute__((always_inline)) {
    if (rows[l] == nullptr) return;
    float* row = (float*)rows[l] + c;
    if (n == kLanes)
      store(row, load(row) + x * splat(factor));
    else
      store_first(row, load_first(row, n) + x * splat(factor), n);
  });
}

template <class T>
static void widen_row(const void* row, int64_t cols, float* out) {
  const T* x = (const T*)row;
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) store(out + c, load(x + c));
  if (c < cols) store_first(out + c, load_first(x + c, cols - c), cols - c);
}
template <class T>
static void narrow_row(const float* x, int64_t cols, float factor, void* row) {
  T* out = (T*)row;
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes) store(out + c, load(x + c) * splat(factor));
  if (c < cols) store_first(out + c, load_first(x + c, cols - c) * splat(factor), cols - c);
}

// Two rows (null is a row of zeros) as one of pairs.
static void zip_rows(const void* low, const void* high, int64_t cols, bf16x2* out) {
  const bf16 *a = (const bf16*)low, *b = (const bf16*)high;
  int64_t c = 0;
  for (; c + kLanes <= cols; c += kLanes)
    store(out + c, widen(&a[c].bits) | (b == nullptr ? UVec{} : widen(&b[c].bits) << 16));
  for (; c < cols; ++c) out[c] = {a[c], b == nullptr ? bf16{} : b[c]};
}

FA_INLINE int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
FA_INLINE void* offset_by(void* data, Dtype dtype, int64_t entries) {
  return (char*)data + entries * bytes_of(dtype);
}

// Weights (n x W) as add_rows takes them, words over keys. `out` may be the place where they lie.
FA_INLINE const float* over_keys(const float* weights, int64_t, int64_t, float*) { return weights; }
FA_INLINE const bf16x2* over_keys(const float* weights, int64_t n, int64_t W, bf16x2* out) {
  for (int64_t k = 0; k < n; k += 2)
    for (int64_t l = 0; l < W; l += kLanes) {
      const Vec high = k + 1 < n ? load(weights + (k + 1) * W + l) : Vec{};
      store(out + k / 2 * W + l, pair(load(weights + k * W + l), high));
    }
  return out;
}

// And as add_outer takes them, words over queries: where they lie, rows W words apart as before.
FA_INLINE const float* over_queries(const float* weights, int64_t, int64_t, float*) {
  return weights;
}
FA_INLINE const bf16x2* over_queries(const float* weights, int64_t n, int64_t W, bf16x2* out) {
  for (int64_t k = 0; k < n; ++k)
    for (int64_t l = 0; l < W; l += kLanes)
      store_term((bf16*)(out + k * W) + l, load(weights + k * W + l));
  return out;
}

// ---- products --------------------------------------------------------------------------------

// s[r][v] += sum over d of rows[r][d] * columns[d][v]: K by QT, or V by dOT.
template <int NV, int MR, class Word>
FA_INLINE void dot_tile(
    const Word* rows, int64_t stride, const Word* columns, int64_t D, Vec (&s)[MR][NV]) {
  FA_FOR (r, MR)
    FA_FOR (v, NV) s[r][v] = Vec{};
  for (int64_t d = 0; d < D; ++d) {
    decltype(load(columns)) q[NV];
    FA_FOR (v, NV) q[v] = load(columns + (d * NV + v) * kLanes);
    FA_FOR (r, MR) {
      const auto k = splat(rows[r * stride + d]);
      FA_FOR (v, NV) s[r][v] = fma(k, q[v], s[r][v]);
    }
  }
}

// body(integral_constant R, k) for n rows, R at a time from row k on: whole tiles, then fours, then
// ones.
template <int MR, class Body>
FA_INLINE void for_tiles(int64_t n, Body body) {
  int64_t k = 0;
  for (; k + MR <= n; k += MR) body(std::integral_constant<int, MR>{}, k);
  for (; k + 4 <= n; k += 4) body(std::integral_constant<int, 4>{}, k);
  for (; k < n; ++k) body(std::integral_constant<int, 1>{}, k);
}

// out (n x W) = factor * (rows (n x D) by columns (D x W)), and the largest entry of each column.
// before(k, R): called where rows [k, k + R) are next, between products.
template <int NV, class Word, class Before>
FA_INLINE void dot_rows(
    const Tile<Word>& rows, int64_t n, const Word* columns, int64_t D, float factor, float* out,
    Vec (&largest)[NV], Before before) {
  for_tiles<tile_rows(NV)>(n, [&](auto size, int64_t k) __attribute__((always_inline)) {
    constexpr int rows_now = decltype(size)::value;
    before(k, rows_now);
    Vec s[rows_now][NV];
    dot_tile<NV, rows_now>(rows.data + k * rows.stride, rows.stride, columns, D, s);
    FA_FOR (r, rows_now)
      FA_FOR (v, NV) {
        const Vec x = s[r][v] * splat(factor);
        store(out + ((k + r) * NV + v) * kLanes, x);
        largest[v] = max(largest[v], x);
      }
  });
}

template <int NV, class Word>
FA_INLINE void dot_rows(
    const Tile<Word>& rows, int64_t n, const Word* columns, int64_t D, float factor, float* out,
    Vec (&largest)[NV]) {
  dot_rows<NV>(rows, n, columns, D, factor, out, largest, [](int64_t, int) {});
}

// out (cols x W) = out * alpha + rows^T (cols x n) by weights (n x W): O += V^T P, or dQ += K^T dS.
// The tile is summed by itself first: chains of 64 terms, not of Sk, keep the error that of blocked
// sums.
template <int NV, class Word>
FA_INLINE void add_rows(
    const Tile<Word>& rows, int64_t n, int64_t cols, const Word* weights, float* out,
    const Vec (&alpha)[NV]) {
  for_tiles<tile_rows(NV)>(cols, [&](auto size, int64_t c) __attribute__((always_inline)) {
    constexpr int cols_now = decltype(size)::value;
    Vec acc[cols_now][NV];
    FA_FOR (r, cols_now)
      FA_FOR (v, NV) acc[r][v] = Vec{};
    for (int64_t k = 0; k < n; ++k) {
      decltype(load(weights)) w[NV];
      FA_FOR (v, NV) w[v] = load(weights + (k * NV + v) * kLanes);
      FA_FOR (r, cols_now) {
        const auto x = splat(rows.data[k * rows.stride + c + r]);
        FA_FOR (v, NV) acc[r][v] = fma(x, w[v], acc[r][v]);
      }
    }
    FA_FOR (r, cols_now)
      FA_FOR (v, NV) {
        float* at = out + ((c + r) * NV + v) * kLanes;
        store(at, fma(load(at), alpha[v], acc[r][v]));
      }
  });
}

// sum (n x cols) += weights (n x q, rows W apart) by rows (q x cols): dV += P dO, dK += dS Q.
// `cols` is a multiple of kLanes: rows and sum are padded with zeros.
template <int MR, int NC, class Word>
FA_INLINE void outer_tile(
    const Word* weights, int64_t W, const Word* rows, int64_t q, int64_t cols, float* sum) {
  Vec acc[MR][NC];
  FA_FOR (r, MR)
    FA_FOR (v, NC) acc[r][v] = Vec{};
  for (int64_t i = 0; i < q; ++i) {
    decltype(load(rows)) x[NC];
    FA_FOR (v, NC) x[v] = load(rows + i * cols + v * kLanes);
    FA_FOR (r, MR) {
      const auto w = splat(weights[r * W + i]);
      FA_FOR (v, NC) acc[r][v] = fma(w, x[v], acc[r][v]);
    }
  }
  FA_FOR (r, MR)
    FA_FOR (v, NC) {
      float* at = sum + r * cols + v * kLanes;
      store(at, load(at) + acc[r][v]);
    }
}
#if defined(FASTATTN_AVX512) || defined(__aarch64__)
constexpr int kOuterRows = 6, kOuterVectors = 4;
#else
constexpr int kOuterRows = 6, kOuterVectors = 2;
#endif
template <int NC, class Word>
FA_INLINE void outer_columns(
    const Word* weights, int64_t W, int64_t n, const Word* rows, int64_t q, int64_t cols,
    float* sum) {
  int64_t k = 0;
  for (; k + kOuterRows <= n; k += kOuterRows)
    outer_tile<kOuterRows, NC>(weights + k * W, W, rows, q, cols, sum + k * cols);
  for (; k + 2 <= n; k += 2) outer_tile<2, NC>(weights + k * W, W, rows, q, cols, sum + k * cols);
  for (; k < n; ++k) outer_tile<1, NC>(weights + k * W, W, rows, q, cols, sum + k * cols);
}
template <class Word>
static __attribute__((noinline)) void add_outer(
    const Word* weights, int64_t W, int64_t n, const Word* rows, int64_t q, int64_t cols,
    float* sum) {
  int64_t c = 0;
  for (; c + kOuterVectors * kLanes <= cols; c += kOuterVectors * kLanes)
    outer_columns<kOuterVectors>(weights, W, n, rows + c, q, cols, sum + c);
  for (; c < cols; c += kLanes) outer_columns<1>(weights, W, n, rows + c, q, cols, sum + c);
}

}  // namespace fastattn::FASTATTN_ISA
