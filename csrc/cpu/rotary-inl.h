// Rotary embedding: (a, b) -> (a cos - b sin, b cos + a sin) for the pairs (d, d + half), or (2d,
// 2d + 1) when interleaved. The backward is the rotation by the opposite angle.

namespace fastattn::FASTATTN_ISA {

template <class T>
static void rotary_token(const RotaryArgs& args, int64_t b, int64_t h, int64_t s) {
  const T* x = (const T*)args.x + b * args.x_batch + h * args.x_head + s * args.x_row;
  T* y = (T*)args.y + b * args.y_batch + h * args.y_head + s * args.y_row;
  const int64_t half = args.half;
  const int64_t position =
      args.positions == nullptr ? s : args.positions[b * args.positions_batch + s];
  const float *cos = args.cos + position * half, *sin = args.sin + position * half;
  const float turn = args.inverse ? -1.f : 1.f;
  if (args.interleaved) {
    for (int64_t d = 0; d < half; ++d) {
      const float p = to_float(x[2 * d]), q = to_float(x[2 * d + 1]), t = turn * sin[d];
      from_float(p * cos[d] - q * t, y + 2 * d);
      from_float(q * cos[d] + p * t, y + 2 * d + 1);
    }
  } else {
    for_vectors(half, [=](int64_t d, auto n) FA_STEP {
      const Vec p = load(x + d, n), q = load(x + half + d, n);
      const Vec c = load(cos + d, n), t = load(sin + d, n) * splat(turn);
      store(y + d, p * c - q * t, n);
      store(y + half + d, q * c + p * t, n);
    });
  }
  std::memcpy(y + 2 * half, x + 2 * half, (args.D - 2 * half) * sizeof(T));
}

// dcos = sum of da a + db b, dsin = sum of db a - da b, in double: a row may turn many tokens.
template <class T>
static void rotary_table_row(const RotaryTablesArgs& args, int64_t row) {
  const RotaryArgs& turned = args.turned;
  const int64_t half = turned.half, step = turned.interleaved ? 2 : 1;
  const int64_t partner = turned.interleaved ? 1 : half;
  double* cos_sum = (double*)thread_scratch(0, 4 * half);
  double* sin_sum = cos_sum + half;
  for (int64_t d = 0; d < 2 * half; ++d) cos_sum[d] = 0;
  for (int64_t at = args.starts[row]; at < args.starts[row + 1]; ++at) {
    const int64_t b = args.tokens[at] / turned.S, s = args.tokens[at] % turned.S;
    for (int64_t h = 0; h < turned.H; ++h) {
      const T* x = (const T*)turned.x + b * turned.x_batch + h * turned.x_head + s * turned.x_row;
      const T* dy = (const T*)turned.y + b * turned.y_batch + h * turned.y_head + s * turned.y_row;
      for (int64_t d = 0; d < half; ++d) {
        const float p = to_float(x[d * step]), q = to_float(x[d * step + partner]);
        const float dp = to_float(dy[d * step]), dq = to_float(dy[d * step + partner]);
        cos_sum[d] += (double)dp * p + (double)dq * q;
        sin_sum[d] += (double)dq * p - (double)dp * q;
      }
    }
  }
  for (int64_t d = 0; d < half; ++d) {
    args.dcos[row * half + d] = (float)cos_sum[d];
    args.dsin[row * half + d] = (float)(turned.inverse ? -sin_sum[d] : sin_sum[d]);
  }
}

static void rotary_tables(const RotaryTablesArgs& args) {
  parallel_tasks(args.P, [&](int64_t row) {
    FASTATTN_DISPATCH(args.turned.dtype, rotary_table_row, args, row);
  });
}

static void rotary(const RotaryArgs& args) {
  parallel_rows(args.B * args.H * args.S, args.D, [&](int64_t row) {
    const int64_t b = row / args.S / args.H, h = row / args.S % args.H, s = row % args.S;
    FASTATTN_DISPATCH(args.dtype, rotary_token, args, b, h, s);
  });
}

}  // namespace fastattn::FASTATTN_ISA
