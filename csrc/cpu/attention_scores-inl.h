// Which keys a query sees, and what happens to a tile of scores before the softmax. One place for
// every feature: forward, backward and the bias's gradient call the same functions.

namespace fastattn::FASTATTN_ISA {

// One sequence of the batch. Key j is on the diagonal of query i where j = i + diagonal.
struct Sequence {
  int64_t b, query_start, key_start;  // starts are 0 unless packed
  int64_t Sq, Sk;                     // Sk: keys that may be read
  int64_t diagonal;
};

static Sequence sequence(const AttentionArgs& args, int64_t b) {
  Sequence s{b, 0, 0, args.Sq, args.Sk, args.Sk - args.Sq};
  if (args.cu_seqlens_q != nullptr) {
    s.query_start = args.cu_seqlens_q[b];
    s.key_start = args.cu_seqlens_k[b];
    s.Sq = args.cu_seqlens_q[b + 1] - s.query_start;
    s.Sk = args.cu_seqlens_k[b + 1] - s.key_start;
    s.diagonal = s.Sk - s.Sq;
  } else if (args.key_lengths != nullptr) {
    s.Sk = args.key_lengths[b];
    if (args.diagonal_at_length) s.diagonal = s.Sk - s.Sq;
  }
  return s;
}

// Pieces of sequences that differ in length (tasks, blocks, chunks), counted up.
struct Pieces {
  int64_t B;
  int64_t* ends;  // (B,): pieces of this and all earlier sequences

  template <class Count>
  Pieces(const AttentionArgs& args, int64_t* memory, Count count) : B(args.B), ends(memory) {
    for (int64_t b = 0, sum = 0; b < B; ++b) ends[b] = sum += count(sequence(args, b));
  }
  int64_t total() const { return B == 0 ? 0 : ends[B - 1]; }
  int64_t begin(int64_t b) const { return b == 0 ? 0 : ends[b - 1]; }
  int64_t of(int64_t b) const { return ends[b] - begin(b); }
  int64_t sequence_of(int64_t piece) const {
    int64_t low = 0, high = B - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ends[middle] <= piece)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

// A half-open range of keys.
struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// The keys that query i sees by position: causal is a right window of 0 (DESIGN, section 3).
FA_INLINE Range visible(const AttentionArgs& args, const Sequence& s, int64_t i) {
  const int64_t middle = i + s.diagonal;
  return {larger(0, middle - args.window_left), smaller(s.Sk, middle + args.window_right + 1)};
}

// A block of query rows of one key/value head. Where queries are few, the rows of all heads that
// share the keys stand together, so that K and V are read once for them.
struct Block {
  int rows, vectors;
  int64_t first;                               // row of the first lane, among heads_together * Sq
  Range keys;                                  // seen by at least one row
  int64_t head[kBlockRows];                    // query head of each lane
  int64_t query[kBlockRows];                   // query index of each lane
  int32_t begin[kBlockRows], end[kBlockRows];  // keys that it sees
};

// Below this many queries the heads of a group share a block. It depends on Sq alone, so that
// neither batch nor threads change a bit.
constexpr int64_t kFewQueries = 16;

FA_INLINE int64_t heads_together(const AttentionArgs& args, const Sequence& s) {
  return s.Sq <= kFewQueries ? args.Hq / args.Hkv : 1;
}

// Rows in blocks of equal size, whole groups where there is more than one block.
struct Blocks {
  int64_t rows, rows_each, count;

