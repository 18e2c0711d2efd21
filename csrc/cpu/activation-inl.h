// gelu with an optional bias, and the gated activations, forward and backward, elementwise.
//   erf:  gelu(x) = x Phi(x);            gelu'(x) = Phi(x) + x phi(x)
//   tanh: gelu(x) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
//   silu(x) = x sigmoid(x)

namespace fastattn::FASTATTN_ISA {

// An activation and its derivative at one point.
struct Curve {
  Vec value, slope;
};

FA_INLINE Vec sigmoid(Vec x) { return splat(1.f) / (splat(1.f) + exp(min(splat(kExpInf), -x))); }

FA_INLINE Curve silu(Vec x) {
  const Vec s = sigmoid(x);
  return {x * s, s * fma(x, splat(1.f) - s, splat(1.f))};
}

FA_INLINE Curve gelu_tanh(Vec x) {
  const Vec twice = splat(2 * 0.7978845608028654f), cubic = splat(0.044715f);
  const Vec x2 = x * x;
  const Vec s = sigmoid(twice * x * fma(cubic, x2, splat(1.f)));
  const Vec du = twice * fma(splat(3 * 0.044715f), x2, splat(1.f));
  return {x * s, s * fma(x * (splat(1.f) - s), du, splat(1.f))};
}

// Phi(x) = erfc(-x / sqrt 2) / 2 with erfc(z) = t exp(-z^2 + p(t)), t = 1 / (1 + z / 2): Chebyshev
// fit of Numerical Recipes' erfcc, 1.2e-7 relative in both tails; so Phi keeps its relative
// accuracy where gelu is small.
FA_INLINE Curve gelu_erf(Vec x) {
  const Vec size = x < Vec{} ? -x : x;
  const Vec z = size * splat(0.7071067811865476f);
  const Vec t = splat(1.f) / fma(z, splat(0.5f), splat(1.f));
  Vec p = splat(0.17087277f);
  p = fma(p, t, splat(-0.82215223f));
  p = fma(p, t, splat(1.48851587f));
  p = fma(p, t, splat(-1.13520398f));
  p = fma(p, t, splat(0.27886807f));
  p = fma(p, t, splat(-0.18628806f));
  p = fma(p, t, splat(0.09678418f));
  p = fma(p, t, splat(0.37409196f));
  p = fma(p, t, splat(1.00002368f));
  p = fma(p, t, splat(-1.26551223f));
  const Vec tail = splat(0.5f) * t * exp(fma(-z, z, p));
  const Vec phi_cumulative = x < Vec{} ? tail : splat(1.f) - tail;
  const Vec density = splat(0.3989422804014327f) * exp(-z * z);
  return {x * phi_cumulative, fma(x, density, phi_cumulative)};
}

enum class Act { silu, gelu_erf, gelu_tanh };

template <Act kAct>
FA_INLINE Curve curve(Vec x) {
  if constexpr (kAct == Act::silu) return silu(x);
  if constexpr (kAct == Act::gelu_tanh) return gelu_tanh(x);
  return gelu_erf(x);
}

// ---- gelu ------------------------------------------------------------------------------------

// The bias as fp32 in slot 0 of the scratch, or null.
static const float* bias_row(const Columns& bias, int64_t C) {
  if (bias.data == nullptr) return nullptr;
  float* row = thread_scratch(0, C);
  switch (bias.dtype) {
    case Dtype::f32: convert((const float*)bias.data, row, C); break;
    case Dtype::bf16: convert((const bf16*)bias.data, row, C); break;
    case Dtype::f16: convert((const fp16*)bias.data, row, C); break;
  }
  return row;
}

template <class T, Act kAct>
static void gelu_forward(const GeluArgs& args) {
  const float* bias = bias_row(args.bias, args.C);
  const bool past = goes_past(args.R * args.C, 2);
  parallel_spans(args.R, args.C, [&](int64_t row, int64_t begin, int64_t end) {
    const T* x = row_of<T>(args.x, row) + begin;
    T* y = row_of<T>(args.y, row) + begin;
    if (bias == nullptr)
      return map_vectors(y, end - begin, past, [=](int64_t c, auto n) FA_STEP {
        return curve<kAct>(load(x + c, n)).value;
      });
    const float* b = bias + begin;
    map_vectors(y, end - begin, past, [=](int64_t c, auto n) FA_STEP {
      return curve<kAct>(load(x + c, n) + load(b + c, n)).value;
    });
  });
}

template <class T, Act kAct>
static void gelu_backward(const GeluArgs& args) {
  const float* bias = bias_row(args.bias, args.C);
  const int64_t C = args.C;
  const auto grad_row = [&](int64_t row, float* sums) {
    const T *x = row_of<T>(args.x, row), *dy = row_of<T>(args.dy, row);
    T* dx = row_of<T>(args.dx, row);
    for_vectors(C, [=](int64_t c, auto n) FA_STEP {
      Vec z = load(x + c, n);
      if (bias != nullptr) z += load(bias + c, n);
      const Vec g = load(dy + c, n) * curve<kAct>(z).slope;
      store(dx + c, g, n);
      if (sums != nullptr) store(sums + c, load(sums + c, n) + g, n);
    });
  };
  if (args.dbias == nullptr)
    return parallel_rows(args.R, C, [&](int64_t row) { grad_row(row, nullptr); });
  const RowBlocks blocks(args.R, C, C);
  const float* totals = sum_blocks(blocks, grad_row);
  add_blocks<float>(blocks, totals, 0, args.dbias, C);
}

template <class T>
static void gelu_fwd_typed(const GeluArgs& args) {
  return args.tanh ? gelu_forward<T, Act::gelu_tanh>(args) : gelu_forward<T, Act::gelu_erf>(args);
}
template <class T>
static void gelu_bwd_typed(const GeluArgs& args) {
  return args.tanh ? gelu_backward<T, Act::gelu_tanh>(args) : gelu_backward<T, Act::gelu_erf>(args);
}
static void gelu_fwd(const GeluArgs& args) { FASTATTN_DISPATCH(args.dtype, gelu_fwd_typed, args); }
static void gelu_bwd(const GeluArgs& args) { FASTATTN_DISPATCH(args.dtype, gelu_bwd_typed, args); }

// ---- gated -----------------------------------------------------------------------------------

template <class T, Act kAct>
static void glu_forward(const GluArgs& args) {
  const bool past = goes_past(args.R * args.C, 3);
  parallel_spans(args.R, args.C, [&](int64_t row, int64_t begin, int64_t end) {
    const T* gate = row_of<T>(args.gate, row) + begin;
    const T* up = row_of<T>(args.up, row) + begin;
    T* y = row_of<T>(args.y, row) + begin;
    map_vectors(y, end - begin, past, [=](int64_t c, auto n) FA_STEP {
      return curve<kAct>(load(gate + c, n)).value * load(up + c, n);
    });
  });
}

template <class T, Act kAct>
static void glu_backward(const GluArgs& args) {
  parallel_spans(args.R, args.C, [&](int64_t row, int64_t begin, int64_t end) {
    const T* gate = row_of<T>(args.gate, row) + begin;
    const T* up = row_of<T>(args.up, row) + begin;
    const T* dy = row_of<T>(args.dy, row) + begin;
    T* dgate = row_of<T>(args.dgate, row) + begin;
    T* dup = row_of<T>(args.dup, row) + begin;
    for_vectors(end - begin, [=](int64_t c, auto n) FA_STEP {
      const Curve act = curve<kAct>(load(gate + c, n));
      const Vec grad = load(dy + c, n);
      store(dgate + c, grad * load(up + c, n) * act.slope, n);
      store(dup + c, grad * act.value, n);
    });
  });
}

template <class T>
static void glu_fwd_typed(const GluArgs& args) {
  if (!args.gelu) return glu_forward<T, Act::silu>(args);
  return args.tanh ? glu_forward<T, Act::gelu_tanh>(args) : glu_forward<T, Act::gelu_erf>(args);
}
template <class T>
static void glu_bwd_typed(const GluArgs& args) {
  if (!args.gelu) return glu_backward<T, Act::silu>(args);
  return args.tanh ? glu_backward<T, Act::gelu_tanh>(args) : glu_backward<T, Act::gelu_erf>(args);
}
static void glu_fwd(const GluArgs& args) { FASTATTN_DISPATCH(args.dtype, glu_fwd_typed, args); }
static void glu_bwd(const GluArgs& args) { FASTATTN_DISPATCH(args.dtype, glu_bwd_typed, args); }

}  // namespace fastattn::FASTATTN_ISA
