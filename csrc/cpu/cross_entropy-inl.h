// Cross-entropy of rows of logits. Forward: one read, maximum and sum of exponentials online, a
// piece of the row in L1 at a time. Backward: one read, one write, in place if asked:
//   dx = dloss * ((1 + 2 z_loss lse) softmax(x) - smoothing / V - (1 - smoothing) [target])

namespace fastattn::FASTATTN_ISA {

constexpr int64_t kPieceEntries = 2048;  // 8 KB of fp32: read from memory once, then from L1

template <class T>
FA_INLINE float sum_exp(const T* x, int64_t C, float shift) {
  return sum_vectors(C, [=](int64_t c, auto lanes) FA_STEP {
    return exp(load(x + c, lanes, -kInf) - splat(shift));
  });
}

template <class T>
static void cross_entropy_row(const CrossEntropyArgs& args, int64_t row) {
  const int64_t target = args.target[row], V = args.V;
  const T* x = (const T*)args.logits + row * args.row;
  float row_max = -kInf;
  double row_sum = 0, total = 0;
  for (int64_t start = 0; start < V; start += kPieceEntries) {
    const int64_t n = smaller(kPieceEntries, V - start);
    const T* piece = x + start;
    const float most = max_vectors(
        n, [=](int64_t c, auto lanes) FA_STEP { return load(piece + c, lanes, -kInf); });
    if (most > row_max) {
      row_sum *= std::exp((double)row_max - most);
      row_max = most;
    }
    // a NaN logit is in no maximum, and reaches the sum here; all of -inf sums to 0
    const float shift = row_max == -kInf ? 0.f : row_max;
    row_sum += sum_exp(piece, n, shift);
    if (args.smoothing > 0)  // less the maximum: a fp32 sum of logits near 1e4 would lose 1e-4
      total += (double)n * shift + sum_vectors(n, [=](int64_t c, auto lanes) FA_STEP {
                 return load(piece + c, lanes, shift) - splat(shift);
               });
  }
  const double lse = row_sum == 0 ? -kInf : row_max + std::log(row_sum);
  args.lse[row] = (float)lse;
  if (target == args.ignore_index || target < 0 || target >= V) {
    args.loss[row] = 0.f;
    return;
  }
  double loss = lse - to_float(x[target]);
  if (args.smoothing > 0) loss = (1 - args.smoothing) * loss + args.smoothing * (lse - total / V);
  args.loss[row] = (float)(loss + args.z_loss * lse * lse);
}

// Beyond this an lse rounded to fp32 puts more than 1e-6 into p = exp(x - lse).
constexpr float kLargeLse = 16.f;

template <class T>
static void cross_entropy_grad_row(const CrossEntropyArgs& args, int64_t row) {
  const int64_t target = args.target[row], V = args.V;
  const T* x = (const T*)args.logits + row * args.row;
  T* dx = (T*)args.dlogits + row * args.dlogits_row;
  const float dloss = args.dloss[row * args.dloss_stride];
  if (target == args.ignore_index) {
    std::memset(dx, 0, V * sizeof(T));
    return;
  }
  const float lse = args.lse[row];
  double sum = 1;  // of p: divided by it, p is free of what lse lost
  if (std::fabs(lse) > kLargeLse) {
    sum = 0;
    for (int64_t start = 0; start < V; start += kPieceEntries)
      sum += sum_exp(x + start, smaller(kPieceEntries, V - start), lse);
  }
  const float scale = dloss * (1.f + 2.f * args.z_loss * lse) / (float)sum;
  const float even = dloss * args.smoothing / V;
  const float chosen = dloss * (1.f - args.smoothing);
  // before dx, which may be x, is written
  const float p_target = std::exp(to_float(x[target]) - lse);
  const Vec factor = splat(scale), shift = splat(lse), smooth = splat(even);
  const bool past = dx != x && goes_past(args.R * V, 2);  // its line is not there yet
  map_vectors(dx, V, past, [=](int64_t c, auto n) FA_STEP {
    const Vec p = exp(load(x + c, n) - shift);
    return fma(p, factor, -smooth);
  });
  from_float(scale * p_target - even - chosen, dx + target);
}

static void cross_entropy_fwd(const CrossEntropyArgs& args) {
  parallel_rows(args.R, args.V, [&](int64_t row) {
    FASTATTN_DISPATCH(args.dtype, cross_entropy_row, args, row);
  });
}
static void cross_entropy_bwd(const CrossEntropyArgs& args) {
  parallel_rows(args.R, args.V, [&](int64_t row) {
    FASTATTN_DISPATCH(args.dtype, cross_entropy_grad_row, args, row);
  });
}

}  // namespace fastattn::FASTATTN_ISA
