// Rotary embedding of x (B, H, S, D), and the gradients of its tables. The backward is the rotation
// by the opposite angle.
//   dcos = sum of da a + db b,  dsin = sum of db a - da b, over the heads and tokens of a row
#include "rotary.cuh"
#include "../common/rotary.h"

namespace fastattn::cuda {

constexpr int kThreads = 256;

// The units of every token and head, one a thread; token (b, h, s) is row (b * H + h) * S + s.
template <class T>
__global__ void __launch_bounds__(kThreads) rotary_kernel(const __grid_constant__ RotaryArgs args) {
  const int half = (int)args.half, units = token_units<T>(half, (int)args.D, args.interleaved);
  const int64_t at = blockIdx.x * (int64_t)kThreads + threadIdx.x;
  const bool small = at <= UINT32_MAX;  // then division is cheap
  const int64_t row = small ? (uint32_t)at / units : at / units;
  if (row >= args.B * args.H * args.S) return;
  const int64_t bh = small ? (uint32_t)row / (uint32_t)args.S : row / args.S;
  const int64_t b = (uint32_t)bh / (uint32_t)args.H, h = bh - b * args.H, s = row - bh * args.S;
  const int64_t position =
      args.positions == nullptr ? s : load(args.positions + b * args.positions_batch + s);
  const Token<T> token = {
      (const T*)args.x + b * args.x_batch + h * args.x_head + s * args.x_row,
      (T*)args.y + b * args.y_batch + h * args.y_head + s * args.y_row,
      args.cos + position * half,
      args.sin + position * half,
      half,
      (int)args.D,
      args.inverse ? -1.f : 1.f,
      args.interleaved};
  turn_unit(token, (int)(at - row * units));
}

template <class T>
static void rotary_typed(const RotaryArgs& args) {
  const int64_t units = token_units<T>((int)args.half, (int)args.D, args.interleaved);
  launch(
      "rotary", rotary_kernel<T>, dim3((unsigned)cuts(args.B * args.H * args.S * units, kThreads)),
      dim3(kThreads), 0, current_stream(), args);
}

void rotary(const RotaryArgs& args) { FASTATTN_DISPATCH(args.dtype, rotary_typed, args); }

// ---- gradients of the tables
// ---------------------------------------------------------------------

constexpr int kPairs = 128;  // a thread has one, of one row of the tables

// Sums in double, as a row may turn many tokens.
struct TableSums {
  double cos = 0, sin = 0;

  template <class T>
  FASTATTN_DEVICE void add(const RotaryArgs& turned, int64_t b, int64_t s, int d) {
    const int64_t first = turned.interleaved ? 2 * d : d;
    const int64_t second = turned.interleaved ? first + 1 : first + turned.half;
    const T* x = (const T*)turned.x + b * turned.x_batch + s * turned.x_row;
    const T* dy = (const T*)turned.y + b * turned.y_batch + s * turned.y_row;
    for (int64_t h = 0; h < turned.H; ++h, x += turned.x_head, dy += turned.y_head) {
      const double p = to_float(load(x + first)), q = to_float(load(x + second));
      const double dp = to_float(load(dy + first)), dq = to_float(load(dy + second));
      cos += dp * p + dq * q;
      sin += dq * p - dp * q;
    }
  }
};

// A block has 128 pairs of one row of the tables. It looks through the positions for the tokens
// that the row turned, a batch of 128 at a time, and adds them in order.
template <class T>
__global__ void __launch_bounds__(kPairs)
    rotary_tables_kernel(const __grid_constant__ RotaryTablesArgs args) {
  SHARED_MEMORY(memory);
  int* found = (int*)memory;
  const RotaryArgs& turned = args.turned;
  const int64_t pieces = cuts(turned.half, kPairs), row = blockIdx.x / pieces;
  const int64_t d = blockIdx.x % pieces * kPairs + threadIdx.x;
  TableSums sums;
  for (int64_t b = 0; b < turned.B; ++b) {
    if (turned.positions == nullptr) {
      if (d < turned.half && row < turned.S) sums.add<T>(turned, b, row, (int)d);
      continue;
    }
    const int64_t* positions = turned.positions + b * turned.positions_batch;
    for (int64_t start = 0; start < turned.S; start += kPairs) {
      const int64_t mine = start + threadIdx.x;
      const bool here = mine < turned.S && load(positions + mine) == row;
      store_shared(found + threadIdx.x, (int)here);
      __syncthreads();
      const int count = (int)smaller(kPairs, turned.S - start);
      if (d < turned.half)
        for (int i = 0; i < count; ++i)
          if (load_shared(found + i)) sums.add<T>(turned, b, start + i, (int)d);
      __syncthreads();
    }
  }
  if (d >= turned.half) return;
  store(args.dcos + row * turned.half + d, (float)sums.cos);
  store(args.dsin + row * turned.half + d, (float)(turned.inverse ? -sums.sin : sums.sin));
}

template <class T>
static void rotary_tables_typed(const RotaryTablesArgs& args) {
  launch(
      "rotary_tables", rotary_tables_kernel<T>,
      dim3((unsigned)(args.P * cuts(args.turned.half, kPairs))), dim3(kPairs), kPairs * sizeof(int),
      current_stream(), args);
}

void rotary_tables(const RotaryTablesArgs& args) {
  FASTATTN_DISPATCH(args.turned.dtype, rotary_tables_typed, args);
}

}  // namespace fastattn::cuda
