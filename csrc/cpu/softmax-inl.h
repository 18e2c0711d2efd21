// Row softmax, forward and backward. One task is a block of rows; a row is read twice from cache.
//   y = exp(scale * x - max) / sum        dx = scale * y * (dy - sum(dy * y))
// The forward keeps a fp32 copy of one row, so 16-bit outputs are rounded once.

namespace fastattn::FASTATTN_ISA {

// z = scale * x where it is kept, else -inf.
template <class T>
FA_INLINE void kept_logits(
    const T* x, const uint8_t* keep, int64_t keep_col, int64_t C, float scale, float* z) {
  map_vectors(
      z, C, false, [=](int64_t c, auto n) FA_STEP { return load(x + c, n) * splat(scale); });
  if (keep == nullptr) return;
  for (int64_t c = 0; c < C; ++c) z[c] = keep[c * keep_col] ? z[c] : -kInf;
}

// z = exp(scale * x - their maximum), and the sum. scale is not 0: times it, what lanes past the
// end hold must be -inf.
template <class T>
FA_INLINE float exponentials(const T* x, int64_t C, float scale, float* z) {
  const float nothing = scale < 0 ? kInf : -kInf;
  const Vec factor = splat(scale);
  const float most =
      max_vectors(C, [=](int64_t c, auto n) FA_STEP { return load(x + c, n, nothing) * factor; });
  const Vec shift = splat(most == -kInf ? 0.f : most);
  return sum_mapped(z, C, [=](int64_t c, auto n) FA_STEP {
    return exp(fma(load(x + c, n, nothing), factor, -shift));
  });
}

template <class T>
FA_INLINE void softmax_row(const SoftmaxArgs& args, int64_t row, float* z) {
  const T* x = (const T*)args.x + row * args.C;
  T* y = (T*)args.out + row * args.C;
  const int64_t seen = args.causal ? row % args.Sq + args.C - args.Sq + 1 : args.C;
  const int64_t C = larger(0, seen);
  const uint8_t* keep = (const uint8_t*)args.mask.data;
  if (keep != nullptr) keep += args.mask.offset(row);
  prefetch(x + args.C, smaller(C + 1, args.C) * (int64_t)sizeof(T));
  // The line where zeros begin is written in two parts, through the cache: without this, stores
  // wait for memory in every row.
  if (args.causal) __builtin_prefetch(y + C, 1);
  float sum;
  if (keep != nullptr || args.scale == 0) {
    kept_logits(x, keep, args.mask.col, C, args.scale, z);
    sum = exponentials(z, C, 1.f, z);
  } else {
    sum = exponentials(x, C, args.scale, z);
  }
  const Vec inverse = splat(sum == 0.f ? 0.f : 1.f / sum);
  const bool past = goes_past(args.R * args.C, 2);
  map_vectors(y, C, past, [=](int64_t c, auto n) FA_STEP { return load(z + c, n) * inverse; });
  map_vectors(y + C, args.C - C, past, [](int64_t, auto) FA_STEP { return Vec{}; });
}

template <class T>
FA_INLINE void softmax_grad_row(const SoftmaxArgs& args, int64_t row) {
  const T* y = (const T*)args.x + row * args.C;
  const T* dy = (const T*)args.dy + row * args.C;
  T* dx = (T*)args.out + row * args.C;
  const Vec dot = splat(sum_vectors(
      args.C, [=](int64_t c, auto n) FA_STEP { return load(y + c, n) * load(dy + c, n); }));
  const Vec scale = splat(args.scale);
  map_vectors(dx, args.C, goes_past(args.R * args.C, 3), [=](int64_t c, auto n) FA_STEP {
    return scale * load(y + c, n) * (load(dy + c, n) - dot);
  });
}

template <class T>
static void softmax_fwd_typed(const SoftmaxArgs& args) {
  parallel_rows(
      args.R, args.C, [&](int64_t row) { softmax_row<T>(args, row, thread_scratch(0, args.C)); });
}

template <class T>
static void softmax_bwd_typed(const SoftmaxArgs& args) {
  parallel_rows(args.R, args.C, [&](int64_t row) { softmax_grad_row<T>(args, row); });
}

static void softmax_fwd(const SoftmaxArgs& args) {
  FASTATTN_DISPATCH(args.dtype, softmax_fwd_typed, args);
}
static void softmax_bwd(const SoftmaxArgs& args) {
  FASTATTN_DISPATCH(args.dtype, softmax_bwd_typed, args);
}

}  // namespace fastattn::FASTATTN_ISA
