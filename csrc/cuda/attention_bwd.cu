// Attention backward, the kernels of the rows, of dK and dV, and of dQ: attention_bwd.cuh has the
// formulas. Each block owns what it writes, so nothing is atomic and every sum has one order.
#include "attention_bwd.cuh"
#include "kernels.h"

namespace fastattn::cuda {

// ---- rows: delta and lse ------------------------------------------------------------------------

// A thread a row: the terms of delta are added one after another, as those of dP are in fp32. Where
// one key has all the weight, dP - delta is exactly 0, as it is in naive PyTorch.
constexpr int kRowThreads = 128;

template <class T>
FASTATTN_DEVICE float dot(const T* x, const T* y, int cols, bool aligned) {
  constexpr int kEntries = 16 / sizeof(T);
  struct alignas(16) Chunk {
    T entry[kEntries];
  };
  float sum = 0.f;
  int col = 0;
  for (; aligned && col + kEntries <= cols; col += kEntries) {
    const Chunk a = load(reinterpret_cast<const Chunk*>(x + col));
    const Chunk b = load(reinterpret_cast<const Chunk*>(y + col));
#pragma unroll
    for (int e = 0; e < kEntries; ++e) sum = fmaf(to_float(a.entry[e]), to_float(b.entry[e]), sum);
  }
  for (; col < cols; ++col) sum = fmaf(to_float(load(x + col)), to_float(load(y + col)), sum);
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    attention_rows_kernel(const __grid_constant__ AttentionBackward call, bool out_aligned) {
  const AttentionArgs& args = call.args;
  const int blocks = static_cast<int>(cuts(args.Sq, kRowThreads));
  const int block = static_cast<int>(blockIdx.x) % blocks;
  const int head = static_cast<int>(blockIdx.x) / blocks % static_cast<int>(args.Hq);
  const Sequence s = sequence(args, blockIdx.x / blocks / args.Hq);
  const int query = block * kRowThreads + static_cast<int>(threadIdx.x);
  if (query >= s.Sq) return;
  const int64_t at = stats_at(args, s, head, query);
  float delta = load(call.grads.delta + at);  // -dlse
  if (!args.dropout)
    delta +=
        dot(row_at<const T>(args.out, s.b, head, s.query_start + query),
            row_at<const T>(call.grads.dout, s.b, head, s.query_start + query),
            static_cast<int>(args.Dv), out_aligned && call.dout_aligned);
  const float lse = load(args.lse + at), lse_low = load(args.lse_low + at);
  RowStats row{};
  if (lse != -kInf) {
    const float high = lse * kLog2e;
    const float low = fmaf(lse, kLog2e, -high) + lse * kLog2eLow + lse_low * kLog2e;
    row = {delta, high, low == low ? low : 0.f, 0.f};
  }
  store(call.grads.delta + at, delta);
  store(call.stats + at, row);
}

// ---- dK and dV ----------------------------------------------------------------------------------

// Of heads above 128 channels a warp's dK and dV do not fit its registers together.
enum class Wanted { both, key, value };

template <class T, int COLS, bool PLAIN, Wanted WANTED>
__global__ void __launch_bounds__(BackwardShape<T, COLS>::kThreads)
    attention_bwd_keys_kernel(const __grid_constant__ AttentionBackward call) {
  using Shape = BackwardShape<T, COLS>;
  constexpr int kHeld = Shape::kHeld, kWalked = Shape::kWalked, kThreads = Shape::kThreads;
  constexpr bool kDkey = WANTED != Wanted::value, kDvalue = WANTED != Wanted::key;
  SHARED_MEMORY(memory);
  const AttentionArgs& args = call.args;
  const AttentionGradients& grads = call.grads;

  // the first keys of a causal call are seen most: they go first
  const int blocks = static_cast<int>(cuts(args.Sk, kHeld));
  const int first = static_cast<int>(blockIdx.x) % blocks * kHeld;
  const int kv_head = static_cast<int>(blockIdx.x) / blocks % static_cast<int>(args.Hkv);
  const Sequence s = sequence(args, blockIdx.x / blocks / args.Hkv);
  const int held = args.cu_seqlens_k != nullptr ? s.Sk : static_cast<int>(args.Sk);  // rows of dK
  if (first >= held) return;
  const int group = static_cast<int>(args.Hq / args.Hkv);

  // queries that see some of the block's keys, of one head after another
  const bool whole = first + kHeld <= s.Sk;
  Walk walk{};
  if (first < s.Sk) walk = walk_queries(args, s, first, smaller(first + kHeld, s.Sk) - 1, kWalked);
  const int turns = group * walk.count();

  const Tile<T, COLS> keys{reinterpret_cast<T*>(memory)}, values{keys.data + Shape::kHeldTile};
  unsigned char* const stages = reinterpret_cast<unsigned char*>(values.data + Shape::kHeldTile);
  struct Walked {
    Tile<T, COLS> queries, douts;
    RowStats* stats;
  };
  const auto walked = [&](int turn) -> Walked {
    T* start = reinterpret_cast<T*>(stages + turn % Shape::kStages * Shape::kStage);
    T* end = start + 2 * Shape::kWalkedTile;
    return {{start}, {start + Shape::kWalkedTile}, reinterpret_cast<RowStats*>(end)};
  };
  const auto copy = [&](int turn) {
    if (turn < turns) {
      const int head = kv_head * group + turn / walk.count();
      const int query = walk.tile(turn % walk.count()) * kWalked;
      const Walked to = walked(turn);
      copy_queries<PLAIN, kWalked, kThreads>(
          to.queries, args.query, s, head, query, args.D, call.query_aligned);
      copy_queries<PLAIN, kWalked, kThreads>(
          to.douts, grads.dout, s, head, query, args.Dv, call.dout_aligned);
      const int r = static_cast<int>(threadIdx.x);
      if (r < kWalked) {
        const bool inside = query + r < s.Sq;
        const RowStats* from = call.stats + stats_at(args, s, head, inside ? query + r : 0);
        copy_async(to.stats + r, from, inside ? sizeof(RowStats) : 0);
      }
    }
    commit_copies();
  };
  copy_keys<PLAIN, kHeld, kThreads>(
      keys, args, args.key, s, kv_head, first, static_cast<int>(args.D), call.key_aligned);
  copy_keys<PLAIN, kHeld, kThreads>(
      values, args, args.value, s, kv_head, first, static_cast<int>(args.Dv), call.value_aligned);
  copy(0);

  const int warp_row = 16 * warp_index(), key = first + warp_row;
  const PhiloxKey philox = PLAIN ? PhiloxKey{} : philox_of(args);
  const Unit unit = unit_of(args, !PLAIN && call.modified);
  const InShared<T, COLS, 1> key_rows{keys, warp_row}, value_rows{values, warp_row};
  Share<1, COLS / 8> dkey, dvalue;

#pragma unroll 1
  for (int turn = 0; turn < turns; ++turn) {
    wait_copies<0>();
    __syncthreads();  // this turn's tiles are there, and the last one's are read
    copy(turn + 1);
    const int visit = turn % walk.count(), query = walk.tile(visit) * kWalked;
    const int head = kv_head * group + turn / walk.count();
    const Walked tiles = walked(turn);
    const auto place = [&](int r, int n, int c) -> Place {
      const int i = query + col_of(n, c), j = key + row_of(r);
      return {head, i, j, i < s.Sq && j < s.Sk};
    };
    Share<1, kWalked / 8> scores, dweights, slope;
    dot_rows(scores, key_rows, tiles.queries);
    if (kDkey) dot_rows(dweights, value_rows, tiles.douts);
    if (!PLAIN && call.modified) modify(scores, args, s, place, kDkey ? &slope : nullptr);
    if (visit >= walk.wholes() || !whole)
      hide(
          scores, [&](int r) { return seeing(args, s, key + row_of(r)); },
          [&](int n, int c) { return query + col_of(n, c); });
    grade<T, PLAIN, true>(scores, dweights, args, philox, s, unit, place, [&](int, int n, int c) {
      return load_shared(tiles.stats + col_of(n, c));
    });
    if (kDkey && !PLAIN && args.softcap > 0)
      for_each(dweights, [&](int r, int n, int c, float& x) { x *= slope.at(r, n, c); });
    if (kDvalue) add_product(dvalue, scores, tiles.douts);
    if (kDkey) add_product(dkey, dweights, tiles.queries);
  }
  wait_copies<0>();
  __syncthreads();  // without a turn, keys and values are still on their way

  const auto row = [&](const Heads& x, int r) -> T* {
    return key + r < held ? row_at<T>(x, s.b, kv_head, s.key_start + key + r) : nullptr;
  };
  const int D = static_cast<int>(args.D), Dv = static_cast<int>(args.Dv);
  if (kDkey && grads.dkey.data != nullptr)
    write_rows<T>(
        dkey, keys, warp_row, D, call.dkey_aligned, [&](int) { return args.scale; },
        [&](int r) { return row(grads.dkey, r); });
  if (kDvalue && grads.dvalue.data != nullptr)
    write_rows<T>(
        dvalue, values, warp_row, Dv, call.dvalue_aligned, [&](int) { return 1.f; },
        [&](int r) { return row(grads.dvalue, r); });
}

// ---- dQ, and each block's share of its slope's gradient
// -------------------------------------------

// The sum over the block, in the order of its warps, known to thread 0. shared: a double a warp.
template <int WARPS>
FASTATTN_DEVICE double block_sum(double x, double* shared) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
  __syncthreads();
  if (lane_index() == 0) store_shared(shared + warp_index(), x);
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < WARPS; ++warp) sum += load_shared(shared + warp);
  return sum;
}

