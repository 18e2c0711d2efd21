// Row softmax, forward and backward. One task is a block of rows; a row is read twice from cache.
//   y = exp(scale * x - max) / sum        dx = scale * y * (dy - sum(dy * y))
// The forward keeps a fp32 copy of one row, so 16-bit outputs are rounded once.

namespace fastattn::FASTATTN_ISA {

// One row's kept logits, scaled, into z; entries that are not kept become -inf.
template <class T>
FA_INLINE Vec softmax_logits(
    const T* x, const uint8_t* keep, int64_t keep_col, int64_t C, float scale, float* z) {
  const Vec factor = splat(scale);
  Vec highest[4], row_max;  // chains: a maximum takes 4 cycles
  FA_FOR (i, 4) highest[i] = splat(-kInf);
  const auto step = [&](int64_t c, Vec* largest) FA_STEP {
    const Vec v = load(x + c) * factor;
    store(z + c, v);
    *largest = max(v, *largest);
  };
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes)
    FA_FOR (i, 4) step(c + i * kLanes, &highest[i]);
  for (; c + kLanes <= C; c += kLanes) step(c, &highest[0]);
  row_max = max(max(highest[0], highest[1]), max(highest[2], highest[3]));
  if (c < C) store_first(z + c, load_first(x + c, C - c) * factor, C - c);
  if (keep == nullptr && c == C) return row_max;
  if (keep == nullptr) return max(load_first(z + c, C - c, -kInf), row_max);
  row_max = splat(-kInf);
  for (c = 0; c < C; ++c) z[c] = keep[c * keep_col] ? z[c] : -kInf;
  for (c = 0; c + kLanes <= C; c += kLanes) row_max = max(load(z + c), row_max);
  return c < C ? max(load_first(z + c, C - c, -kInf), row_max) : row_max;
}

template <class T>
FA_INLINE void softmax_row(const SoftmaxArgs& args, int64_t row, float* z) {
  const T* x = (const T*)args.x + row * args.C;
  T* y = (T*)args.out + row * args.C;
  int64_t C = args.C;
  if (args.causal) C = row % args.Sq + args.C - args.Sq + 1;
  C = C < 0 ? 0 : C;
  const uint8_t* keep = (const uint8_t*)args.mask.data;
  if (keep != nullptr) keep += args.mask.offset(row);
  const float row_max = reduce_max(softmax_logits(x, keep, args.mask.col, C, args.scale, z));
  const Vec shift = splat(row_max == -kInf ? 0.f : row_max);
  prefetch(x + args.C, args.C * (int64_t)sizeof(T));
  Vec sums = {};
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) {
    const Vec p = exp(load(z + c) - shift);
    store(z + c, p);
    sums += p;
  }
  if (c < C) {
    const Vec p = exp(load_first(z + c, C - c, -kInf) - shift);
    store_first(z + c, p, C - c);
    sums += p;
  }
  const float sum = reduce_sum(sums);
  const Vec inverse = splat(sum == 0.f ? 0.f : 1.f / sum);
  for (c = 0; c + kLanes <= C; c += kLanes) store(y + c, load(z + c) * inverse);
  if (c < C) store_first(y + c, load_first(z + c, C - c) * inverse, C - c);
  if (C < args.C) std::memset(y + C, 0, (args.C - C) * sizeof(T));
}

template <class T>
FA_INLINE void softmax_grad_row(const SoftmaxArgs& args, int64_t row) {
  const T* y = (const T*)args.x + row * args.C;
  const T* dy = (const T*)args.dy + row * args.C;
  T* dx = (T*)args.out + row * args.C;
  Vec sums = {};
  int64_t c = 0;
  for (; c + kLanes <= args.C; c += kLanes) sums = fma(load(y + c), load(dy + c), sums);
  if (c < args.C) sums = fma(load_first(y + c, args.C - c), load_first(dy + c, args.C - c), sums);
  const Vec dot = splat(reduce_sum(sums)), scale = splat(args.scale);
  for (c = 0; c + kLanes <= args.C; c += kLanes)
    store(dx + c, scale * load(y + c) * (load(dy + c) - dot));
  if (c < args.C) {
    const Vec tail = scale * load_first(y + c, args.C - c) * (load_first(dy + c, args.C - c) - dot);
    store_first(dx + c, tail, args.C - c);
  }
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
