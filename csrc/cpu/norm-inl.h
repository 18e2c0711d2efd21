// layer_norm and rms_norm, forward and backward, with dropout and residual.
//   z = dropout(x) + residual;  h = (z - mean) * rstd;  y = h * w + bias,  w = weight + offset
//   g = dy * w;  dz = rstd * (g - mean(g) - h * mean(g * h)) + dsummed   (rms: no mean(g))
//   dweight = sum over rows of dy * h;  dbias = sum over rows of dy
// A row is read once from memory, into fp32 in L1, and passed over there: two passes for the
// variance cost nothing beside memory and keep torch's accuracy. 16-bit types are converted at the
// edges, so the arithmetic exists once.

namespace fastattn::FASTATTN_ISA {

struct NormWeights {
  const float *weight, *bias;
};

template <class T>
static void add_offset(const void* weight, float offset, float* out, int64_t C) {
  for_vectors(C, [=](int64_t c, auto n) FA_STEP {
    store(out + c, load((const T*)weight + c, n) + splat(offset), n);
  });
}

FA_INLINE void fill(float* out, float value, int64_t C) {
  for (int64_t c = 0; c < C; ++c) out[c] = value;
}

// Absent weights become 1 and 0: a multiply-add from L1 is cheaper than a branch a vector.
static NormWeights norm_weights(const NormArgs& args) {
  float* weight = thread_scratch(3, 2 * args.C);
  float* bias = weight + args.C;
  fill(weight, 1.f, args.C);
  fill(bias, 0.f, args.C);
  if (args.weight.data != nullptr)
    FASTATTN_DISPATCH(
        args.weight.dtype, add_offset, args.weight.data, args.weight_offset, weight, args.C);
  if (args.bias.data != nullptr)
    FASTATTN_DISPATCH(args.bias.dtype, add_offset, args.bias.data, 0.f, bias, args.C);
  return {weight, bias};
}

// ---- rows in, rows out ---------------------------------------------------------------------

template <class T>
static void read_row(const RowMap& map, int64_t row, float* out, int64_t C) {
  convert(row_of<T>(map, row), out, C);
}
template <class T>
static void write_row(const float* a, const RowMap& map, int64_t row, int64_t C) {
  convert(a, row_of<T>(map, row), C);
}
template <class T>
static void add_to_row(const RowMap& map, int64_t row, const float* a, float* out, int64_t C) {
  add(a, row_of<T>(map, row), out, C);
}

// The row as fp32: itself, or converted into buffer.
static const float* fp32_row(
    Dtype dtype, const RowMap& map, int64_t row, float* buffer, int64_t C) {
  if (dtype == Dtype::f32) return row_of<float>(map, row);
  FASTATTN_DISPATCH(dtype, read_row, map, row, buffer, C);
  return buffer;
}

// A random word for every column of a row, or null without dropout.
static const uint32_t* drop_words(const NormArgs& args, int64_t row) {
  if (!args.dropout) return nullptr;
  const PhiloxKey philox = philox_key(args.philox);
  const int64_t quads = cuts(args.C, 4);
  uint32_t* words = (uint32_t*)thread_scratch(4, 4 * quads);
  for (int64_t quad = 0; quad < quads; ++quad) {
    const PhiloxWords four =
        philox4x32((uint32_t)quad, (uint32_t)row, 0, philox.offset, philox.seed);
    for (int i = 0; i < 4; ++i) words[4 * quad + i] = four.word[i];
  }
  return words;
}

static void drop(const NormArgs& args, const uint32_t* words, const float* a, float* out) {
  const bool keep_none = args.keep_scale == 0.f;
  for (int64_t c = 0; c < args.C; ++c)
    out[c] = words[c] < args.drop_below || keep_none ? 0.f : a[c] * args.keep_scale;
}

static void prefetch_row(Dtype dtype, const RowMap& map, int64_t row, const NormArgs& args) {
  if (map.data == nullptr || row >= args.R) return;
  const int64_t bytes = dtype == Dtype::f32 ? 4 : 2;
  prefetch((const char*)map.data + map.offset(row) * bytes, args.C * bytes);
}

// z of a row: in buffer, or where x already holds it.
static const float* norm_input(
    const NormArgs& args, int64_t row, const uint32_t* words, float* buffer) {
  const float* z = fp32_row(args.dtype, args.x, row, buffer, args.C);
  if (words != nullptr) {
    drop(args, words, z, buffer);
    z = buffer;
  }
  if (args.residual.data == nullptr) return z;
  FASTATTN_DISPATCH(args.residual_dtype, add_to_row, args.residual, row, z, buffer, args.C);
  return buffer;
}

// ---- forward -------------------------------------------------------------------------------

struct NormStats {
  float mean, rstd;
};

// The second pass also sums z - mean, which is what rounding left in the mean: at a mean of 1e4 a
// plain fp32 sum of 768 entries leaves up to 1e-3.
FA_INLINE NormStats norm_stats(const float* z, int64_t C, bool rms, float eps) {
  const auto entry = [=](int64_t c, auto n) FA_STEP { return load(z + c, n); };
  const float mean = rms ? 0.f : sum_vectors(C, entry) / C;
  const Pair sums = sum_pairs(C, [=](int64_t c, auto n) FA_STEP {
    const Vec d = load(z + c, n, mean) - splat(mean);
    return VecPair{d, d * d};
  });
  const float shift = rms ? 0.f : sums.a / C;
  const float variance = sums.b / C - shift * shift;
  return {mean + shift, 1.f / std::sqrt((variance < 0.f ? 0.f : variance) + eps)};
}

template <class T>
static void norm_output(
    const float* z, NormStats stats, NormWeights w, const NormArgs& args, int64_t row) {
  T* y = row_of<T>(args.y, row);
  const Vec mean = splat(stats.mean), rstd = splat(stats.rstd);
  map_vectors(y, args.C, goes_past(args.R * args.C, 2), [=](int64_t c, auto n) FA_STEP {
    const Vec h = (load(z + c, n) - mean) * rstd;
    return fma(h, load(w.weight + c, n), load(w.bias + c, n));
  });
}

static void norm_row(const NormArgs& args, NormWeights weights, int64_t row) {
  const bool fp32_sum = args.summed.data != nullptr && args.residual_dtype == Dtype::f32;
  float* buffer = fp32_sum ? row_of<float>(args.summed, row) : thread_scratch(0, args.C);
  const float* z = norm_input(args, row, drop_words(args, row), buffer);
  prefetch_row(args.dtype, args.x, row + 1, args);
  prefetch_row(args.residual_dtype, args.residual, row + 1, args);
  const NormStats stats = norm_stats(z, args.C, args.rms, args.eps);
  if (!args.rms) args.mean[row] = stats.mean;
  args.rstd[row] = stats.rstd;
  FASTATTN_DISPATCH(args.dtype, norm_output, z, stats, weights, args, row);
  if (args.summed.data != nullptr && !(fp32_sum && z == buffer))
    FASTATTN_DISPATCH(args.residual_dtype, write_row, z, args.summed, row, args.C);
}

static void norm_fwd(const NormArgs& args) {
  const NormWeights weights = norm_weights(args);
  parallel_rows(args.R, args.C, [&](int64_t row) { norm_row(args, weights, row); });
}

// ---- backward ------------------------------------------------------------------------------

// One row's g and h in two passes: their means (and the sums over rows: sums[0, C) for weight,
// sums[C, 2C) for bias), then dz. g waits, rounded: a fused g - mean(g) would not be 0 at C
// = 1.
template <bool kSums>
static void norm_grad(
    const NormArgs& args, const float* z, const float* dy, NormStats stats, const float* weight,
    float* sums, float* dz, bool past) {
  const int64_t C = args.C;
  float* waiting = thread_scratch(7, C);
  const Vec mean = splat(stats.mean), rstd = splat(stats.rstd);
  const Pair dots = sum_pairs(C, [=](int64_t c, auto n) FA_STEP {
    const Vec h = (load(z + c, n) - mean) * rstd, grad = load(dy + c, n);
    if (kSums) {
      store(sums + c, fma(grad, h, load(sums + c, n)), n);
      store(sums + C + c, grad + load(sums + C + c, n), n);
    }
    const Vec g = grad * load(weight + c, n);
    store(waiting + c, g, n);
    return VecPair{g, g * h};
  });
  const Vec g_mean = splat(args.rms ? 0.f : dots.a / C), gh_mean = splat(dots.b / C);
  map_vectors(dz, C, past, [=](int64_t c, auto n) FA_STEP {
    const Vec h = (load(z + c, n) - mean) * rstd;
    return rstd * (load(waiting + c, n) - g_mean - h * gh_mean);
  });
}

template <bool kSums>
static void norm_grad_row(const NormArgs& args, NormWeights weights, int64_t row, float* sums) {
  const int64_t C = args.C;
  const uint32_t* words = drop_words(args, row);
  const bool direct = args.dtype == Dtype::f32 && args.dx.data != nullptr && !args.dropout;
  float* dz = direct ? row_of<float>(args.dx, row) : thread_scratch(5, C);
  if (args.dy.data != nullptr) {
    const float* z = norm_input(args, row, words, thread_scratch(0, C));
    const float* dy = fp32_row(args.dtype, args.dy, row, thread_scratch(6, C), C);
    prefetch_row(args.dtype, args.x, row + 1, args);
    prefetch_row(args.dtype, args.dy, row + 1, args);
    const NormStats stats = {args.rms ? 0.f : args.mean[row], args.rstd[row]};
    const bool last = direct && args.dsummed.data == nullptr && args.dresidual.data == nullptr;
    const bool past = last && goes_past(args.R * C, 3);
    norm_grad<kSums>(args, z, dy, stats, weights.weight, sums, dz, past);
  } else {
    fill(dz, 0.f, C);
  }
  if (args.dsummed.data != nullptr)
    FASTATTN_DISPATCH(args.residual_dtype, add_to_row, args.dsummed, row, dz, dz, C);
  if (args.dresidual.data != nullptr)
    FASTATTN_DISPATCH(args.residual_dtype, write_row, dz, args.dresidual, row, C);
  if (args.dx.data == nullptr || direct) return;
  if (words != nullptr) drop(args, words, dz, dz);
  FASTATTN_DISPATCH(args.dtype, write_row, dz, args.dx, row, C);
}

static void norm_bwd(const NormArgs& args) {
  const int64_t C = args.C;
  const NormWeights weights = norm_weights(args);
  if (args.dweight == nullptr && args.dbias == nullptr)
    return parallel_rows(
        args.R, C, [&](int64_t row) { norm_grad_row<false>(args, weights, row, nullptr); });
  const RowBlocks blocks(args.R, C, 2 * C);
  const float* totals = sum_blocks(
      blocks, [&](int64_t row, float* sums) { norm_grad_row<true>(args, weights, row, sums); });
  if (args.dweight != nullptr)
    FASTATTN_DISPATCH(args.weight.dtype, add_blocks, blocks, totals, 0, args.dweight, C);
  if (args.dbias != nullptr)
    FASTATTN_DISPATCH(args.bias.dtype, add_blocks, blocks, totals, C, args.dbias, C);
}

}  // namespace fastattn::FASTATTN_ISA