// delta of a warp's rows: sums of P * dP, of this lane's columns, are added.
FASTATTN_DEVICE void write_delta(
    const AttentionBackward& call, const Sequence& s, int head, int first, const float (&delta)[2],
    const float (&sums)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float found = delta[r] + row_sum_of(sums[r]);
    const int query = first + row_of(r);
    if (query >= s.Sq || lane_index() % 4 != 0) continue;
    const int64_t at = stats_at(call.args, s, head, query);
    store(&call.stats[at].delta, found);
    store(call.grads.delta + at, found);
  }
}

template <class T, int COLS, bool PLAIN>
__global__ void __launch_bounds__(BackwardShape<T, COLS>::kThreads)
    attention_bwd_queries_kernel(const __grid_constant__ AttentionBackward call) {
  using Shape = BackwardShape<T, COLS>;
  constexpr int kHeld = Shape::kHeld, kWalked = Shape::kWalked, kThreads = Shape::kThreads;
  SHARED_MEMORY(memory);
  const AttentionArgs& args = call.args;
  const AttentionGradients& grads = call.grads;

  const int blocks = static_cast<int>(cuts(args.Sq, kHeld));
  const int block = blocks - 1 - static_cast<int>(blockIdx.x) % blocks;
  const int head = static_cast<int>(blockIdx.x) / blocks % static_cast<int>(args.Hq);
  const int64_t b = blockIdx.x / blocks / args.Hq;
  const Sequence s = sequence(args, b);
  const int first = block * kHeld, kv_head = head / static_cast<int>(args.Hq / args.Hkv);
  const int64_t share = (block * args.B + b) * args.Hq + head;
  if (first >= s.Sq) {
    if (!PLAIN && call.slope_shares != nullptr && threadIdx.x == 0)
      store(call.slope_shares + share, 0.0);
    return;
  }
  const Walk walk = walk_keys(args, s, first, smaller(first + kHeld, s.Sq) - 1, kWalked);

  const Tile<T, COLS> queries{reinterpret_cast<T*>(memory)}, douts{queries.data + Shape::kHeldTile};
  const auto stage = [&](int visit) {  // keys, then values
    return douts.data + Shape::kHeldTile + visit % Shape::kStages * 2 * Shape::kWalkedTile;
  };
  const auto copy = [&](int visit) {
    if (visit < walk.count()) {
      const int at = walk.tile(visit) * kWalked;
      const int D = static_cast<int>(args.D), Dv = static_cast<int>(args.Dv);
      const Tile<T, COLS> keys{stage(visit)}, values{stage(visit) + Shape::kWalkedTile};
      copy_keys<PLAIN, kWalked, kThreads>(
          keys, args, args.key, s, kv_head, at, D, call.key_aligned);
      copy_keys<PLAIN, kWalked, kThreads>(
          values, args, args.value, s, kv_head, at, Dv, call.value_aligned);
    }
    commit_copies();
  };
  copy_queries<PLAIN, kHeld, kThreads>(
      queries, args.query, s, head, first, args.D, call.query_aligned);
  copy_queries<PLAIN, kHeld, kThreads>(
      douts, grads.dout, s, head, first, args.Dv, call.dout_aligned);
  copy(0);

  const int warp_row = 16 * warp_index(), query = first + warp_row;
  const PhiloxKey philox = PLAIN ? PhiloxKey{} : philox_of(args);
  const Unit unit = unit_of(args, !PLAIN && call.modified);
  const InShared<T, COLS, 1> query_rows{queries, warp_row}, dout_rows{douts, warp_row};
  Share<1, COLS / 8> dquery;
  RowStats stats[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (query + row_of(r) < s.Sq)
      stats[r] = load(call.stats + stats_at(args, s, head, query + row_of(r)));
  float dslope = 0.f, delta[2] = {stats[0].delta, stats[1].delta}, sums[2] = {};
  const bool finds_delta = !PLAIN && call.finds_delta;
  if (finds_delta) stats[0].delta = stats[1].delta = 0.f;

#pragma unroll 1
  for (int visit = 0; visit < walk.count(); ++visit) {
    wait_copies<0>();
    __syncthreads();  // this visit's tiles are there, and the last one's are read
    copy(visit + 1);
    const int key = walk.tile(visit) * kWalked;
    const Tile<T, COLS> keys{stage(visit)}, values{stage(visit) + Shape::kWalkedTile};
    const auto place = [&](int r, int n, int c) -> Place {
      const int i = query + row_of(r), j = key + col_of(n, c);
      return {head, i, j, i < s.Sq && j < s.Sk};
    };
    Share<1, kWalked / 8> scores, dweights, slope;
    dot_rows(scores, query_rows, keys);
    dot_rows(dweights, dout_rows, values);
    if (!PLAIN && call.modified) modify(scores, args, s, place, &slope);
    if (visit >= walk.wholes())
      hide(
          scores, [&](int r) { return visible(args, s, query + row_of(r)); },
          [&](int n, int c) { return key + col_of(n, c); });
    grade<T, PLAIN, false>(
        scores, dweights, args, philox, s, unit, place, [&](int r, int, int) { return stats[r]; });
    if (finds_delta) {
      for_each(dweights, [&](int r, int, int, float& x) { sums[r] += x; });
      continue;
    }
    if (!PLAIN && call.slope_shares != nullptr)
      for_each(dweights, [&](int r, int n, int c, float& x) {
        const Place p = place(r, n, c);
        const float distance = fabsf(static_cast<float>(p.query + s.diagonal - p.key));
        if (p.inside) dslope -= x * distance;
      });
    if (!PLAIN && args.softcap > 0)
      for_each(dweights, [&](int r, int n, int c, float& x) { x *= slope.at(r, n, c); });
    add_product(dquery, dweights, keys);
  }
  wait_copies<0>();
  __syncthreads();  // without a visit, queries are still on their way
  if (finds_delta) {
    write_delta(call, s, head, query, delta, sums);
    return;
  }

  if (grads.dquery.data != nullptr)
    write_rows<T>(
        dquery, queries, warp_row, static_cast<int>(args.D), call.dquery_aligned,
        [&](int) { return args.scale; },
        [&](int r) -> T* {
          if (query + r >= s.Sq) return nullptr;
          return row_at<T>(grads.dquery, s.b, head, s.query_start + query + r);
        });
  if (PLAIN || call.slope_shares == nullptr) return;
  const double sum = block_sum<Shape::kWarps>(dslope, reinterpret_cast<double*>(douts.data));
  if (threadIdx.x == 0) store(call.slope_shares + share, sum);
}

// The shares of one sequence and head, in the order of the blocks.
__global__ void attention_slopes_kernel(
    const double* shares, double* sums, int64_t blocks, int64_t heads) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (at >= heads) return;
  double sum = 0;
  for (int64_t block = 0; block < blocks; ++block) sum += load(shares + block * heads + at);
  store(sums + at, sum);
}

