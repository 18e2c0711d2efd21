// Cross-entropy of rows of logits. Forward: one read, maximum and sum of exponentials online, each
// thread over its own columns. Backward: one read and one write, in place if asked; a read more
// where lse is far from zero:
//   loss = (1 - smoothing) (lse - x[target]) + smoothing (lse - mean(x)) + z_loss lse^2
//   dx = dloss * ((1 + 2 z_loss lse) softmax(x) - smoothing / V - (1 - smoothing) [target])
// Nothing of a target that is neither in [0, V) nor ignore_index is read: its loss is NaN.
#include "rows.cuh"
#include "../common/cross_entropy.h"

namespace fastattn::cuda {

constexpr int kLogits = 16;  // that a thread reads at a time

// N = 1, where rows are no multiple of 16 bytes: neighbouring threads read neighbouring logits.
template <int N>
constexpr int kLogitSteps = N == 1 ? 8 : kLogits / N;

// What is subtracted before exp: the maximum, or 0 where that is infinite, as torch.logsumexp does.
FASTATTN_DEVICE float shift_of(float most) { return fabsf(most) == kInf ? 0.f : most; }

// Of the logits that a thread has read: the maximum, the sum of exp(x - shift), and for smoothing
// the sum of x - shift and their number. A sum of logits near 1e4 itself would lose 1e-4.
struct LogitSums {
  float most = -kInf, sum = 0, total = 0, count = 0;

