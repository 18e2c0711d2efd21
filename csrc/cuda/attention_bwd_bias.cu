// The bias's gradient: dS of all sequences, heads, queries and keys that a tile of the bias
// reaches, in order. A block owns a tile, of 16 rows a warp, and walks everything along which the
// bias is broadcast. attention_bwd.cuh has the formulas.
#include "attention_bwd.cuh"
#include "kernels.h"

namespace fastattn::cuda {

template <class T, int COLS>
struct BiasShape : BackwardShape<T, COLS> {
  using Base = BackwardShape<T, COLS>;
  static constexpr int kSums = Base::kHeld * static_cast<int>(sizeof(float)) * Base::kWalked;
  static constexpr int kShared = 2 * Base::kBytes * (Base::kHeld + Base::kWalked) > kSums
                                     ? 2 * Base::kBytes * (Base::kHeld + Base::kWalked)
                                     : kSums;
};

// A sum that carries what each addition rounds away (Kahan): a bias that all heads and sequences
// share gathers many thousand terms.
struct Carried {
  float sum = 0.f, lost = 0.f;
  FASTATTN_DEVICE void add(float x) {
    const float y = x - lost, next = sum + y;
    lost = (next - sum) - y;
    sum = next;
  }
};

// How the tiles of the bias are counted, and what one of them reaches.
struct BiasTiles {
  bool all_rows, all_cols;         // one row, or column, for all
  int row_tiles, col_tiles;        // of the scores
  int row_programs, col_programs;  // of the bias
  int batches, heads;              // reached by one tile
};

template <class T, int COLS>
FASTATTN_HD BiasTiles bias_tiles(const AttentionArgs& args, const Scores& dbias) {
  using Shape = BiasShape<T, COLS>;
  BiasTiles t;
  t.all_rows = dbias.size[2] == 1;
  t.all_cols = dbias.size[3] == 1;
  t.row_tiles = static_cast<int>(cuts(args.Sq, Shape::kHeld));
  t.col_tiles = static_cast<int>(cuts(args.Sk, Shape::kWalked));
  t.row_programs = t.all_rows ? 1 : t.row_tiles;
  t.col_programs = t.all_cols ? 1 : t.col_tiles;
  t.batches = static_cast<int>(dbias.size[0] == 1 ? args.B : 1);
  t.heads = static_cast<int>(dbias.size[1] == 1 ? args.Hq : 1);
  return t;
}

FASTATTN_DEVICE void store_as(const Scores& x, int64_t at, float value) {
  switch (x.dtype) {
    case Dtype::f32: return store(static_cast<float*>(x.data) + at, value);
    case Dtype::bf16: return store(static_cast<bf16*>(x.data) + at, from_float<bf16>(value));
    case Dtype::f16: return store(static_cast<fp16*>(x.data) + at, from_float<fp16>(value));
  }
}

template <class T, int COLS>
__global__ void __launch_bounds__(BackwardShape<T, COLS>::kThreads)
    attention_bwd_bias_kernel(const __grid_constant__ AttentionBackward call) {
  using Shape = BiasShape<T, COLS>;
  constexpr int kHeld = Shape::kHeld, kWalked = Shape::kWalked, kThreads = Shape::kThreads;
  SHARED_MEMORY(memory);
  const AttentionArgs& args = call.args;
  const Scores& dbias = call.grads.dbias;
  const BiasTiles tiles = bias_tiles<T, COLS>(args, dbias);
  const int D = static_cast<int>(args.D), Dv = static_cast<int>(args.Dv);

  const int program = static_cast<int>(blockIdx.x);
  const int col_program = program % tiles.col_programs;
  const int row_program = program / tiles.col_programs % tiles.row_programs;
  const int plane = program / tiles.col_programs / tiles.row_programs;
  const int bias_heads = static_cast<int>(dbias.size[1]);
  const int bias_head = plane % bias_heads, bias_b = plane / bias_heads;

  const Tile<T, COLS> queries{reinterpret_cast<T*>(memory)}, douts{queries.data + Shape::kHeldTile},
      keys{douts.data + Shape::kHeldTile}, values{keys.data + Shape::kWalkedTile};
  const int warp_row = 16 * warp_index();
  const PhiloxKey philox = philox_of(args);
  const Unit unit = unit_of(args, call.modified);
  const InShared<T, COLS, 1> query_rows{queries, warp_row}, dout_rows{douts, warp_row};
  Carried sums[2][kWalked / 8][2];

  const auto add_tile = [&](const Sequence& s, int head, int first, int key) {
    const int kv_head = head / static_cast<int>(args.Hq / args.Hkv), query = first + warp_row;
    __syncthreads();  // the last tiles are read
    copy_queries<false, kHeld, kThreads>(
        queries, args.query, s, head, first, D, call.query_aligned);
    copy_queries<false, kHeld, kThreads>(
        douts, call.grads.dout, s, head, first, Dv, call.dout_aligned);
    copy_keys<false, kWalked, kThreads>(keys, args, args.key, s, kv_head, key, D, call.key_aligned);
    copy_keys<false, kWalked, kThreads>(
        values, args, args.value, s, kv_head, key, Dv, call.value_aligned);
    commit_copies();
    RowStats stats[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (query + row_of(r) < s.Sq)
        stats[r] = load(call.stats + stats_at(args, s, head, query + row_of(r)));
    wait_copies<0>();
    __syncthreads();
    const auto place = [&](int r, int n, int c) -> Place {
      const int i = query + row_of(r), j = key + col_of(n, c);
      return {head, i, j, i < s.Sq && j < s.Sk};
    };
    Share<1, kWalked / 8> scores, dweights;
    dot_rows(scores, query_rows, keys);
    dot_rows(dweights, dout_rows, values);
    modify(scores, args, s, place);
    hide(
        scores,
        [&](int r) {
          const int i = query + row_of(r);
          return i < s.Sq ? visible(args, s, i) : Range{0, 0};
        },
        [&](int n, int c) { return key + col_of(n, c); });
    grade<T, false, false>(
        scores, dweights, args, philox, s, unit, place, [&](int r, int, int) { return stats[r]; });
    for_each(dweights, [&](int r, int n, int c, float& x) { sums[r][n][c].add(x); });
  };

#pragma unroll 1
  for (int more_b = 0; more_b < tiles.batches; ++more_b) {
    const Sequence s = sequence(args, bias_b + more_b);
#pragma unroll 1
    for (int more_heads = 0; more_heads < tiles.heads; ++more_heads)
#pragma unroll 1
      for (int row_tile = row_program; row_tile < tiles.row_tiles; row_tile += tiles.row_programs) {
        const int first = row_tile * kHeld, last = smaller(first + kHeld, s.Sq) - 1;
        const Walk walk = walk_keys(args, s, first, last, kWalked);
#pragma unroll 1
        for (int col_tile = tiles.all_cols ? walk.first : col_program;
             col_tile < (tiles.all_cols ? walk.end : col_program + 1); ++col_tile)
          if (walk.first <= col_tile && col_tile < walk.end)  // some row sees some of it
            add_tile(s, bias_head + more_heads, first, col_tile * kWalked);
      }
  }

  // (rows x keys) sums by way of shared memory, then a thread for each entry of the bias
  float* all = reinterpret_cast<float*>(memory);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kWalked / 8; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        store_shared(all + (warp_row + row_of(r)) * kWalked + col_of(n, c), sums[r][n][c].sum);
  __syncthreads();
  const int rows = tiles.all_rows ? 1 : kHeld, cols = tiles.all_cols ? 1 : kWalked;
  for (int entry = static_cast<int>(threadIdx.x); entry < rows * cols; entry += kThreads) {
    const int r = entry / cols, c = entry % cols;
    const int row = tiles.all_rows ? 0 : row_program * kHeld + r;
    const int col = tiles.all_cols ? 0 : col_program * kWalked + c;
    if (row >= dbias.size[2] || col >= dbias.size[3]) continue;
    double sum = 0;
    for (int i = r; i < (tiles.all_rows ? kHeld : r + 1); ++i)
      for (int j = c; j < (tiles.all_cols ? kWalked : c + 1); ++j)
        sum += load_shared(all + i * kWalked + j);
    store_as(dbias, dbias.at(bias_b, bias_head, row) + col * dbias.col, static_cast<float>(sum));
  }
}

template <class T, int COLS>
static void launch_bias(const AttentionBackward& call) {
  using Shape = BiasShape<T, COLS>;
  const Scores& dbias = call.grads.dbias;
  const BiasTiles tiles = bias_tiles<T, COLS>(call.args, dbias);
  const int64_t blocks = dbias.size[0] * dbias.size[1] * tiles.row_programs * tiles.col_programs;
  launch(
      "attention_bwd_bias", attention_bwd_bias_kernel<T, COLS>, dim3(static_cast<unsigned>(blocks)),
      dim3(Shape::kThreads), Shape::kShared, current_stream(), call);
}

template <class T>
static void launch_head(const AttentionBackward& call) {
  const int64_t cols = call.args.D > call.args.Dv ? call.args.D : call.args.Dv;
  if (cols <= 64)
    launch_bias<T, 64>(call);
  else if (cols <= 128)
    launch_bias<T, 128>(call);
  else
    launch_bias<T, 256>(call);
}

void attention_bwd_bias(const AttentionBackward& call) {
  FASTATTN_DISPATCH(call.args.query.dtype, launch_head, call);
}

}  // namespace fastattn::cuda
