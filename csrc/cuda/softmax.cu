// Row softmax, forward and backward, over the entries that mask and causal keep.
//   y = exp(scale * x - max) / sum        dx = scale * y * (dy - sum(dy * y))
// A row lies in registers, read once, up to 8192 columns; a longer one is read twice, its maximum
// and sum found online, each thread over its own columns.
#include "kernels.h"
#include "rows.cuh"

namespace fastattn::cuda {

constexpr int kEntries = 16;  // that a thread reads at a time
constexpr int64_t kMostInRegisters = kMostThreads * kEntries;

// N = 1, where rows are no multiple of 16 bytes: neighbouring threads read neighbouring entries.
template <int N>
constexpr int kSteps = kEntries / N;
template <int N>
constexpr int kLongSteps = N == 1 ? 8 : kSteps<N>;  // of a long row: 16 addresses would spill

// Columns of this row that causal leaves: query i sees those up to i + C - Sq.
FASTATTN_DEVICE int64_t visible_columns(const SoftmaxArgs& args, int64_t row) {
  return args.causal ? larger(0, row % args.Sq + args.C - args.Sq + 1) : args.C;
}

// scale * x of a thread's share from column `at` on; -inf where an entry is not kept.
template <class T, int S, int N>
FASTATTN_DEVICE void load_logits(
    const SoftmaxArgs& args, int64_t row, int64_t at, const Share<N>& share, float (&z)[S][N]) {
  load_row((const T*)args.x + row * args.C + at, share, z);
  const int64_t visible = visible_columns(args, row);
  const uint8_t* keep = (const uint8_t*)args.mask.data;
  if (keep != nullptr) keep += args.mask.offset(row);
  for_entries<S, N>([&](int s, int e) {
    const int64_t column = at + share.column(s) + e;
    const bool kept = share.holds(s, e) && column < visible &&
                      (keep == nullptr || load(keep + column * args.mask.col) != 0);
    z[s][e] = kept ? z[s][e] * args.scale : -kInf;
  });
}

// What is subtracted before exp: the maximum, or 0 where nothing is kept.
FASTATTN_DEVICE float softmax_shift(float most) { return most == -kInf ? 0.f : most; }
FASTATTN_DEVICE float inverse_of(float sum) { return sum == 0.f ? 0.f : 1.f / sum; }

template <int S, int N>
FASTATTN_DEVICE float most_of(const float (&z)[S][N], float most) {
  for_entries<S, N>([&](int s, int e) { most = fmaxf(most, z[s][e]); });
  return most;
}

// z = exp(z - shift); returns the sum, a step at a time: the chains of additions stay short.
template <int S, int N>
FASTATTN_DEVICE float exponentials(float shift, float (&z)[S][N]) {
  float sum = 0;
  FASTATTN_UNROLL
  for (int s = 0; s < S; ++s) {
    float sums = 0;
    FASTATTN_UNROLL
    for (int e = 0; e < N; ++e) sums += z[s][e] = expf(z[s][e] - shift);
    sum += sums;
  }
  return sum;
}

template <int S, int N>
FASTATTN_DEVICE void multiply(float factor, float (&z)[S][N]) {
  for_entries<S, N>([&](int s, int e) { z[s][e] *= factor; });
}

// body(at, share) along a row, from column `at` on.
template <int N, class Body>
FASTATTN_DEVICE void for_shares(int64_t C, Body body) {
  const int64_t step = kLongSteps<N> * N * blockDim.x;
  FASTATTN_ROLLED
  for (int64_t at = 0; at < C; at += step) body(at, Share<N>(C - at));
}

// ---- forward -----------------------------------------------------------------------------------

template <class T, int N>
__global__ void __launch_bounds__(kMostThreads, 1)
    softmax_fwd_kernel(const __grid_constant__ SoftmaxArgs args) {
  SHARED_MEMORY(memory);
  RowJoin join(memory);
  const int64_t row = row_of_thread();
  if (row >= args.R) return;
  const Share<N> share(args.C);
  float z[kSteps<N>][N];
  load_logits<T>(args, row, 0, share, z);
  float most[1] = {most_of(z, -kInf)};
  join(most, Most());
  float sum[1] = {exponentials(softmax_shift(most[0]), z)};
  join(sum, Sum());
  multiply(inverse_of(sum[0]), z);
  store_row((T*)args.out + row * args.C, share, z);
}

template <class T, int N>
__global__ void __launch_bounds__(kMostThreads, 1)
    softmax_fwd_long_kernel(const __grid_constant__ SoftmaxArgs args) {
  SHARED_MEMORY(memory);
  RowJoin join(memory);
  const int64_t row = row_of_thread();
  if (row >= args.R) return;
  float z[kLongSteps<N>][N];
  float most[1] = {-kInf}, sum[1] = {0};
  for_shares<N>(args.C, [&](int64_t at, const Share<N>& share) {
    load_logits<T>(args, row, at, share, z);
    const float higher = most_of(z, most[0]);
    if (sum[0] != 0.f) sum[0] *= expf(softmax_shift(most[0]) - softmax_shift(higher));
    most[0] = higher;
    sum[0] += exponentials(softmax_shift(higher), z);
  });
  const float mine = softmax_shift(most[0]);
  join(most, Most());
  const float shift = softmax_shift(most[0]);
  if (sum[0] != 0.f) sum[0] *= expf(mine - shift);
  join(sum, Sum());
  for_shares<N>(args.C, [&](int64_t at, const Share<N>& share) {
    load_logits<T>(args, row, at, share, z);
    exponentials(shift, z);
    multiply(inverse_of(sum[0]), z);
    store_row((T*)args.out + row * args.C + at, share, z);
  });
}

// ---- backward ----------------------------------------------------------------------------------

template <class T, int S, int N>
FASTATTN_DEVICE void load_pair(
    const SoftmaxArgs& args, int64_t row, int64_t at, const Share<N>& share, float (&y)[S][N],
    float (&dy)[S][N]) {
  load_row((const T*)args.x + row * args.C + at, share, y);
  load_row((const T*)args.dy + row * args.C + at, share, dy);
}

template <int S, int N>
FASTATTN_DEVICE float dot(const float (&y)[S][N], const float (&dy)[S][N]) {
  float sum = 0;
  FASTATTN_UNROLL
  for (int s = 0; s < S; ++s) {
    float sums = 0;
    FASTATTN_UNROLL
    for (int e = 0; e < N; ++e) sums = fmaf(y[s][e], dy[s][e], sums);
    sum += sums;
  }
  return sum;
}

template <class T, int S, int N>
FASTATTN_DEVICE void store_gradient(
    const SoftmaxArgs& args, int64_t row, int64_t at, const Share<N>& share, float total,
    const float (&y)[S][N], float (&dy)[S][N]) {
  for_entries<S, N>([&](int s, int e) { dy[s][e] = args.scale * y[s][e] * (dy[s][e] - total); });
  store_row((T*)args.out + row * args.C + at, share, dy);
}

template <class T, int N>
__global__ void __launch_bounds__(kMostThreads, 1)
    softmax_bwd_kernel(const __grid_constant__ SoftmaxArgs args) {
  SHARED_MEMORY(memory);
  RowJoin join(memory);
  const int64_t row = row_of_thread();
  if (row >= args.R) return;
  const Share<N> share(args.C);
  float y[kSteps<N>][N], dy[kSteps<N>][N];
  load_pair<T>(args, row, 0, share, y, dy);
  float total[1] = {dot(y, dy)};
  join(total, Sum());
  store_gradient<T>(args, row, 0, share, total[0], y, dy);
}

template <class T, int N>
__global__ void __launch_bounds__(kMostThreads, 1)
    softmax_bwd_long_kernel(const __grid_constant__ SoftmaxArgs args) {
  SHARED_MEMORY(memory);
  RowJoin join(memory);
  const int64_t row = row_of_thread();
  if (row >= args.R) return;
  float y[kLongSteps<N>][N], dy[kLongSteps<N>][N];
  float total[1] = {0};
  for_shares<N>(args.C, [&](int64_t at, const Share<N>& share) {
    load_pair<T>(args, row, at, share, y, dy);
    total[0] += dot(y, dy);
  });
  join(total, Sum());
  for_shares<N>(args.C, [&](int64_t at, const Share<N>& share) {
    load_pair<T>(args, row, at, share, y, dy);
    store_gradient<T>(args, row, at, share, total[0], y, dy);
  });
}

// ---- launchers ---------------------------------------------------------------------------------

using Kernel = void (*)(SoftmaxArgs);

static void launch_rows(const char* name, Kernel kernel, const SoftmaxArgs& args) {
  const dim3 block = row_block(args.C, kEntries);
  launch(
      name, kernel, dim3((unsigned)cuts(args.R, block.y)), block, RowJoin::kBytes, current_stream(),
      args);
}

template <class T>
static void softmax_fwd_typed(const SoftmaxArgs& args) {
  constexpr int N = kUnit<T>;
  const bool aligned = args.C % N == 0;
  if (args.C <= kMostInRegisters)
    launch_rows("softmax_fwd", aligned ? softmax_fwd_kernel<T, N> : softmax_fwd_kernel<T, 1>, args);
  else
    launch_rows(
        "softmax_fwd_long", aligned ? softmax_fwd_long_kernel<T, N> : softmax_fwd_long_kernel<T, 1>,
        args);
}
template <class T>
static void softmax_bwd_typed(const SoftmaxArgs& args) {
  constexpr int N = kUnit<T>;
  const bool aligned = args.C % N == 0;
  if (args.C <= kMostInRegisters)
    launch_rows("softmax_bwd", aligned ? softmax_bwd_kernel<T, N> : softmax_bwd_kernel<T, 1>, args);
  else
    launch_rows(
        "softmax_bwd_long", aligned ? softmax_bwd_long_kernel<T, N> : softmax_bwd_long_kernel<T, 1>,
        args);
}

void softmax_fwd(const SoftmaxArgs& args) {
  FASTATTN_DISPATCH(args.dtype, softmax_fwd_typed, args);
}
void softmax_bwd(const SoftmaxArgs& args) {
  FASTATTN_DISPATCH(args.dtype, softmax_bwd_typed, args);
}

}  // namespace fastattn::cuda