// ---- the sinks ----------------------------------------------------------------------------------

// dsink = -sum over rows of exp(sink - lse) * delta: a sink takes part in every row's lse. A block
// a head.
constexpr int kSinkWarps = 8;
__global__ void __launch_bounds__(32 * kSinkWarps) attention_sinks_kernel(
    const __grid_constant__ AttentionArgs args, const float* delta, float* dsinks) {
  SHARED_MEMORY(memory);
  const int64_t head = blockIdx.x, rows = args.lse_head, batches = args.lse_batch == 0 ? 1 : args.B;
  const double sink = load(args.sinks.data + head);
  double sum = 0;
  for (int64_t row = threadIdx.x; row < batches * rows; row += 32 * kSinkWarps) {
    const int64_t at = row / rows * args.lse_batch + head * args.lse_head + row % rows;
    const double share = exp(sink - load(args.lse + at));
    if (share > 0) sum -= share * load(delta + at);
  }
  sum = block_sum<kSinkWarps>(sum, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) store(dsinks + head, static_cast<float>(sum));
}

void sink_gradient(const AttentionArgs& args, const float* delta, float* dsinks) {
  launch(
      "attention_sinks", attention_sinks_kernel, dim3(static_cast<unsigned>(args.Hq)),
      dim3(32 * kSinkWarps), kSinkWarps * sizeof(double), current_stream(), args, delta, dsinks);
}

