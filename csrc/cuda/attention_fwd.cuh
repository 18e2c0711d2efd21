// Attention forward by the online softmax (Milakov and Gimelshein 2018; Dao et al. 2022): the
// kernel of attention_fwd.cu, and of attention_decode.cu, which gives a block some of the keys
// only.
//
//   out = softmax(scale q k^T) v;  lse = log(sum(exp(score)))
//
// A block takes rows of queries over all keys that they see, a tile of keys after the other. Each
// warp has 16 M rows and shares nothing with the others but the tiles, which copies bring kStages -
// 1 visits ahead. The maximum is that of the raw products, so that scaling and subtracting are one
// FMA before exp2.
#pragma once
#include "scores.cuh"

namespace fastattn::cuda {

// log(2) in two floats
constexpr float kLn2 = 0.6931471824645996f, kLn2Low = -1.904654299957768e-09f;

struct alignas(8) PartStats {
  float row_max, row_sum;  // of the split; the maximum in log2 units
};

// A call as its kernels get it.
struct AttentionForward {
  AttentionArgs args;
  bool modified;  // scores are more than scaled products
  bool query_aligned, key_aligned, value_aligned, out_aligned;
  int together;      // heads whose rows stand together, all of one key/value head
  int split_keys;    // keys of a block; 0: all
  float* parts;      // (split, B, Hq, Sq, COLS): what splits found, to be joined
  PartStats* stats;  // (split, B, Hq, Sq)
};

// Up to this many queries the heads of a group share a block, and keys are split. That depends on
// Sq and Sk alone, so that neither the batch nor what runs beside changes a bit.
constexpr int kFewQueries = 16;
inline bool has_few_queries(const AttentionArgs& args) {
  return args.cu_seqlens_q == nullptr && args.Sq <= kFewQueries;
}
void attention_decode(const AttentionArgs& args);

template <class T>
AttentionForward attention_forward(const AttentionArgs& args) {
  AttentionForward call{};
  call.args = args;
  call.modified = is_modified(args);
  call.query_aligned = is_aligned<T>(args.query, args.B, args.Hq, args.Sq);
  call.key_aligned = are_keys_aligned<T>(args, args.key);
  call.value_aligned = are_keys_aligned<T>(args, args.value);
  call.out_aligned = is_aligned<T>(args.out, args.B, args.Hq, args.Sq);
  call.together = 1;
  return call;
}

// A stage holds 2 x 8 KB at most, and a block 80 KB: it fits every chip since sm_80. Where a row of
// accumulators is short a warp has 32 of them, which halves what it reads of shared memory a
// product.
template <class T, int COLS, int WARPS, bool PLAIN>
struct ForwardShape {
  static constexpr bool kFew = WARPS == 1;
  static constexpr int kBytes = kRowBytes<T, COLS>;
  static constexpr int M = !kFew && PLAIN && kBytes <= 128 ? 2 : 1;
  static constexpr int kRows = 16 * M * WARPS;
  static constexpr bool kHasPlain = !kFew && kBytes <= 256 && sizeof(T) == 2;
  static constexpr int kKeys = kHasPlain ? 64 : smaller_of(32, 8192 / kBytes);
  static constexpr int kStages = kHasPlain && kBytes == 256 ? 2 : 3;
  static constexpr bool kInRegisters = sizeof(T) == 2 && M == 1 && COLS <= (PLAIN ? 128 : 64);
  static constexpr int kShared = kBytes * (kRows + 2 * kStages * kKeys);
};

// A query row of a thread.
struct QueryRow {
  int head, query;
  bool inside;  // there is such a row
};

// Row `row` of those that stand together: the rows of one head after those of another.
FASTATTN_DEVICE QueryRow query_row(const Sequence& s, int first_head, int together, int row) {
  const int member = together == 1 ? 0 : row / s.Sq;
  const int query = row - member * s.Sq;
  const bool inside = together == 1 ? query < s.Sq : member < together;
  const int head = first_head + (inside ? member : 0);
  return {head, query, inside};
}

// The running softmax of a warp's rows.
template <int M, int COLS>
struct Softmax {
  Share<M, COLS / 8> out;
  float row_max[2 * M],
      row_sum[2 * M];  // the maximum in log2 units; the sum of this lane's columns

  FASTATTN_DEVICE Softmax() {
#pragma unroll
    for (int r = 0; r < 2 * M; ++r) row_max[r] = -kInf, row_sum[r] = 0.f;
  }
};

// Scores to weights, with the rows' maximum and sum; what was summed before is scaled to it.
template <class T, int M, int N, int COLS>
FASTATTN_DEVICE void soften(Share<M, N>& scores, Unit unit, Softmax<M, COLS>& state) {
  float alpha[2 * M];
  bool changed = false;
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
    float largest = scores.at(r, 0, 0);
#pragma unroll
    for (int n = 0; n < N; ++n)
      largest = fmaxf(largest, fmaxf(scores.at(r, n, 0), scores.at(r, n, 1)));
    largest = fmaxf(state.row_max[r], row_max_of(largest) * unit.high);
    const float base = largest == -kInf ? 0.f : largest;  // -inf - -inf would be NaN
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = scores.at(r, n, c);
        x = exp2_fast(exponent<T>(x, unit, base));
        sum += x;
      }
    alpha[r] = exp2_fast(state.row_max[r] - base);
    changed = changed || alpha[r] != 1.f;
    state.row_sum[r] = fmaf(state.row_sum[r], alpha[r], sum);
    state.row_max[r] = largest;
  }
  if (any(changed))  // seldom, once the first tiles are behind
    for_each(state.out, [&](int r, int, int, float& x) { x *= alpha[r]; });
}

