// gelu with an optional bias, and the gated activations, forward and backward, elementwise.
//   erf:  gelu(x) = x Phi(x);            gelu'(x) = Phi(x) + x phi(x)
//   tanh: gelu(x) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
//   silu(x) = x sigmoid(x)
// A thread takes 16 bytes of a row. dbias is the sum of dx over rows: sums of chunks of rows, then
// the sum of those.
#include "rows.cuh"
#include "../common/activation.h"

namespace fastattn::cuda {

enum class Act { silu, gelu_erf, gelu_tanh };

// An activation and its derivative at one point.
struct Curve {
  float value, slope;
};

FASTATTN_DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

FASTATTN_DEVICE Curve silu(float x) {
  const float s = sigmoid(x);
  return {x * s, s * fmaf(x, 1.f - s, 1.f)};
}
FASTATTN_DEVICE Curve gelu_tanh(float x) {
  constexpr float kTwice = 2 * 0.7978845608028654f, kCubic = 0.044715f;
  const float x2 = x * x, s = sigmoid(kTwice * x * fmaf(kCubic, x2, 1.f));
  const float du = kTwice * fmaf(3 * kCubic, x2, 1.f);
  return {x * s, s * fmaf(x * (1.f - s), du, 1.f)};
}
// Phi(x) = erfc(-x / sqrt 2) / 2 keeps its relative accuracy where gelu is small.
FASTATTN_DEVICE Curve gelu_erf(float x) {
  const float cumulative = 0.5f * erfcf(-0.7071067811865476f * x);
  const float density = 0.3989422804014327f * expf(-0.5f * x * x);
  return {x * cumulative, fmaf(x, density, cumulative)};
}

template <Act kAct>
FASTATTN_DEVICE Curve curve(float x) {
  if constexpr (kAct == Act::silu) return silu(x);
  if constexpr (kAct == Act::gelu_tanh) return gelu_tanh(x);
  return gelu_erf(x);
}

// body(ActType) for the activation of a call.
template <Act kAct>
struct ActType {
  static constexpr Act value = kAct;
};
template <class Body>
static void with_gelu(bool tanh, Body body) {
  tanh ? body(ActType<Act::gelu_tanh>()) : body(ActType<Act::gelu_erf>());
}
template <class Body>
static void with_act(bool gelu, bool tanh, Body body) {
  gelu ? with_gelu(tanh, body) : body(ActType<Act::silu>());
}

// ---- elementwise -------------------------------------------------------------------------------

// Where in a matrix a thread's unit is; `left` columns from there on are there.
struct Place {
  int64_t row, column;
  int left;
};
constexpr int kThreads = 256;

// The units of R rows of C columns, one a thread. 32-bit division is a third of a unit's work.
template <int N>
FASTATTN_DEVICE Place place(int64_t R, int64_t C) {
  const int64_t at = blockIdx.x * (int64_t)kThreads + threadIdx.x, units = cuts(C, N);
  const bool small = at <= UINT32_MAX && units <= UINT32_MAX;
  const int64_t row = small ? (uint32_t)at / (uint32_t)units : at / units;
  const int64_t column = (at - row * units) * N;
  return {row, column, row < R ? (int)smaller(C - column, N) : 0};
}
template <int N>
static dim3 elementwise_grid(int64_t R, int64_t C) {
  return dim3((unsigned)cuts(R * cuts(C, N), kThreads));
}

template <int N, class T>
FASTATTN_DEVICE void load_at(const RowMap& map, Place at, float (&x)[N]) {
  load_unit(row_of<const T>(map, at.row) + at.column, at.left, x);
}
template <int N, class T>
FASTATTN_DEVICE void store_at(const RowMap& map, Place at, const float (&x)[N]) {
  store_unit(row_of<T>(map, at.row) + at.column, at.left, x);
}

// Rows that follow each other without a gap are one long row, whose units are all aligned.
static bool is_flat(const RowMap& map, int64_t C) {
  return map.dims == 0 || (map.dims == 1 && map.stride[0] == C && map.col == 1);
}
template <class Args, class... Maps>
static void flatten(Args& args, Maps*... maps) {
  if (!(is_flat(*maps, args.C) && ...)) return;
  ((maps->dims = 0), ...);
  args.C *= args.R;
  args.R = args.C > 0;
}

// ---- gelu --------------------------------------------------------------------------------------

// x + bias, in fp32.
template <class T, int N>
FASTATTN_DEVICE void load_biased(const GeluArgs& args, Place at, float (&z)[N]) {
  load_at<N, T>(args.x, at, z);
  if (args.bias.data == nullptr) return;
  float bias[N];
  with_type<T>(args.bias.dtype, [&](auto type) {
    load_unit((const decltype(type)*)args.bias.data + at.column, at.left, bias);
  });
  FASTATTN_UNROLL
  for (int e = 0; e < N; ++e) z[e] += bias[e];
}

template <class T, Act kAct>
__global__ void __launch_bounds__(kThreads) gelu_fwd_kernel(const __grid_constant__ GeluArgs args) {
  constexpr int N = kUnit<T>;
  const Place at = place<N>(args.R, args.C);
  if (at.row >= args.R) return;
  float z[N];
  load_biased<T>(args, at, z);
  FASTATTN_UNROLL
  for (int e = 0; e < N; ++e) z[e] = curve<kAct>(z[e]).value;
  store_at<N, T>(args.y, at, z);
}

template <class T, Act kAct, int N>
FASTATTN_DEVICE void gelu_grad(const GeluArgs& args, Place at, float (&dx)[N]) {
  float z[N];
  load_biased<T>(args, at, z);
  load_at<N, T>(args.dy, at, dx);
  FASTATTN_UNROLL
  for (int e = 0; e < N; ++e) dx[e] *= curve<kAct>(z[e]).slope;
  store_at<N, T>(args.dx, at, dx);
}

template <class T, Act kAct>
__global__ void __launch_bounds__(kThreads) gelu_bwd_kernel(const __grid_constant__ GeluArgs args) {
  constexpr int N = kUnit<T>;
  const Place at = place<N>(args.R, args.C);
  if (at.row >= args.R) return;
  float dx[N];
  gelu_grad<T, kAct>(args, at, dx);
}

// A warp walks down the rows of a chunk in its piece of 32 units; partials is (chunks, C).
template <class T, Act kAct>
__global__ void __launch_bounds__(128) gelu_bwd_bias_kernel(
    const __grid_constant__ GeluArgs args, float* partials, int64_t chunk_rows, uint32_t pieces) {
  constexpr int N = kUnit<T>;
  const uint32_t warp = blockIdx.x * blockDim.y + threadIdx.y;
  const int64_t chunk = warp / pieces, column = ((int64_t)(warp % pieces) * 32 + threadIdx.x) * N;
  const int64_t end = smaller(args.R, (chunk + 1) * chunk_rows);
  const int left = (int)larger(0, smaller(args.C - column, N));
  if (chunk * chunk_rows >= end || left == 0) return;
  float sums[N] = {}, dx[N];
  for (int64_t row = chunk * chunk_rows; row < end; ++row) {
    gelu_grad<T, kAct>(args, {row, column, left}, dx);
    FASTATTN_UNROLL
    for (int e = 0; e < N; ++e) sums[e] += dx[e];
  }
  store_unit(partials + chunk * args.C + column, left, sums);
}

template <class T>
static void gelu_fwd_typed(GeluArgs args) {
  if (args.bias.data == nullptr) flatten(args, &args.x, &args.y);
  with_gelu(args.tanh, [&](auto act) {
    launch(
        "gelu_fwd", gelu_fwd_kernel<T, act.value>, elementwise_grid<kUnit<T>>(args.R, args.C),
        dim3(kThreads), 0, current_stream(), args);
  });
}

template <class T>
static void gelu_bwd_typed(GeluArgs args) {
  if (args.bias.data == nullptr) flatten(args, &args.x, &args.dy, &args.dx);
  with_gelu(args.tanh, [&](auto act) {
    if (args.dbias == nullptr)
      return launch(
          "gelu_bwd", gelu_bwd_kernel<T, act.value>, elementwise_grid<kUnit<T>>(args.R, args.C),
          dim3(kThreads), 0, current_stream(), args);
    const Chunks chunks(args.R);
    float* partials = scratch<float>(chunks.count * args.C);
    const int64_t pieces = cuts(args.C, 32 * kUnit<T>);
    launch(
        "gelu_bwd_bias", gelu_bwd_bias_kernel<T, act.value>,
        dim3((unsigned)cuts(pieces * chunks.count, 4)), dim3(32, 4), 0, current_stream(), args,
        partials, chunks.rows, (uint32_t)pieces);
    sum_chunks<float>(partials, chunks.count, args.C, args.dbias, args.C);
  });
}

void gelu_fwd(const GeluArgs& args) { FASTATTN_DISPATCH(args.dtype, gelu_fwd_typed, args); }

void gelu_bwd(const GeluArgs& args) { FASTATTN_DISPATCH(args.dtype, gelu_bwd_typed, args); }

// ---- gated -------------------------------------------------------------------------------------

template <class T, Act kAct>
__global__ void __launch_bounds__(kThreads) glu_fwd_kernel(const __grid_constant__ GluArgs args) {
  constexpr int N = kUnit<T>;
  const Place at = place<N>(args.R, args.C);
  if (at.row >= args.R) return;
  float gate[N], up[N];
  load_at<N, T>(args.gate, at, gate);
  load_at<N, T>(args.up, at, up);
  FASTATTN_UNROLL
  for (int e = 0; e < N; ++e) up[e] *= curve<kAct>(gate[e]).value;
  store_at<N, T>(args.y, at, up);
}

template <class T, Act kAct>
__global__ void __launch_bounds__(kThreads) glu_bwd_kernel(const __grid_constant__ GluArgs args) {
  constexpr int N = kUnit<T>;
  const Place at = place<N>(args.R, args.C);
  if (at.row >= args.R) return;
  float gate[N], up[N], dy[N];
  load_at<N, T>(args.gate, at, gate);
  load_at<N, T>(args.up, at, up);
  load_at<N, T>(args.dy, at, dy);
  FASTATTN_UNROLL
  for (int e = 0; e < N; ++e) {
    const Curve act = curve<kAct>(gate[e]);
    gate[e] = dy[e] * up[e] * act.slope;
    up[e] = dy[e] * act.value;
  }
  store_at<N, T>(args.dgate, at, gate);
  store_at<N, T>(args.dup, at, up);
}

template <class T>
static void glu_fwd_typed(GluArgs args) {
  flatten(args, &args.gate, &args.up, &args.y);
  with_act(args.gelu, args.tanh, [&](auto act) {
    launch(
        "glu_fwd", glu_fwd_kernel<T, act.value>, elementwise_grid<kUnit<T>>(args.R, args.C),
        dim3(kThreads), 0, current_stream(), args);
  });
}
template <class T>
static void glu_bwd_typed(GluArgs args) {
  flatten(args, &args.gate, &args.up, &args.dy, &args.dgate, &args.dup);
  with_act(args.gelu, args.tanh, [&](auto act) {
    launch(
        "glu_bwd", glu_bwd_kernel<T, act.value>, elementwise_grid<kUnit<T>>(args.R, args.C),
        dim3(kThreads), 0, current_stream(), args);
  });
}

void glu_fwd(const GluArgs& args) { FASTATTN_DISPATCH(args.dtype, glu_fwd_typed, args); }
void glu_bwd(const GluArgs& args) { FASTATTN_DISPATCH(args.dtype, glu_bwd_typed, args); }

}  // namespace fastattn::cuda