// ---- launching ----------------------------------------------------------------------------------

template <class T>
static AttentionBackward attention_backward(
    const AttentionArgs& args, const AttentionGradients& grads) {
  const auto of_queries = [&](const Heads& x) {
    return is_aligned<T>(x, args.B, args.Hq, args.Sq);
  };
  const auto of_keys = [&](const Heads& x) { return are_keys_aligned<T>(args, x); };
  return {
      args,
      grads,
      nullptr,
      nullptr,
      is_modified(args),
      false,
      of_queries(args.query),
      of_keys(args.key),
      of_keys(args.value),
      of_queries(grads.dout),
      of_queries(grads.dquery),
      of_keys(grads.dkey),
      of_keys(grads.dvalue)};
}

static bool is_plain(const AttentionBackward& call) {
  return !call.modified && !call.args.dropout && call.args.paging.table == nullptr &&
         call.query_aligned && call.key_aligned && call.value_aligned && call.dout_aligned;
}

template <class T, int COLS, bool PLAIN, Wanted WANTED>
static void launch_keys(const AttentionBackward& call) {
  using Shape = BackwardShape<T, COLS>;
  const AttentionArgs& args = call.args;
  const int64_t blocks = cuts(args.Sk, Shape::kHeld) * args.Hkv * args.B;
  launch(
      "attention_bwd_keys", attention_bwd_keys_kernel<T, COLS, PLAIN, WANTED>,
      dim3(static_cast<unsigned>(blocks)), dim3(Shape::kThreads), Shape::kShared, current_stream(),
      call);
}

