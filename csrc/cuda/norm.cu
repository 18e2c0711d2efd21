// layer_norm and rms_norm, forward and backward, with dropout and residual.
//   z = dropout(x) + residual;  h = (z - mean) * rstd;  y = h * w + bias,  w = weight + offset
//   g = dy * w;  dz = rstd * (g - mean(g) - h * mean(g * h)) + dsummed   (rms: no mean(g))
//   dweight = sum over rows of dy * h;  dbias = sum over rows of dy
// A row lies in registers, read once, up to 16384 columns; a longer one is read twice. The sums
// over rows are taken by the threads that hold a row, up to 8192 columns; beyond, and there alone,
// by threads that hold columns, which read x and dy again.
#include "rows.cuh"
#include "../common/norm.h"

namespace fastattn::cuda {

constexpr int kMany = 32;  // columns of a row that a thread holds
constexpr int kFew = 16;   // and where it holds their sums over rows as well
constexpr int64_t kMostInRegisters = kMostThreads * kMany;
constexpr int64_t kMostWithSums = kMostThreads * kFew;

template <class T, int kColumns>
constexpr int kNormSteps = kColumns / kUnit<T>;

// ---- dropout and weights -----------------------------------------------------------------------

FASTATTN_DEVICE bool is_kept(const NormArgs& args, uint32_t word) {
  return word >= args.drop_below && args.keep_scale != 0.f;
}

// Bit s * N + e: entry e of step s is kept. column0: where in the row the share starts.
template <int S, int N>
FASTATTN_DEVICE uint32_t
kept_entries(const NormArgs& args, int64_t row, int64_t column0, const Share<N>& share) {
  static_assert(S * N <= 32);
  const uint64_t seed = load(args.philox);
  const uint32_t offset = (uint32_t)load(args.philox + 1);
  uint32_t kept = 0;
  FASTATTN_ROLLED
  for (int i = 0; i < S * N; i += 4) {  // a counter serves four columns
    const uint32_t quad = (uint32_t)((column0 + share.column(i / N) + i % N) / 4);
    const PhiloxWords words = philox4x32(quad, (uint32_t)row, 0, offset, seed);
    FASTATTN_UNROLL
    for (int w = 0; w < 4; ++w) kept |= (uint32_t)is_kept(args, words.word[w]) << (i + w);
  }
  return kept;
}

template <int S, int N>
FASTATTN_DEVICE void drop(const NormArgs& args, uint32_t kept, float (&x)[S][N]) {
  for_entries<S, N>(
      [&](int s, int e) { x[s][e] = kept >> (s * N + e) & 1 ? x[s][e] * args.keep_scale : 0.f; });
}

struct Add {
  FASTATTN_DEVICE void operator()(float& to, float x) const { to += x; }
};

// z of a share of a row, 0 outside; kept: what dropout left of it.
template <class T, int S, int N>
FASTATTN_DEVICE void norm_input(
    const NormArgs& args, int64_t row, int64_t column0, const Share<N>& share, float (&z)[S][N],
    uint32_t& kept) {
  load_row(row_of<T>(args.x, row) + column0, share, z);
  if (args.dropout) {
    kept = kept_entries<S>(args, row, column0, share);
    drop(args, kept, z);
  }
  if (args.residual.data != nullptr)
    combine_row<T>(
        args.residual_dtype, args.residual.data, args.residual.offset(row) + column0, share, z,
        Add());
}

template <class T, int S, int N>
FASTATTN_DEVICE void scale_by_weight(
    const NormArgs& args, int64_t column0, const Share<N>& share, float (&x)[S][N]) {
  if (args.weight.data == nullptr) return;
  const auto scale = [&](float& to, float weight) {
    to = product(to, weight + args.weight_offset);
  };
  combine_row<T>(args.weight.dtype, args.weight.data, column0, share, x, scale);
}

// y = h * w + bias
template <class T, int S, int N>
FASTATTN_DEVICE void store_output(
    const NormArgs& args, int64_t row, int64_t column0, const Share<N>& share, float (&h)[S][N]) {
  scale_by_weight<T>(args, column0, share, h);
  if (args.bias.data != nullptr)
    combine_row<T>(args.bias.dtype, args.bias.data, column0, share, h, Add());
  store_row(row_of<T>(args.y, row) + column0, share, h);
}

template <class T, int S, int N>
FASTATTN_DEVICE void store_summed(
    const NormArgs& args, int64_t row, int64_t column0, const Share<N>& share,
    const float (&z)[S][N]) {
  if (args.summed.data == nullptr) return;
  store_row<T>(args.residual_dtype, args.summed.data, args.summed.offset(row) + column0, share, z);
}

// ---- forward -----------------------------------------------------------------------------------

FASTATTN_DEVICE float inverse_root(float variance, float eps) {
  return 1.f / sqrtf((variance < 0.f ? 0.f : variance) + eps);
}

// A sum of d and one of d * d, a step at a time: the chains of additions stay short.
template <int S, int N>
FASTATTN_DEVICE void add_squares(const float (&d)[S][N], float (&sums)[2]) {
  FASTATTN_UNROLL
  for (int s = 0; s < S; ++s) {
    float sum = 0, squares = 0;
    FASTATTN_UNROLL
    for (int e = 0; e < N; ++e) {
      sum += d[s][e];
      squares = fmaf(d[s][e], d[s][e], squares);
    }
    sums[0] += sum;
    sums[1] += squares;
  }
}
template <int S, int N>
FASTATTN_DEVICE float sum_of(const float (&d)[S][N]) {
  float sums[2] = {};
  add_squares(d, sums);
  return sums[0];
}

template <int S, int N>
FASTATTN_DEVICE void subtract(const Share<N>& share, float from, float (&z)[S][N]) {
  for_entries<S, N>([&](int s, int e) { z[s][e] = share.holds(s, e) ? z[s][e] - from : 0.f; });
}

// The second sum of a mean is what rounding left in the first: at a mean of 1e4 that is up to 1e-3.
template <class T>
__global__ void __launch_bounds__(kMostThreads, 1)
    norm_fwd_kernel(const __grid_constant__ NormArgs args) {
  constexpr int N = kUnit<T>, S = kNormSteps<T, kMany>;
  SHARED_MEMORY(memory);
  RowJoin join(memory);
  const int64_t row = row_of_thread();
  if (row >= args.R) return;
  const Share<N> share(args.C);
  float z[S][N];
  uint32_t kept;
  norm_input<T>(args, row, 0, share, z, kept);
  store_summed<T>(args, row, 0, share, z);
  float mean[1] = {}, sums[2] = {};
  if (!args.rms) {
    mean[0] = sum_of(z);
    join(mean, Sum());
    mean[0] /= args.C;
    subtract(share, mean[0], z);
  }
  add_squares(z, sums);
  join(sums, Sum());
  const float shift = args.rms ? 0.f : sums[0] / args.C;
  const float rstd = inverse_root(sums[1] / args.C - shift * shift, args.eps);
  if (threadIdx.x == 0) {
    if (!args.rms) store(args.mean + row, mean[0] + shift);
    store(args.rstd + row, rstd);
  }
  for_entries<S, N>([&](int s, int e) { z[s][e] = (z[s][e] - shift) * rstd; });
  store_output<T>(args, row, 0, share, z);
}

// A count of numbers, their mean, and the sum of (number - mean)^2. Joined by Chan, Golub and
// LeVeque's formula, so one pass is as accurate as two.
struct Moments {
  float count = 0, mean = 0, squares = 0;

