// y = x W^T + bias, with W (N, K) in int8 or bf16 and x rounded nowhere.
//
// Rows of x and of W are both contiguous in K, so that an entry of y is a dot product of rows, with
// lanes along K, and W is read as it lies. The sum over K takes kPiece terms at a time, in two
// chains of FMAs a lane; then the pieces are added in order, then the lanes. That order is the same
// for few rows, which multiply W as it is read, and for many, which multiply a block of W's rows
// that was converted before: the bits of a row know nothing of other rows, nor of threads.
//
// Operands are words, as attention's: fp32, or pairs of bf16 where x is bf16 as well and
// FASTATTN_PAIRS. One scale a row of W multiplies the row's sums; scales of groups multiply W.

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kPiece = 1024;
constexpr int kChains = 2;
#if defined(FASTATTN_AVX512) || defined(__aarch64__)
constexpr int kDotRows = 3, kDotCols = 4;  // times kChains: 24 sums in 32 registers
#else
constexpr int kDotRows = 2, kDotCols = 3;
#endif
constexpr int64_t kRowBlock = 48, kColBlock = 48;  // multiples of kDotRows, kDotCols and kLanes
constexpr int64_t kRowsAtOnce = 4;

template <class Word>
constexpr int64_t kVectorTerms = kPerWord<Word> * kLanes;
template <class Word>
constexpr int64_t kStepTerms = kChains * kVectorTerms<Word>;

// A vector of words from memory that holds T: converted, or as it lies.
template <class Word, class T>
FA_INLINE auto load_words(const T* p) {
  if constexpr (std::is_same_v<Word, float>)
    return load(p);
  else
    return load((const Word*)p);
}

// GCC reads a value anew for each use where an instruction can take it from memory.
template <class V>
FA_INLINE V in_register(V v) {
#if defined(FASTATTN_AVX2) || defined(FASTATTN_AVX512)
  asm("" : "+v"(v));
#endif
  return v;
}

// out = a row of n entries in words, filled up with 0 to whole steps.
template <class Word, class T>
FA_INLINE void convert_row(const T* row, int64_t n, Word* out) {
  constexpr int64_t step = kStepTerms<Word>;
  int64_t k = 0;
  for (; k + kVectorTerms<Word> <= n; k += kVectorTerms<Word>)
    store(out + k / kPerWord<Word>, load_words<Word>(row + k));
  T last[step] = {};
  std::memcpy(last, row + k, (n - k) * sizeof(T));
  for (int64_t at = 0; k < cuts(n, step) * step; at += kVectorTerms<Word>, k += kVectorTerms<Word>)
    store(out + k / kPerWord<Word>, load_words<Word>(last + at));
}

// sums[i * kColBlock + j] = or += row i of x by row j of w, over `count` words.
template <int MR, class Word>
__attribute__((noinline)) void dot_tile(
    const Tile<Word>& x, const Tile<Word>& w, int64_t count, Vec* sums, bool first) {
  Vec acc[MR][kDotCols][kChains] = {};
  for (int64_t k = 0; k < count; k += kChains * kLanes)
    FA_FOR (chain, kChains) {
      const int64_t at = k + chain * kLanes;
      decltype(load(w.data)) words[kDotCols];
      FA_FOR (j, kDotCols) words[j] = in_register(load(w.data + j * w.stride + at));
      FA_FOR (i, MR) {
        const auto row = load(x.data + i * x.stride + at);
        FA_FOR (j, kDotCols) acc[i][j][chain] = fma(row, words[j], acc[i][j][chain]);
      }
    }
  FA_FOR (i, MR)
    FA_FOR (j, kDotCols) {
      Vec* sum = sums + i * kColBlock + j;
      const Vec piece = acc[i][j][0] + acc[i][j][1];
      *sum = first ? piece : *sum + piece;
    }
}

// Word: of the operands. S: what W is stored in.
template <class Word, class S, bool kGrouped>
struct Linear {
  const LinearArgs& args;
  Memory memory;
  Tile<Word> x;  // rows in words, filled up with 0 to whole steps

  static constexpr int64_t kTerms = kVectorTerms<Word>, kStep = kStepTerms<Word>;
  static constexpr int64_t words(int64_t terms) { return terms / kPerWord<Word>; }
  int64_t padded() const { return cuts(args.K, kStep) * kStep; }
  int64_t groups() const { return cuts(args.K, args.group); }

  void run() {
    prepare();
    if (args.R <= 2 * kRowsAtOnce)
      parallel_tasks(cuts(args.N, kColBlock), [&](int64_t task) { few_rows(task * kColBlock); });
    else
      many_rows();
  }

  // ---- x --------------------------------------------------------------------------------------