// out, lse and what rounding lse to fp32 left, of one row. inverse: what out is multiplied by.
struct Finished {
  float inverse, lse, lse_low;
};
FASTATTN_DEVICE Finished finish(float row_max, float row_sum, float sink) {
  float rescale = 1.f;
  if (sink != -kInf) {
    const float highest = fmaxf(row_max, sink * kLog2e);
    rescale = exp2_fast(row_max - highest);
    row_sum = row_sum * rescale + exp2_fast(sink * kLog2e - highest);
    row_max = highest;
  }
  if (row_sum == 0.f) return {0.f, -kInf, 0.f};  // sees no key
  if (row_max == -kInf) row_max = 0.f;
  const float high = row_max * kLn2, tail = logf(row_sum), lse = high + tail;
  const float part = lse - high;  // the sum of two floats, exactly (Knuth)
  float low = fmaf(row_max, kLn2, -high) + row_max * kLn2Low;
  low += (high - (lse - part)) + (tail - part);
  const bool finite = fabsf(lse) < kInf;
  return {rescale / row_sum, lse, finite ? low : 0.f};
}

FASTATTN_DEVICE float sink_of(const AttentionArgs& args, const Sequence& s, int head) {
  return args.sinks.data == nullptr ? -kInf : load(args.sinks.data + s.b * args.sinks.batch + head);
}
FASTATTN_DEVICE void write_lse(
    const AttentionArgs& args, const Sequence& s, int head, int query, const Finished& done) {
  const int64_t at = s.b * args.lse_batch + head * args.lse_head + s.query_start + query;
  store(args.lse + at, done.lse);
  store(args.lse_low + at, done.lse_low);
}

// What a split of keys found, to be joined with the others.
template <int M, int COLS>
FASTATTN_DEVICE void write_part(
    const AttentionForward& call, const Sequence& s, int split, const QueryRow (&rows)[2 * M],
    Softmax<M, COLS>& state) {
  const AttentionArgs& args = call.args;
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
    if (!rows[r].inside) continue;
    const int64_t plane = (split * args.B + s.b) * args.Hq + rows[r].head;
    const int64_t at = plane * args.Sq + rows[r].query;
    if (lane_index() % 4 == 0)
      store(call.stats + at, PartStats{state.row_max[r], state.row_sum[r]});
#pragma unroll
    for (int n = 0; n < COLS / 8; ++n)
      store(
          reinterpret_cast<Float2*>(call.parts + at * COLS + col_of(n, 0)),
          Float2{state.out.at(r, n, 0), state.out.at(r, n, 1)});
  }
}