template <class T, int COLS, bool PLAIN>
static void launch_queries(const AttentionBackward& call) {
  if (call.grads.dquery.data == nullptr && call.slope_shares == nullptr && !call.finds_delta)
    return;
  using Shape = BackwardShape<T, COLS>;
  const AttentionArgs& args = call.args;
  const int64_t blocks = cuts(args.Sq, Shape::kHeld), heads = args.B * args.Hq;
  launch(
      "attention_bwd_queries", attention_bwd_queries_kernel<T, COLS, PLAIN>,
      dim3(static_cast<unsigned>(blocks * heads)), dim3(Shape::kThreads), Shape::kShared,
      current_stream(), call);
  if (call.slope_shares != nullptr && !call.finds_delta)
    launch(
        "attention_slopes", attention_slopes_kernel, dim3(static_cast<unsigned>(cuts(heads, 128))),
        dim3(128), 0, current_stream(), call.slope_shares, call.grads.slope_sums, blocks, heads);
}

template <class T, int COLS, bool PLAIN>
static void launch_form(const AttentionBackward& call) {
  const AttentionGradients& grads = call.grads;
  if constexpr (!PLAIN) {
    AttentionBackward before = call;
    before.finds_delta = true;
    if (call.args.dropout) launch_queries<T, COLS, PLAIN>(before);
  }
  launch_queries<T, COLS, PLAIN>(call);
  if constexpr (COLS <= 128) {
    if (grads.dkey.data != nullptr || grads.dvalue.data != nullptr)
      launch_keys<T, COLS, PLAIN, Wanted::both>(call);
  } else {
    if (grads.dkey.data != nullptr) launch_keys<T, COLS, PLAIN, Wanted::key>(call);
    if (grads.dvalue.data != nullptr) launch_keys<T, COLS, PLAIN, Wanted::value>(call);
  }
}