  FASTATTN_DEVICE void add(float n, float mean_n, float squares_n) {
    if (n == 0) return;
    const float delta = mean_n - mean, part = n / (count + n);
    mean += delta * part;
    squares += squares_n + delta * delta * count * part;
    count += n;
  }
};

template <int S, int N>
FASTATTN_DEVICE void add_moments(
    const Share<N>& share, bool rms, float (&z)[S][N], Moments& moments) {
  float n = 0, sums[2] = {};
  for_entries<S, N>([&](int s, int e) { n += share.holds(s, e) ? 1.f : 0.f; });
  const float mean = rms || n == 0 ? 0.f : sum_of(z) / n;
  subtract(share, mean, z);
  add_squares(z, sums);
  if (rms)
    moments.squares += sums[1];
  else
    moments.add(n, mean, sums[1]);
}

template <class T>
__global__ void __launch_bounds__(kMostThreads, 1)
    norm_fwd_long_kernel(const __grid_constant__ NormArgs args) {
  constexpr int N = kUnit<T>, S = kNormSteps<T, kMany>;
  SHARED_MEMORY(memory);
  RowJoin join(memory);
  const int64_t row = blockIdx.x, C = args.C;
  const int64_t step = S * N * blockDim.x;
  float z[S][N];
  uint32_t kept;
  Moments moments;
  FASTATTN_ROLLED
  for (int64_t at = 0; at < C; at += step) {
    const Share<N> here(C - at);
    norm_input<T>(args, row, at, here, z, kept);
    store_summed<T>(args, row, at, here, z);
    add_moments(here, args.rms, z, moments);
  }
  float mean[1] = {moments.count * moments.mean};
  join(mean, Sum());
  mean[0] /= C;
  const float off = moments.mean - mean[0];
  float sums[2] = {moments.count * off, moments.squares + moments.count * off * off};
  join(sums, Sum());
  const float shift = sums[0] / C, rstd = inverse_root(sums[1] / C - shift * shift, args.eps);
  if (threadIdx.x == 0) {
    if (!args.rms) store(args.mean + row, mean[0] + shift);
    store(args.rstd + row, rstd);
  }
  FASTATTN_ROLLED
  for (int64_t at = 0; at < C; at += step) {
    const Share<N> here(C - at);
    norm_input<T>(args, row, at, here, z, kept);
    for_entries<S, N>([&](int s, int e) { z[s][e] = (z[s][e] - mean[0] - shift) * rstd; });
    store_output<T>(args, row, at, here, z);
  }
}

template <class T>
static void norm_fwd_typed(const NormArgs& args) {
  const bool whole = args.C <= kMostInRegisters;
  const dim3 block = row_block(args.C, kMany);
  launch(
      whole ? "norm_fwd" : "norm_fwd_long", whole ? norm_fwd_kernel<T> : norm_fwd_long_kernel<T>,
      dim3((unsigned)cuts(args.R, block.y)), block, RowJoin::kBytes, current_stream(), args);
}

void norm_fwd(const NormArgs& args) { FASTATTN_DISPATCH(args.dtype, norm_fwd_typed, args); }

// ---- backward ----------------------------------------------------------------------------------

struct NormStats {
  float mean, rstd;
};
FASTATTN_DEVICE NormStats load_stats(const NormArgs& args, int64_t row) {
  return {args.rms ? 0.f : load(args.mean + row), load(args.rstd + row)};
}

// h of a share of a row. Outside it is whatever, for it meets only dy = 0 there.
template <class T, int S, int N>
FASTATTN_DEVICE void normalised(
    const NormArgs& args, int64_t row, int64_t column0, const Share<N>& share, NormStats stats,
    float (&h)[S][N], uint32_t& kept) {
  norm_input<T>(args, row, column0, share, h, kept);
  for_entries<S, N>([&](int s, int e) { h[s][e] = (h[s][e] - stats.mean) * stats.rstd; });
}

// Adds the sums of g and of g * h.
template <int S, int N>
FASTATTN_DEVICE void add_dots(const float (&g)[S][N], const float (&h)[S][N], float (&sums)[2]) {
  FASTATTN_UNROLL
  for (int s = 0; s < S; ++s) {
    float level = 0, along = 0;
    FASTATTN_UNROLL
    for (int e = 0; e < N; ++e) {
      level += g[s][e];
      along = fmaf(g[s][e], h[s][e], along);
    }
    sums[0] += level;
    sums[1] += along;
  }
}

// g becomes dz.
template <int S, int N>
FASTATTN_DEVICE void to_dz(
    const NormArgs& args, const float (&sums)[2], NormStats stats, const float (&h)[S][N],
    float (&g)[S][N]) {
  const float g_mean = args.rms ? 0.f : sums[0] / args.C, gh_mean = sums[1] / args.C;
  for_entries<S, N>(
      [&](int s, int e) { g[s][e] = stats.rstd * (g[s][e] - g_mean - h[s][e] * gh_mean); });
}

template <class T, int S, int N>
FASTATTN_DEVICE void store_gradients(
    const NormArgs& args, int64_t row, int64_t column0, const Share<N>& share, uint32_t kept,
    float (&dz)[S][N]) {
  if (args.dsummed.data != nullptr)
    combine_row<T>(
        args.residual_dtype, args.dsummed.data, args.dsummed.offset(row) + column0, share, dz,
        Add());
  if (args.dresidual.data != nullptr)
    store_row<T>(
        args.residual_dtype, args.dresidual.data, args.dresidual.offset(row) + column0, share, dz);
  if (args.dx.data == nullptr) return;
  if (args.dropout) drop(args, kept, dz);
  store_row(row_of<T>(args.dx, row) + column0, share, dz);
}

// The rows of a chunk, one after another; partials (chunks, 2, C) get their sums for dweight and
// dbias.
template <class T, int kColumns, bool kSums>
__global__ void __launch_bounds__(kMostThreads, 1)
    norm_bwd_kernel(const __grid_constant__ NormArgs args, float* partials, int64_t chunk_rows) {
  constexpr int N = kUnit<T>, S = kNormSteps<T, kColumns>;
  SHARED_MEMORY(memory);
  RowJoin join(memory);
  const Share<N> share(args.C);
  const int64_t chunk = blockIdx.x * (int64_t)blockDim.y + threadIdx.y;
  const int64_t end = smaller(args.R, (chunk + 1) * chunk_rows);
  float dweight[kSums ? S : 1][N] = {}, dbias[kSums ? S : 1][N] = {};
  if (chunk * chunk_rows >= end) return;
  FASTATTN_ROLLED
  for (int64_t row = chunk * chunk_rows; row < end; ++row) {
    float h[S][N], g[S][N] = {};
    uint32_t kept = 0;
    if (args.dy.data != nullptr) {
      const NormStats stats = load_stats(args, row);
      normalised<T>(args, row, 0, share, stats, h, kept);
      load_row(row_of<T>(args.dy, row), share, g);
      if constexpr (kSums)
        for_entries<S, N>([&](int s, int e) {
          dweight[s][e] = fmaf(g[s][e], h[s][e], dweight[s][e]);
          dbias[s][e] += g[s][e];
        });
      scale_by_weight<T>(args, 0, share, g);
      float sums[2] = {};
      add_dots(g, h, sums);
      join(sums, Sum());
      to_dz(args, sums, stats, h, g);
    } else if (args.dropout) {
      kept = kept_entries<S>(args, row, 0, share);
    }
    store_gradients<T>(args, row, 0, share, kept, g);
  }
  if constexpr (kSums) {
    if (partials == nullptr) return;  // nobody wants them
    store_row(partials + 2 * chunk * args.C, share, dweight);
    store_row(partials + (2 * chunk + 1) * args.C, share, dbias);
  }
}

template <class T>
__global__ void __launch_bounds__(kMostThreads, 1)
    norm_bwd_long_kernel(const __grid_constant__ NormArgs args) {
  constexpr int N = kUnit<T>, S = kNormSteps<T, kFew>;
  SHARED_MEMORY(memory);
  RowJoin join(memory);
  const int64_t row = blockIdx.x, C = args.C;
  const int64_t step = S * N * blockDim.x;
  const NormStats stats = load_stats(args, row);
  float h[S][N], g[S][N] = {}, sums[2] = {};
  uint32_t kept;
  const auto load_both = [&](int64_t at, const Share<N>& here) {
    normalised<T>(args, row, at, here, stats, h, kept);
    load_row(row_of<T>(args.dy, row) + at, here, g);
    scale_by_weight<T>(args, at, here, g);
  };
  const int64_t end = args.dy.data == nullptr ? 0 : C;
  FASTATTN_ROLLED
  for (int64_t at = 0; at < end; at += step) {
    load_both(at, Share<N>(C - at));
    add_dots(g, h, sums);
  }
  join(sums, Sum());
  FASTATTN_ROLLED
  for (int64_t at = 0; at < C; at += step) {
    const Share<N> here(C - at);
    if (args.dy.data != nullptr) {
      load_both(at, here);
      to_dz(args, sums, stats, h, g);
    } else {
      for_entries<S, N>([&](int s, int e) { g[s][e] = 0; });
      kept = args.dropout ? kept_entries<S>(args, row, at, here) : 0;
    }
    store_gradients<T>(args, row, at, here, kept, g);
  }
}

// The sums over rows of a chunk, 32 threads' columns of them: warp by warp another piece or chunk.
template <class T>
__global__ void __launch_bounds__(128, 4) norm_columns_kernel(
    const __grid_constant__ NormArgs args, float* partials, int64_t chunk_rows, uint32_t pieces,
    int64_t chunks) {
  constexpr int N = kUnit<T>;
  const uint32_t at = blockIdx.x * blockDim.y + threadIdx.y;
  const int64_t chunk = at / pieces, column0 = (int64_t)(at % pieces) * 32 * N;
  if (chunk >= chunks) return;
  const Share<N> share(args.C - column0);
  const int64_t end = args.dy.data == nullptr ? 0 : smaller(args.R, (chunk + 1) * chunk_rows);
  float dweight[1][N] = {}, dbias[1][N] = {};
  FASTATTN_ROLLED
  for (int64_t row = chunk * chunk_rows; row < end; ++row) {
    float h[1][N], dy[1][N];
    uint32_t kept;
    normalised<T>(args, row, column0, share, load_stats(args, row), h, kept);
    load_row(row_of<T>(args.dy, row) + column0, share, dy);
    for_entries<1, N>([&](int s, int e) {
      dweight[s][e] = fmaf(dy[s][e], h[s][e], dweight[s][e]);
      dbias[s][e] += dy[s][e];
    });
  }
  store_row(partials + 2 * chunk * args.C + column0, share, dweight);
  store_row(partials + (2 * chunk + 1) * args.C + column0, share, dbias);
}

// ---- launchers ---------------------------------------------------------------------------------

static bool wants_sums(const NormArgs& args) {
  return args.dweight != nullptr || args.dbias != nullptr;
}

template <class T, int kColumns, bool kSums>
static void launch_whole(const NormArgs& args, float* partials, Chunks chunks) {
  const dim3 block = row_block(args.C, kColumns);
  launch(
      "norm_bwd", norm_bwd_kernel<T, kColumns, kSums>, dim3((unsigned)cuts(chunks.count, block.y)),
      block, RowJoin::kBytes, current_stream(), args, partials, chunks.rows);
}

template <class T>
static void launch_columns(const NormArgs& args, float* partials, Chunks chunks) {
  const int64_t pieces = cuts(args.C, 32 * kUnit<T>);
  launch(
      "norm_columns", norm_columns_kernel<T>, dim3((unsigned)cuts(pieces * chunks.count, 4)),
      dim3(32, 4), 0, current_stream(), args, partials, chunks.rows, (uint32_t)pieces,
      chunks.count);
}

template <class T>
static void norm_bwd_typed(const NormArgs& args, float* partials) {
  const Chunks chunks(args.R);
  if (args.C <= kMostWithSums) return launch_whole<T, kFew, true>(args, partials, chunks);
  if (args.C <= kMostInRegisters) {
    Chunks rows = chunks;
    rows.rows = 1;
    rows.count = args.R;
    launch_whole<T, kMany, false>(args, nullptr, rows);
  } else {
    launch(
        "norm_bwd_long", norm_bwd_long_kernel<T>, dim3((unsigned)args.R), row_block(args.C, kFew),
        RowJoin::kBytes, current_stream(), args);
  }
  if (wants_sums(args)) launch_columns<T>(args, partials, chunks);
}

template <class Out>
static void sum_norm_chunks(const NormArgs& args, const float* partials, void* out) {
  sum_chunks<Out>(partials, Chunks(args.R).count, 2 * args.C, out, args.C);
}

void norm_bwd(const NormArgs& args) {
  float* partials = wants_sums(args) ? scratch<float>(Chunks(args.R).count * 2 * args.C) : nullptr;
  FASTATTN_DISPATCH(args.dtype, norm_bwd_typed, args, partials);
  if (args.dweight != nullptr)
    FASTATTN_DISPATCH(args.weight.dtype, sum_norm_chunks, args, partials, args.dweight);
  if (args.dbias != nullptr)
    FASTATTN_DISPATCH(args.bias.dtype, sum_norm_chunks, args, partials + args.C, args.dbias);
}

}  // namespace fastattn::cuda