  FASTATTN_DEVICE void raise(float higher) {
    const float shift = shift_of(higher);
    sum *= most == higher ? 1.f : expf(most - shift);  // 0 of nothing yet, most -inf
    total += count * (shift_of(most) - shift);
    most = higher;
  }
  template <int S, int N>
  FASTATTN_DEVICE void add(const float (&x)[S][N], const Share<N>& share, bool smooths) {
    float highest = most;
    for_entries<S, N>([&](int s, int e) { highest = fmaxf(highest, x[s][e]); });
    if (highest > most) raise(highest);
    const float shift = shift_of(most);
    float sums[S];  // short chains
    FASTATTN_UNROLL
    for (int s = 0; s < S; ++s) {
      sums[s] = 0;
      FASTATTN_UNROLL
      for (int e = 0; e < N; ++e) sums[s] += expf(x[s][e] - shift);
    }
    FASTATTN_UNROLL
    for (int s = 0; s < S; ++s) sum += sums[s];
    if (!smooths) return;
    float terms = 0, n = 0;
    for_entries<S, N>([&](int s, int e) {
      terms += share.holds(s, e) ? x[s][e] - shift : 0.f;
      n += share.holds(s, e) ? 1.f : 0.f;
    });
    total += terms;
    count += n;
  }
};

// body(x, at, share) along a row, x being a thread's logits from column `at` on; -inf past the end.
template <class T, int N, class Body>
FASTATTN_DEVICE void for_logits(const T* row, int64_t V, Body body) {
  constexpr int S = kLogitSteps<N>;
  const int64_t step = S * N * blockDim.x;
  FASTATTN_ROLLED
  for (int64_t at = 0; at < V; at += step) {
    const Share<N> here(V - at);
    float x[S][N];
    load_row(row + at, here, x);
    for_entries<S, N>([&](int s, int e) { x[s][e] = here.holds(s, e) ? x[s][e] : -kInf; });
    body(x, at, here);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kMostThreads, 1)
    cross_entropy_fwd_kernel(const __grid_constant__ CrossEntropyArgs args) {
  constexpr int S = kLogitSteps<N>;
  SHARED_MEMORY(memory);
  RowJoin join(memory);
  const int64_t row = row_of_thread(), V = args.V;
  if (row >= args.R) return;
  const bool smooths = args.smoothing > 0;
  const T* logits = (const T*)args.logits + row * args.row;
  LogitSums mine;
  for_logits<T, N>(logits, V, [&](const float (&x)[S][N], int64_t, const Share<N>& share) {
    mine.add(x, share, smooths);
  });
  float most[1] = {mine.most};
  join(most, Most());
  mine.raise(most[0]);
  float sums[2] = {mine.sum, mine.total};
  join(sums, Sum());
  if (threadIdx.x > 0) return;

  const float shift = shift_of(most[0]), log_sum = logf(sums[0]), lse = shift + log_sum;
  store(args.lse + row, lse);
  const int64_t target = load(args.target + row);
  if (target == args.ignore_index) return store(args.loss + row, 0.f);
  const bool inside = target >= 0 && target < V;
  const float chosen = inside ? to_float(load(logits + target)) : NAN;
  float loss = (shift - chosen) + log_sum;  // what cancels first: lse is rounded
  if (smooths) loss = (1 - args.smoothing) * loss + args.smoothing * (log_sum - sums[1] / V);
  if (args.z_loss > 0) loss += args.z_loss * lse * lse;
  store(args.loss + row, loss);
}

// ---- backward ----------------------------------------------------------------------------------

// Beyond this an lse rounded to fp32 puts more than 1e-6 into p = exp(x - lse).
constexpr float kLargeLse = 16.f;

// A thread writes the columns that it has read, so dlogits may be the logits.
template <class T, int N>
__global__ void __launch_bounds__(kMostThreads, 1)
    cross_entropy_bwd_kernel(const __grid_constant__ CrossEntropyArgs args) {
  constexpr int S = kLogitSteps<N>;
  SHARED_MEMORY(memory);
  RowJoin join(memory);
  const int64_t row = row_of_thread(), V = args.V;
  if (row >= args.R) return;
  const T* logits = (const T*)args.logits + row * args.row;
  T* dlogits = (T*)args.dlogits + row * args.dlogits_row;
  const int64_t target = load(args.target + row);
  const bool kept = target != args.ignore_index;
  const float lse = load(args.lse + row), dloss = load(args.dloss + row * args.dloss_stride);
  float sum[1] = {1};  // of p: divided by it, p is free of what lse lost
  if (kept && fabsf(lse) > kLargeLse) {
    sum[0] = 0;
    for_logits<T, N>(logits, V, [&](const float (&x)[S][N], int64_t, const Share<N>&) {
      for_entries<S, N>([&](int s, int e) { sum[0] += expf(x[s][e] - lse); });
    });
    join(sum, Sum());
  }
  const float scale = dloss * (1.f + 2.f * args.z_loss * lse) / sum[0];
  const float even = dloss * args.smoothing / V, chosen = dloss * (1.f - args.smoothing);
  for_logits<T, N>(logits, V, [&](const float (&x)[S][N], int64_t at, const Share<N>& share) {
    float dx[S][N];
    for_entries<S, N>([&](int s, int e) {
      const float smooth = fmaf(expf(x[s][e] - lse), scale, -even);
      const bool here = at + share.column(s) + e == target;
      dx[s][e] = !kept ? 0.f : here ? smooth - chosen : smooth;
    });
    store_row(dlogits + at, share, dx);
  });
}

// ---- launchers ---------------------------------------------------------------------------------

template <class T>
static void cross_entropy_fwd_typed(const CrossEntropyArgs& args) {
  const dim3 block = row_block(args.V, kLogits);
  launch(
      "cross_entropy_fwd",
      args.V % kUnit<T> == 0 ? cross_entropy_fwd_kernel<T, kUnit<T>>
                             : cross_entropy_fwd_kernel<T, 1>,
      dim3((unsigned)cuts(args.R, block.y)), block, RowJoin::kBytes, current_stream(), args);
}
template <class T>
static void cross_entropy_bwd_typed(const CrossEntropyArgs& args) {
  const dim3 block = row_block(args.V, kLogits);
  launch(
      "cross_entropy_bwd",
      args.V % kUnit<T> == 0 ? cross_entropy_bwd_kernel<T, kUnit<T>>
                             : cross_entropy_bwd_kernel<T, 1>,
      dim3((unsigned)cuts(args.R, block.y)), block, RowJoin::kBytes, current_stream(), args);
}

void cross_entropy_fwd(const CrossEntropyArgs& args) {
  FASTATTN_DISPATCH(args.dtype, cross_entropy_fwd_typed, args);
}
void cross_entropy_bwd(const CrossEntropyArgs& args) {
  FASTATTN_DISPATCH(args.dtype, cross_entropy_bwd_typed, args);
}

}  // namespace fastattn::cuda
