// Appends tokens to a cache, dense or in pages, and turns keys by the angles of their positions on
// the way: one pass over what is new.
#include "rotary.cuh"
#include "../common/cache.h"

namespace fastattn::cuda {

constexpr int kThreads = 256;

// Where position `at` of a sequence is kept.
template <class T>
FASTATTN_DEVICE T* slot_of(const CacheArgs& args, int64_t b, int64_t h, int64_t at) {
  int64_t batch = b, row = at;
  if (args.pages != nullptr) {
    const int64_t page = at / args.page_size;
    batch = load(args.pages + b * args.pages_batch + page);
    row = at - page * args.page_size;
  }
  return (T*)args.store + batch * args.store_batch + h * args.store_head + row * args.store_row;
}

// The units of every new token and head, one a thread; token (b, h, t) is row (b * H + h) * S + t.
template <class T>
__global__ void __launch_bounds__(kThreads)
    cache_append_kernel(const __grid_constant__ CacheArgs args) {
  const int half = (int)args.half, units = token_units<T>(half, (int)args.D, args.interleaved);
  const int64_t at = blockIdx.x * (int64_t)kThreads + threadIdx.x;
  const int64_t row = at / units, bh = row / args.S, t = row - bh * args.S;
  const int64_t b = bh / args.H, h = bh - b * args.H;
  if (b >= args.B || t >= load(args.counts + b)) return;
  const int64_t position = load(args.lengths + b) + t;
  const Token<T> token = {
      (const T*)args.x + b * args.x_batch + h * args.x_head + t * args.x_row,
      slot_of<T>(args, b, h, position),
      args.cos + position * half,
      args.sin + position * half,
      half,
      (int)args.D,
      1.f,
      args.interleaved};
  turn_unit(token, (int)(at - row * units));
}

template <class T>
static void cache_append_typed(const CacheArgs& args) {
  const int64_t units = token_units<T>((int)args.half, (int)args.D, args.interleaved);
  launch(
      "cache_append", cache_append_kernel<T>,
      dim3((unsigned)cuts(args.B * args.H * args.S * units, kThreads)), dim3(kThreads), 0,
      current_stream(), args);
}

void cache_append(const CacheArgs& args) {
  FASTATTN_DISPATCH(args.dtype, cache_append_typed, args);
}

}  // namespace fastattn::cuda