// The plain form is worth its compile time where the products are fast.
template <class T, int COLS>
static void launch_cols(const AttentionBackward& call) {
  if constexpr (sizeof(T) == 2 && COLS <= 128)
    if (is_plain(call)) return launch_form<T, COLS, true>(call);
  launch_form<T, COLS, false>(call);
}

static int64_t row_count(const AttentionArgs& args) {
  return args.lse_batch == 0 ? args.Hq * args.lse_head : args.B * args.lse_batch;
}

template <class T>
static void launch_bwd(const AttentionArgs& args, const AttentionGradients& grads) {
  AttentionBackward call = attention_backward<T>(args, grads);
  call.stats = scratch<RowStats>(row_count(args));
  if (grads.slope_sums != nullptr)  // of the smallest blocks there are
    call.slope_shares = scratch<double>(cuts(args.Sq, 32) * args.B * args.Hq);
  const int64_t blocks = cuts(args.Sq, kRowThreads) * args.Hq * args.B;
  launch(
      "attention_rows", attention_rows_kernel<T>, dim3(static_cast<unsigned>(blocks)),
      dim3(kRowThreads), 0, current_stream(), call,
      is_aligned<T>(args.out, args.B, args.Hq, args.Sq));
  const int64_t cols = args.D > args.Dv ? args.D : args.Dv;
  if (cols <= 64)
    launch_cols<T, 64>(call);
  else if (cols <= 128)
    launch_cols<T, 128>(call);
  else
    launch_cols<T, 256>(call);
  if (grads.dbias.data != nullptr) attention_bwd_bias(call);
}

void attention_bwd(const AttentionArgs& args, const AttentionGradients& grads) {
  FASTATTN_DISPATCH(args.query.dtype, launch_bwd, args, grads);
}

}  // namespace fastattn::cuda