  void prepare() {
    if (lies_ready()) {
      x = {(const Word*)args.x.data, args.x.dims ? args.x.stride[0] / kPerWord<Word> : 0};
      return;
    }
    const int64_t stride = words(padded()), total = args.R * stride;
    Word* rows = (Word*)(total <= 1 << 16 ? thread_scratch(3, total) : memory.reserve(total));
    x = {rows, stride};
    parallel_rows(args.R, args.K, [&](int64_t row) {
      FASTATTN_DISPATCH(args.dtype, convert_x, row, rows + row * stride);
    });
  }
  bool lies_ready() const {
    const bool same = std::is_same_v<Word, float> ? args.dtype == Dtype::f32 : true;
    const bool even = args.x.dims == 0 || args.x.stride[0] % kPerWord<Word> == 0;
    return same && even && args.K % kStep == 0 && args.x.dims <= 1;
  }
  template <class T>
  void convert_x(int64_t row, Word* out) const {
    convert_row<Word>(row_of<const T>(args.x, row), args.K, out);
  }

  // ---- few rows of x: W is multiplied as it is read
  // ----------------------------------------------

  void few_rows(int64_t col) const {
    const int64_t cols = smaller(kColBlock, args.N - col);
    Vec* sums = (Vec*)thread_scratch(1, kRowsAtOnce * kColBlock * kLanes);
    for (int64_t row = 0; row < args.R; row += kRowsAtOnce) {
      const int64_t rows = smaller(kRowsAtOnce, args.R - row);
      for (int64_t c = 0; c < cols; ++c) multiply_row(rows, row, col + c, sums + c);
      finish(row, rows, col, cols, sums);
    }
  }
  void multiply_row(int64_t rows, int64_t row, int64_t n, Vec* sums) const {
    switch (rows) {
      case 1: return dot_row<1>(row, n, sums);
      case 2: return dot_row<2>(row, n, sums);
      case 3: return dot_row<3>(row, n, sums);
      default: return dot_row<4>(row, n, sums);
    }
  }

  // sums[r * kColBlock] = row row + r of x by row n of W. One row of W at a time: two or four side
  // by side take half as long again, for the prefetcher follows lines in order.
  template <int MR>
  __attribute__((noinline)) void dot_row(int64_t row, int64_t n, Vec* sums) const {
    const S* w = (const S*)args.weight + n * args.K;
    const Word* from = x.data + row * x.stride;
    for (int64_t piece = 0; piece == 0 || piece < args.K; piece += kPiece) {
      const int64_t end = smaller(args.K, piece + kPiece);
      Vec acc[MR][kChains] = {};
      for (int64_t k = piece; k < end; k = end_of_scale(k, end))
        dot_scaled<MR>(w, from, k, end_of_scale(k, end), scale_at(n, k), acc);
      FA_FOR (r, MR) {
        Vec* sum = sums + r * kColBlock;
        const Vec terms = acc[r][0] + acc[r][1];
        *sum = piece == 0 ? terms : *sum + terms;
      }
    }
  }
  template <int MR>
  __attribute__((always_inline)) void dot_scaled(
      const S* w, const Word* from, int64_t k, int64_t end, Vec scale,
      Vec (&acc)[MR][kChains]) const {
    for (; k + kStep <= end; k += kStep) dot_step<MR>(w + k, from + words(k), scale, acc);
    if (k == end) return;
    S rest[kStep] = {};
    std::memcpy(rest, w + k, (end - k) * sizeof(S));
    dot_step<MR>(rest, from + words(k), scale, acc);
  }
  template <int MR>
  __attribute__((always_inline)) void dot_step(
      const S* w, const Word* from, Vec scale, Vec (&acc)[MR][kChains]) const {
    FA_FOR (chain, kChains) {
      auto terms = load_words<Word>(w + chain * kTerms);
      if constexpr (kGrouped) terms *= scale;
      FA_FOR (r, MR)
        acc[r][chain] = fma(load(from + r * x.stride + chain * kLanes), terms, acc[r][chain]);
    }
  }

  // Where the scale of term k ends, and what it is. A group is a multiple of kStep.
  int64_t end_of_scale(int64_t k, int64_t end) const {
    return kGrouped ? smaller(end, (k / args.group + 1) * args.group) : end;
  }
  Vec scale_at(int64_t n, int64_t k) const {
    return splat(kGrouped ? args.scale[n * groups() + k / args.group] : 1.f);
  }

  // ---- many rows: a block of W in words, then tiles of x by it
  // ------------------------------------