template <class T, int COLS, int WARPS, bool PLAIN>
__global__ void __launch_bounds__(32 * WARPS)
    attention_fwd_kernel(const __grid_constant__ AttentionForward call) {
  using Shape = ForwardShape<T, COLS, WARPS, PLAIN>;
  constexpr int M = Shape::M, kKeys = Shape::kKeys, kStages = Shape::kStages;
  constexpr int kThreads = 32 * WARPS, kTile = kKeys * COLS;
  using Rows = InShared<T, COLS, M>;
  using Left = std::conditional_t<Shape::kInRegisters, InRegisters<T, COLS, M>, const Rows&>;
  SHARED_MEMORY(memory);
  const AttentionArgs& args = call.args;
  const int together = Shape::kFew ? call.together : 1;

  // the last rows of a causal call see the most keys: they go first
  const int blocks = static_cast<int>(cuts(together * args.Sq, Shape::kRows));
  const int sets = static_cast<int>(args.Hq) / together;
  const int block = blocks - 1 - static_cast<int>(blockIdx.x) % blocks;
  const int first_head = static_cast<int>(blockIdx.x) / blocks % sets * together;
  const int slot = static_cast<int>(blockIdx.x) / blocks / sets;  // split * B + b
  const int B = static_cast<int>(args.B), split = slot / B;
  const Sequence s = sequence(args, slot % B);
  const int first_row = block * Shape::kRows;
  if (first_row >= together * s.Sq) return;
  const int kv_head = first_head / static_cast<int>(args.Hq / args.Hkv);

  // keys that some of the block's queries see
  const int low = together == 1 ? first_row : 0;
  const int high = together == 1 ? smaller(first_row + Shape::kRows, s.Sq) - 1 : s.Sq - 1;
  Walk walk = walk_keys(args, s, low, high, kKeys);
  if (Shape::kFew && call.split_keys > 0)
    walk =
        part_of(walk, split * (call.split_keys / kKeys), (split + 1) * (call.split_keys / kKeys));

  const Tile<T, COLS> queries{reinterpret_cast<T*>(memory)};
  const auto stage = [&](int visit) {  // keys, then values
    return queries.data + Shape::kRows * COLS + visit % kStages * 2 * kTile;
  };
  const auto copy = [&](int visit) {
    if (visit < walk.count()) {
      const int key = walk.tile(visit) * kKeys;
      const Tile<T, COLS> keys{stage(visit)}, values{stage(visit) + kTile};
      const int D = static_cast<int>(args.D), Dv = static_cast<int>(args.Dv);
      copy_keys<PLAIN, kKeys, kThreads>(keys, args, args.key, s, kv_head, key, D, call.key_aligned);
      copy_keys<PLAIN, kKeys, kThreads>(
          values, args, args.value, s, kv_head, key, Dv, call.value_aligned);
    }
    commit_copies();
  };
  copy_rows<Shape::kRows, kThreads>(
      queries, static_cast<int>(args.D), PLAIN || call.query_aligned, [&](int r) -> const T* {
        const QueryRow row = query_row(s, first_head, together, first_row + r);
        if (!row.inside) return nullptr;
        return row_at<const T>(args.query, s.b, row.head, s.query_start + row.query);
      });
  commit_copies();
#pragma unroll
  for (int visit = 0; visit < kStages - 1; ++visit) copy(visit);

  QueryRow rows[2 * M];
  const int warp_row = 16 * M * warp_index();
#pragma unroll
  for (int r = 0; r < 2 * M; ++r)
    rows[r] = query_row(s, first_head, together, first_row + warp_row + row_of(r));
  const PhiloxKey philox = PLAIN ? PhiloxKey{} : philox_of(args);
  const Unit unit = unit_of(args, !PLAIN && call.modified);
  Softmax<M, COLS> state;

  wait_copies<kStages - 1>();
  __syncthreads();
  const Rows in_shared{queries, warp_row};
  const Left left(in_shared);

  const auto attend = [&](int visit, bool masked) {
    const int key = walk.tile(visit) * kKeys;
    const Tile<T, COLS> keys{stage(visit)}, values{stage(visit) + kTile};
    const auto place = [&](int r, int n, int c) -> Place {
      const int j = key + col_of(n, c);
      return {rows[r].head, rows[r].query, j, rows[r].inside && j < s.Sk};
    };
    Share<M, kKeys / 8> scores;
    dot_rows(scores, left, keys);
    if (!PLAIN && call.modified) modify(scores, args, s, place);
    if (masked)
      hide(
          scores, [&](int r) { return visible(args, s, rows[r].query); },
          [&](int n, int c) { return key + col_of(n, c); });
    soften<T>(scores, unit, state);
    if (!PLAIN && args.dropout)
      for_each_factor_by_row<M, kKeys / 8>(
          args, philox, s, place,
          [&](int r, int n, int c, float factor) { scores.at(r, n, c) *= factor; });
    add_product(state.out, scores, values);
  };
  const auto visit_tiles = [&](int begin, int end, auto masked) {
#pragma unroll 1
    for (int visit = begin; visit < end; ++visit) {
      wait_copies<kStages - 2>();
      __syncthreads();  // this visit's tiles are there, and the last one's are read
      copy(visit + kStages - 1);
      attend(visit, masked(visit));
    }
  };
  if (PLAIN) {
    visit_tiles(0, walk.wholes(), [](int) { return false; });
    visit_tiles(walk.wholes(), walk.count(), [](int) { return true; });
  } else {
    visit_tiles(0, walk.count(), [&](int visit) { return visit >= walk.wholes(); });
  }
  wait_copies<0>();

#pragma unroll
  for (int r = 0; r < 2 * M; ++r) state.row_sum[r] = row_sum_of(state.row_sum[r]);
  if (Shape::kFew && call.split_keys > 0) {
    write_part(call, s, split, rows, state);
    return;
  }
  float inverse[2 * M];
#pragma unroll
  for (int r = 0; r < 2 * M; ++r) {
    const Finished done =
        finish(state.row_max[r], state.row_sum[r], sink_of(args, s, rows[r].head));
    inverse[r] = done.inverse;
    if (rows[r].inside && lane_index() % 4 == 0)
      write_lse(args, s, rows[r].head, rows[r].query, done);
  }
  write_rows<T>(
      state.out, queries, warp_row, static_cast<int>(args.Dv), call.out_aligned,
      [&](int r) { return inverse[r]; },
      [&](int r) -> T* {
        const QueryRow row = query_row(s, first_head, together, first_row + warp_row + r);
        if (!row.inside) return nullptr;
        return row_at<T>(args.out, s.b, row.head, s.query_start + row.query);
      });
}

}  // namespace fastattn::cuda
