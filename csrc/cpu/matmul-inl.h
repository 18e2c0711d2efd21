// out = a b + bias, or out += a b. An entry is a sum over K in an order of its own: kTerms terms by
// one chain of FMAs, then the sums of the next kTerms, and so on. So its bits know nothing of M, N,
// or the threads, which a BLAS does not promise.
//
// A block of b's columns is packed as attention packs queries: NV vectors wide, one line for each
// k. Entries of a are broadcast from where they lie, or from a copy, line by line as they lie,
// where k is not their contiguous dimension.

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kTerms = 256;  // a packed block of 8 x 3 AVX-512 vectors takes 393 KB of L2

struct Matmul {
  const MatmulArgs& args;
  int64_t rows_each, cols_each;

  explicit Matmul(const MatmulArgs& args) : args(args), rows_each(256), cols_each(8 * width()) {
    // few tasks leave threads idle, and packing pays by rows; how a product is cut changes no bit
    while (tasks() < 16 && cols_each > width()) cols_each /= 2;
    rows_each = cuts(cuts(args.M, cuts(args.M, rows_each)), 8) * 8;
    while (tasks() < 16 && rows_each > 48) rows_each /= 2;
  }
  static constexpr int64_t width() { return kGroupVectors * kLanes; }
  int64_t col_blocks() const { return cuts(args.N, cols_each); }
  int64_t tasks() const { return cuts(args.M, rows_each) * col_blocks(); }

  void run(int64_t task) const {
    const int64_t row = task / col_blocks() * rows_each, col = task % col_blocks() * cols_each;
    const int64_t rows = smaller(rows_each, args.M - row), cols = smaller(cols_each, args.N - col);
    float* packed = thread_scratch(0, kTerms * cols_each);
    for (int64_t k = 0; k == 0 || k < args.K; k += kTerms) {
      const int64_t terms = smaller(kTerms, args.K - k);
      const Entries a = read_entries(row, rows, k, terms);
      pack_columns(k, terms, col, cols, packed);
      for (int64_t c = 0; c < cols; c += width())
        multiply_any(a, rows, terms, packed + c * kTerms, {row, col + c, cols - c, k == 0});
    }
  }

  // Rows of terms, or where by_terms terms of rows: entry (r, t) lies at r * stride + t, or the
  // other way round.
  struct Entries {
    const float* data;
    int64_t stride;
    bool by_terms;
  };
  Entries read_entries(int64_t row, int64_t rows, int64_t k, int64_t terms) const {
    const float* from = args.a + row * args.a_row + k * args.a_col;
    if (args.a_col == 1) return {from, args.a_row, false};
    float* copy = thread_scratch(1, rows_each * kTerms);
    for (int64_t t = 0; t < terms; ++t)
      for (int64_t r = 0; r < rows; ++r)
        copy[t * rows_each + r] = from[r * args.a_row + t * args.a_col];
    return {copy, rows_each, true};
  }

  // Group after group of `width` columns, at the distance that all terms would take.
  void pack_columns(int64_t k, int64_t terms, int64_t col, int64_t cols, float* packed) const {
    const float* from = args.b + k * args.b_row + col * args.b_col;
    for (int64_t c = 0; c < cols; c += width()) {
      const int64_t W = cuts(smaller(width(), cols - c), kLanes) * kLanes;
      for (int64_t lane = 0; lane < W; lane += kLanes) {
        const int64_t n = larger(0, smaller(kLanes, cols - c - lane));
        pack_lanes(from + (c + lane) * args.b_col, terms, n, packed + c * kTerms + lane, W);
      }
    }
  }
  void pack_lanes(const float* from, int64_t terms, int64_t n, float* out, int64_t W) const {
    if (args.b_row == 1) {
      const void* lines[kLanes] = {};
      for (int64_t l = 0; l < n; ++l) lines[l] = from + l * args.b_col;
      return pack_rows<float>(lines, terms, out, W);
    }
    for (int64_t t = 0; t < terms; ++t) {
      const float* line = from + t * args.b_row;
      if (args.b_col == 1)
        store(out + t * W, n == kLanes ? load(line) : load_first(line, n));
      else
        for (int64_t l = 0; l < kLanes; ++l) out[t * W + l] = l < n ? line[l * args.b_col] : 0.f;
    }
  }

  struct Place {
    int64_t row, col, cols;
    bool first;  // nothing of this product stands there yet
  };

  void multiply_any(
      const Entries& a, int64_t rows, int64_t terms, const float* packed, Place place) const {
    switch (smaller(kGroupVectors, cuts(place.cols, kLanes))) {
      case 3: return multiply<3>(a, rows, terms, packed, place);
      case 2: return multiply<2>(a, rows, terms, packed, place);
      default: return multiply<1>(a, rows, terms, packed, place);
    }
  }

  template <int NV>
  void multiply(
      const Entries& a, int64_t rows, int64_t terms, const float* packed, Place place) const {
    if (a.by_terms)
      multiply_by<NV, true>(a, rows, terms, packed, place);
    else
      multiply_by<NV, false>(a, rows, terms, packed, place);
  }

  template <int NV, bool kByTerms>
  __attribute__((noinline)) void multiply_by(
      const Entries& a, int64_t rows, int64_t terms, const float* packed, Place place) const {
    for_tiles<tile_rows(NV)>(rows, [&](auto size, int64_t r) FA_STEP {
      const float* from = a.data + (kByTerms ? r : r * a.stride);
      put_tile<NV, decltype(size)::value, kByTerms>(from, a.stride, terms, packed, place, r);
    });
  }

  template <int NV, int MR, bool kByTerms>
  FA_STEP void put_tile(
      const float* a, int64_t stride, int64_t terms, const float* packed, Place place,
      int64_t r0) const {
    Vec s[MR][NV];
    FA_FOR (r, MR)
      FA_FOR (v, NV) s[r][v] = Vec{};
    for (int64_t t = 0; t < terms; ++t) {
      Vec b[NV];
      FA_FOR (v, NV) b[v] = load(packed + (t * NV + v) * kLanes);
      FA_FOR (r, MR) {
        const Vec x = splat(kByTerms ? a[t * stride + r] : a[r * stride + t]);
        FA_FOR (v, NV) s[r][v] = fma(x, b[v], s[r][v]);
      }
    }
    FA_FOR (r, MR)
      FA_FOR (v, NV) {
        const int64_t at = place.col + v * kLanes;
        float* out = args.out + (place.row + r0 + r) * args.out_row + at;
        put(s[r][v], out, at, smaller(kLanes, place.cols - v * kLanes), place.first);
      }
  }

  FA_STEP void put(Vec sum, float* out, int64_t col, int64_t n, bool first) const {
    const bool whole = n == kLanes;
    if (args.add || !first) sum += whole ? load(out) : load_first(out, n);
    if (first && args.bias != nullptr)
      sum += whole ? load(args.bias + col) : load_first(args.bias + col, n);
    if (whole)
      store(out, sum);
    else
      store_first(out, sum, n);
  }
};

static void matmul(const MatmulArgs& args) {
  if (args.M == 0 || args.N == 0 || (args.K == 0 && args.add)) return;
  const Matmul product(args);
  parallel_tasks(product.tasks(), [&](int64_t task) { product.run(task); });
}

}  // namespace fastattn::FASTATTN_ISA