  explicit Blocks(int64_t rows) : rows(rows) {
    const int64_t vectors = cuts(rows, kLanes);
    count = cuts(vectors, kBlockVectors);
    int64_t each = count == 0 ? 0 : cuts(vectors, count);
    if (count > 1) each = cuts(each, kGroupVectors) * kGroupVectors;
    rows_each = each * kLanes;
    count = each == 0 ? 0 : cuts(rows, rows_each);
  }
};

static void set_block(
    const AttentionArgs& args, const Sequence& s, int64_t first_head, const Blocks& blocks,
    int64_t index, Block* block) {
  block->first = index * blocks.rows_each;
  block->rows = (int)smaller(blocks.rows_each, blocks.rows - block->first);
  block->vectors = (int)cuts(block->rows, kLanes);
  block->keys = {INT64_MAX, 0};
  for (int r = 0; r < block->vectors * kLanes; ++r) {
    const bool real = r < block->rows;
    const int64_t row = block->first + (real ? r : 0);
    block->head[r] = first_head + row / s.Sq;
    block->query[r] = row % s.Sq;
    Range seen = visible(args, s, block->query[r]);
    if (!real || seen.empty()) seen = {0, 0};
    block->begin[r] = (int32_t)seen.begin;
    block->end[r] = (int32_t)seen.end;
    if (seen.empty()) continue;
    block->keys.begin = smaller(block->keys.begin, seen.begin);
    block->keys.end = larger(block->keys.end, seen.end);
  }
}

// A group of a block: lanes [lane, lane + vectors * kLanes).
struct Group {
  int lane, vectors;
  Range some, all;  // keys that some row sees, and that all do
};

static int split_groups(const Block& block, Group* groups) {
  int count = 0;
  for (int v = 0; v < block.vectors;) {
    const int left = block.vectors - v;
    const int vectors = left == 4              ? 2
                        : left < kGroupVectors ? left
                                               : kGroupVectors;  // never a lone one
    Group group{v * kLanes, vectors, {INT64_MAX, 0}, {0, INT64_MAX}};
    for (int r = group.lane; r < group.lane + vectors * kLanes; ++r) {
      if (r < block.rows) {
        group.all.begin = larger(group.all.begin, block.begin[r]);
        group.all.end = smaller(group.all.end, block.end[r]);
      }
      if (block.begin[r] >= block.end[r]) continue;
      group.some.begin = smaller(group.some.begin, block.begin[r]);
      group.some.end = larger(group.some.end, block.end[r]);
    }
    groups[count++] = group;
    v += vectors;
  }
  return count;
}

// ---- a tile of scores: n keys from `key`, by the lanes of a group -----------------------------

// True where a call needs more than products and positions.
FA_INLINE bool is_featured(const AttentionArgs& args) {
  return args.bias.data != nullptr || args.mask.data != nullptr ||
         args.alibi_slopes.data != nullptr || args.softcap > 0 || args.sinks.data != nullptr ||
         args.dropout;
}

// tanh to 2e-7 relative: a polynomial (Cephes) near 0, where 1 - 2 / (e^2x + 1) cancels.
FA_INLINE Vec softcap_tanh(Vec x) {
  const Vec z = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const Vec near = fma(p * z, x, x);
  const Vec size = x < Vec{} ? -x : x;
  const Vec e = exp(min(splat(20.f), size) * splat(2.f));  // tanh(9.1) is 1 in fp32 already
  const Vec far = splat(1.f) - splat(2.f) / (e + splat(1.f));
  return size < splat(0.625f) ? near : x != x ? x : x < Vec{} ? -far : far;
}

// Columns [key, key + n) of a broadcast tensor as (n x W), lanes in columns. Slot 8 of the scratch.
template <class T>
static const float* gather_scores(
    const Scores& x, const Block& block, const Group& group, const Sequence& s, int64_t key,
    int64_t n) {
  const int W = group.vectors * kLanes;
  float* tile = thread_scratch(8, n * W);
  for (int v = 0; v < group.vectors; ++v) {
    const void* rows[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int r = group.lane + v * kLanes + l;
      rows[l] = (const T*)x.data + x.at(s.b, block.head[r], block.query[r]) + key * x.col;
    }
    float* out = tile + v * kLanes;
    if (x.col == 1) {
      pack_rows<T>(rows, n, out, W);
      continue;
    }
    for (int64_t k = 0; k < n; ++k)
      for (int l = 0; l < kLanes; ++l) out[k * W + l] = to_float(((const T*)rows[l])[k * x.col]);
  }
  return tile;
}
static const float* gather(
    const Scores& x, const Block& block, const Group& group, const Sequence& s, int64_t key,
    int64_t n) {
  switch (x.dtype) {
    case Dtype::bf16: return gather_scores<bf16>(x, block, group, s, key, n);
    case Dtype::f16: return gather_scores<fp16>(x, block, group, s, key, n);
    default: return gather_scores<float>(x, block, group, s, key, n);
  }
}

// Asks for the bias and the mask of a tile, some rows at a time between the products that come
// first: all at once would wait for each other.
struct ScoresAhead {
  const AttentionArgs& args;
  const Block& block;
  const Group& group;
  const Sequence& s;
  int64_t key, n;