  void many_rows() const {
    const int64_t col_blocks = cuts(args.N, kColBlock), row_blocks = cuts(args.R, kRowBlock);
    // a task converts its part of W: the fewer the better, as long as no thread is idle
    const int64_t parts = smaller(row_blocks, cuts(16, col_blocks));
    const int64_t rows = cuts(row_blocks, parts) * kRowBlock;
    parallel_tasks(col_blocks * parts, [&](int64_t task) {
      const int64_t row = task / col_blocks * rows;
      if (row < args.R) multiply(row, smaller(args.R, row + rows), task % col_blocks * kColBlock);
    });
  }

  void multiply(int64_t begin, int64_t end, int64_t col) const {
    const int64_t cols = smaller(kColBlock, args.N - col);
    const Word* block = convert_columns(col, cols);
    Vec* sums = (Vec*)thread_scratch(1, kRowBlock * kColBlock * kLanes);
    for (int64_t row = begin; row < end; row += kRowBlock) {
      const int64_t rows = smaller(kRowBlock, end - row);
      for (int64_t piece = 0; piece == 0 || piece < args.K; piece += kPiece) {
        const int64_t count = words(smaller(kPiece, padded() - piece));
        for (int64_t c = 0; c < cols; c += kDotCols)
          for (int64_t r = 0; r < rows; r += kDotRows)
            multiply_tile(
                smaller(kDotRows, rows - r),
                {x.data + (row + r) * x.stride + words(piece), x.stride},
                {block + (piece / kPiece * kColBlock + c) * kStride, kStride}, count,
                sums + r * kColBlock + c, piece == 0);
      }
      finish(row, rows, col, cols, sums);
    }
  }
  // Words from a row of a block to the next: not 4096 bytes, whose multiples share lines of a
  // cache.
  static constexpr int64_t kStride = kPiece / kPerWord<Word> + 16;

  static void multiply_tile(
      int64_t rows, const Tile<Word>& x, const Tile<Word>& w, int64_t count, Vec* sums,
      bool first) {
    switch (rows) {
      case 1: return dot_tile<1>(x, w, count, sums, first);
      case 2: return dot_tile<2>(x, w, count, sums, first);
      default: return dot_tile<kDotRows>(x, w, count, sums, first);
    }
  }

  // Rows of W in words from `col` on: piece after piece, kColBlock rows in each.
  const Word* convert_columns(int64_t col, int64_t cols) const {
    Word* block = (Word*)thread_scratch(0, cuts(args.K, kPiece) * kColBlock * kStride);
    for (int64_t piece = 0; piece < args.K; piece += kPiece)
      for (int64_t c = 0; c < cuts(cols, kDotCols) * kDotCols; ++c)
        // a tile's columns past the last are copies of it, which nobody reads
        convert_column(
            col + smaller(c, cols - 1), piece, block + (piece / kPiece * kColBlock + c) * kStride);
    return block;
  }
  void convert_column(int64_t n, int64_t piece, Word* out) const {
    const int64_t end = smaller(args.K, piece + kPiece);
    convert_row<Word>((const S*)args.weight + n * args.K + piece, end - piece, out);
    if constexpr (kGrouped)
      for (int64_t k = piece; k < end; k = end_of_scale(k, end))
        for (int64_t at = k; at < end_of_scale(k, end); at += kLanes)
          store(out + at - piece, load(out + at - piece) * scale_at(n, k));
  }

  // ---- y --------------------------------------------------------------------------------------

  void finish(int64_t row, int64_t rows, int64_t col, int64_t cols, const Vec* sums) const {
    FASTATTN_DISPATCH(args.dtype, finish_as, row, rows, col, cols, sums);
  }
  template <class T>
  void finish_as(int64_t row, int64_t rows, int64_t col, int64_t cols, const Vec* sums) const {
    for (int64_t r = 0; r < rows; ++r) {
      T* y = row_of<T>(args.y, row + r) + col;
      for_vectors(cols, [&](int64_t c, auto n) FA_STEP {
        Vec lanes[kLanes];
        FA_FOR (l, kLanes) lanes[l] = sums[r * kColBlock + c + l];
        Vec sum = add_lanes(lanes);
        if (!kGrouped && args.scale != nullptr) sum *= load(args.scale + col + c, n);
        if (args.bias != nullptr) sum += load(args.bias + col + c, n);
        store(y + c, sum, n);
      });
    }
  }
};

template <class Word, class S, bool kGrouped = false>
static void linear_in(const LinearArgs& args) {
  Linear<Word, S, kGrouped>{args, {}, {}}.run();
}

static void linear(const LinearArgs& args) {
  if (args.R == 0 || args.N == 0) return;
  if (args.scale == nullptr)
    return in_pairs(args.dtype) ? linear_in<bf16x2, bf16>(args) : linear_in<float, bf16>(args);
  if (args.group < args.K) return linear_in<float, int8_t, true>(args);
  linear_in<float, int8_t>(args);
}

}  // namespace fastattn::FASTATTN_ISA