  void operator()(int64_t k, int rows) const {
    if (args.bias.data == nullptr && args.mask.data == nullptr) return;
    const int W = group.vectors * kLanes;  // as many of them as of the n products' rows
    for (int64_t r = k * W / n; r < (k + rows) * W / n; ++r) {
      ask(args.bias, bytes_of(args.bias.dtype), group.lane + r);
      ask(args.mask, 1, group.lane + r);
    }
  }
  void ask(const Scores& x, int64_t size, int64_t r) const {
    if (x.data == nullptr || x.col != 1) return;
    const int64_t at = x.at(s.b, block.head[r], block.query[r]) + key;
    prefetch((const char*)x.data + at * size, n * size);
  }
};

// s = softcap * tanh(s / softcap); `slope` receives 1 - tanh^2, the derivative, where wanted.
static void cap_scores(float softcap, int64_t entries, float* scores, float* slope) {
  const Vec cap = splat(softcap), inverse = splat(1.f / softcap);
  for (int64_t e = 0; e < entries; e += kLanes) {
    const Vec t = softcap_tanh(load(scores + e) * inverse);
    store(scores + e, t * cap);
    if (slope != nullptr) store(slope + e, splat(1.f) - t * t);
  }
}

static void subtract_alibi(
    const AttentionArgs& args, const Block& block, const Group& group, const Sequence& s,
    int64_t key, int64_t n, float* scores) {
  for (int v = 0; v < group.vectors; ++v) {
    Vec slope, middle;
    for (int l = 0; l < kLanes; ++l) {
      const int r = group.lane + v * kLanes + l;
      slope[l] = args.alibi_slopes.at(s.b, block.head[r]);
      middle[l] = (float)(block.query[r] + s.diagonal);
    }
    for (int64_t k = 0; k < n; ++k) {
      const Vec distance = middle - splat((float)(key + k));
      float* at = scores + (k * group.vectors + v) * kLanes;
      store(at, load(at) - slope * (distance < Vec{} ? -distance : distance));
    }
  }
}

static void add_tile(const float* tile, int64_t entries, float* scores) {
  for (int64_t e = 0; e < entries; e += kLanes)
    store(scores + e, load(scores + e) + load(tile + e));
}
static void keep_tile(const float* tile, int64_t entries, float* scores) {
  for (int64_t e = 0; e < entries; e += kLanes)
    store(scores + e, load(tile + e) != Vec{} ? load(scores + e) : splat(-kInf));
}

// softcap, bias, ALiBi and mask, in this order. cap_slope: as in cap_scores.
static __attribute__((noinline)) void modify_scores(
    const AttentionArgs& args, const Block& block, const Group& group, const Sequence& s,
    int64_t key, int64_t n, float* scores, float* cap_slope) {
  const int64_t entries = n * group.vectors * kLanes;
  if (args.softcap > 0) cap_scores(args.softcap, entries, scores, cap_slope);
  if (args.bias.data != nullptr)
    add_tile(gather(args.bias, block, group, s, key, n), entries, scores);
  if (args.alibi_slopes.data != nullptr) subtract_alibi(args, block, group, s, key, n, scores);
  if (args.mask.data != nullptr)
    keep_tile(gather_scores<uint8_t>(args.mask, block, group, s, key, n), entries, scores);
}

// -inf where a row does not see a key by position.
static __attribute__((noinline)) void hide_scores(
    const Block& block, const Group& group, int64_t key, int64_t n, float* scores) {
  for (int v = 0; v < group.vectors; ++v) {
    IVec begin, end;
    __builtin_memcpy(&begin, block.begin + group.lane + v * kLanes, sizeof begin);
    __builtin_memcpy(&end, block.end + group.lane + v * kLanes, sizeof end);
    for (int64_t k = 0; k < n; ++k) {
      const IVec j = IVec{} + (int32_t)(key + k);
      float* at = scores + (k * group.vectors + v) * kLanes;
      store(at, ((begin <= j) & (j < end)) ? load(at) : splat(-kInf));
    }
  }
}

// philox4x32 with the second and third counter of each lane its own.
FA_INLINE void philox_lanes(
    uint32_t quad, UVec query, UVec head, const PhiloxKey& key, UVec (&word)[4]) {
  uint32_t key0 = (uint32_t)key.seed, key1 = (uint32_t)(key.seed >> 32);
  word[0] = UVec{} + quad;
  word[1] = query;
  word[2] = head;
  word[3] = UVec{} + key.offset;
  FA_FOR (round, 10) {
    UVec high0, low0, high1, low1;
    multiply(word[0], 0xD2511F53, &high0, &low0);
    multiply(word[2], 0xCD9E8D57, &high1, &low1);
    word[0] = high1 ^ word[1] ^ key0;
    word[1] = low1;
    word[2] = high0 ^ word[3] ^ key1;
    word[3] = low0;
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

// Multiplies (n x W) weights by what dropout keeps: keep_scale or 0.
static __attribute__((noinline)) void drop_weights(
    const AttentionArgs& args, const Block& block, const Group& group, const Sequence& s,
    int64_t key, int64_t n, float* weights) {
  const PhiloxKey philox = philox_key(args.philox);
  for (int v = 0; v < group.vectors; ++v) {
    UVec query, head;
    for (int l = 0; l < kLanes; ++l) {
      const int r = group.lane + v * kLanes + l;
      query[l] = (uint32_t)block.query[r];
      head[l] = (uint32_t)(s.b * args.Hq + block.head[r]);
    }
    for (int64_t quad = key / 4; quad * 4 < key + n; ++quad) {
      UVec word[4];
      philox_lanes((uint32_t)quad, query, head, philox, word);
      FA_FOR (w, 4) {
        const int64_t k = quad * 4 + w - key;
        if (k < 0 || k >= n) continue;
        float* at = weights + (k * group.vectors + v) * kLanes;
        store(at, load(at) * (word[w] >= args.drop_below ? splat(args.keep_scale) : Vec{}));
      }
    }
  }
}

// ---- rows of a block -------------------------------------------------------------------------

FA_INLINE int64_t padded(int64_t cols) { return cuts(cols, kLanes) * kLanes; }

FA_INLINE const void* block_row(const Block& block, const Heads& x, const Sequence& s, int r) {
  return offset_by(x.data, x.dtype, x.at(s.b, block.head[r], s.query_start + block.query[r]));
}
// Row r of words: a row in fp32, or rows 2 r and 2 r + 1.
static void read_block_row(
    const Block& block, const Heads& x, const Sequence& s, int r, int64_t cols, float* out) {
  FASTATTN_DISPATCH(x.dtype, widen_row, block_row(block, x, s, r), cols, out);
}
static void read_block_row(
    const Block& block, const Heads& x, const Sequence& s, int r, int64_t cols, bf16x2* out) {
  const void* next = 2 * r + 1 < block.rows ? block_row(block, x, s, 2 * r + 1) : nullptr;
  zip_rows(block_row(block, x, s, 2 * r), next, cols, out);
}

// The rows of a block as words over queries, each padded with zeros.
template <class Word>
static void read_block_rows(
    const Block& block, const Heads& x, const Sequence& s, int64_t cols, Word* out) {
  const int64_t width = padded(cols);
  for (int r = 0; r < words<Word>(block.rows); ++r) {
    if (width > 0) std::memset(out + r * width + width - kLanes, 0, kLanes * sizeof(Word));
    read_block_row(block, x, s, r, cols, out + r * width);
  }
}

// ---- keys and values -------------------------------------------------------------------------

FA_INLINE const void* key_row(
    const AttentionArgs& args, const Heads& x, const Sequence& s, int64_t head, int64_t j) {
  if (args.paging.table == nullptr)
    return offset_by(x.data, x.dtype, x.at(s.b, head, s.key_start + j));
  const int32_t page = args.paging.table[s.b * args.paging.batch + j / args.paging.page_size];
  return offset_by(x.data, x.dtype, x.at(page, head, j % args.paging.page_size));
}

// Keys [key, key + n) of a head as rows of words over D: where they lie, or copied into buffer.
static Tile<float> read_keys(
    const AttentionArgs& args, const Heads& x, const Sequence& s, int64_t head, int64_t key,
    int64_t n, int64_t cols, float* buffer) {
  if (x.dtype == Dtype::f32 && args.paging.table == nullptr)
    return {(const float*)key_row(args, x, s, head, key), x.row};
  for (int64_t k = 0; k < n; ++k)
    FASTATTN_DISPATCH(
        x.dtype, widen_row, key_row(args, x, s, head, key + k), cols, buffer + k * cols);
  return {buffer, cols};
}
static Tile<bf16x2> read_keys(
    const AttentionArgs& args, const Heads& x, const Sequence& s, int64_t head, int64_t key,
    int64_t n, int64_t cols, bf16x2* buffer) {
  if (cols % 2 == 0 && x.row % 2 == 0 && args.paging.table == nullptr)
    return {(const bf16x2*)key_row(args, x, s, head, key), x.row / 2};
  const int64_t width = words<bf16x2>(cols);
  for (int64_t k = 0; k < n; ++k) {
    if (cols % 2 != 0) buffer[k * width + width - 1] = {};
    std::memcpy(
        buffer + k * width, key_row(args, x, s, head, key + k), cols * (int64_t)sizeof(bf16));
  }
  return {buffer, width};
}

// The same keys as rows of words over keys. `rows`: what read_keys gave, if it was asked.
static Tile<float> read_over_keys(
    const AttentionArgs& args, const Heads& x, const Sequence& s, int64_t head, int64_t key,
    int64_t n, int64_t cols, float* buffer, const Tile<float>* rows = nullptr) {
  return rows == nullptr ? read_keys(args, x, s, head, key, n, cols, buffer) : *rows;
}
static Tile<bf16x2> read_over_keys(
    const AttentionArgs& args, const Heads& x, const Sequence& s, int64_t head, int64_t key,
    int64_t n, int64_t cols, bf16x2* buffer, const Tile<bf16x2>* = nullptr) {
  for (int64_t k = 0; k < n; k += 2)
    zip_rows(
        key_row(args, x, s, head, key + k),
        k + 1 < n ? key_row(args, x, s, head, key + k + 1) : nullptr, cols, buffer + k / 2 * cols);
  return {buffer, cols};
}

// Of a tile that begins with this key, the first that is worth reading where rows see none before
// `first`: at the start of a word over keys.
template <class Word>
FA_INLINE int64_t skipped(int64_t key, int64_t first) {
  return larger(0, first - key) / kPerWord<Word> * kPerWord<Word>;
}

// ---- few rows ---------------------------------------------------------------------------------

// Where a sequence has few rows, as in decoding, lanes full of rows would be mostly empty. There
// channels stand in lanes, and keys of 16 bits are read as they lie: a key takes D / kLanes + 1
// steps a row and product, and not D. The backward takes the same scores, bit for bit.
constexpr int kFewRows = kLanes / 2;

FA_INLINE bool has_few_rows(const AttentionArgs& args, const Sequence& s) {
  return heads_together(args, s) * s.Sq <= kFewRows && args.D % kLanes == 0 &&
         args.Dv % kLanes == 0;
}

// body(integral_constant R, r) for rows [r, r + R), two or one: four share what they read no
// better.
template <class Body>
FA_INLINE void for_rows(int rows, Body body) {
  int r = 0;
  for (; r + 2 <= rows; r += 2) body(std::integral_constant<int, 2>{}, r);
  for (; r < rows; ++r) body(std::integral_constant<int, 1>{}, r);
}

// scores of R rows = factor * (queries (R x D) by keys (n x D)^T), -inf up to a multiple of kLanes.
// A key is read from end to end before the next: where memory is the limit, rows side by side took
// 1.3 to 1.8 times as long.
template <int R, class T>
FA_INLINE void few_scores(
    Tile<T> keys, int64_t n, const float* queries, int64_t D, float factor, float* scores) {
  constexpr int K = kLanes / R;  // so that their products are one vector of sums
  for (int64_t first = 0; first < cuts(n, kLanes) * kLanes; first += K) {
    Vec sums[kLanes];
    FA_FOR (k, K) {
      const T* key = keys.data + smaller(first + k, n - 1) * keys.stride;
      Vec sum[R] = {};
      for (int64_t d = 0; d < D; d += kLanes) {
        const Vec x = load(key + d);
        FA_FOR (r, R) sum[r] = fma(load(queries + r * D + d), x, sum[r]);
      }
      FA_FOR (r, R) sums[r * K + k] = sum[r];
    }
    float found[kLanes];
    store(found, add_lanes(sums) * splat(factor));
    FA_FOR (r, R)
      FA_FOR (k, K) scores[r * kTileKeys + first + k] = first + k < n ? found[r * K + k] : -kInf;
  }
}

// The same of all rows: row r's at scores + r * kTileKeys.
template <class T>
static __attribute__((noinline)) void score_few(
    Tile<T> keys, int64_t n, const float* queries, int rows, int64_t D, float factor,
    float* scores) {
  for_rows(rows, [&](auto R, int r) __attribute__((always_inline)) {
    few_scores<R>(keys, n, queries + r * D, D, factor, scores + r * kTileKeys);
  });
}

// (rows x kTileKeys) scores as (n x kLanes), 0 in the lanes of no row.
FA_INLINE void turn_few(const float* scores, int rows, int64_t n, float* turned) {
  for (int64_t k = 0; k < n; ++k)
    for (int r = 0; r < kLanes; ++r)
      turned[k * kLanes + r] = r < rows ? scores[r * kTileKeys + k] : 0.f;
}

}  // namespace fastattn::FASTATTN_ISA
