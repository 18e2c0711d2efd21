// Small kernels for test_cuda_host.py: each does something right, and wrong when told to. x and y
// are all the memory that they may touch.
#include "csrc/cuda/device.h"

#include <cstring>
#include <functional>
#include <map>
#include <string>

namespace fastattn {

Stream current_stream() { return nullptr; }

struct Chunk {
  alignas(16) float x[4];
};

// y = x reversed, through shared memory.
template <bool kBarrier>
__global__ void reverse(const float* x, float* y) {
  SHARED_MEMORY(memory);
  float* place = (float*)memory;
  store_shared(place + threadIdx.x, load(x + threadIdx.x));
  if (kBarrier) __syncthreads();
  store(y + threadIdx.x, load_shared(place + blockDim.x - 1 - threadIdx.x));
}

// The same twice over one place: the second write must wait for the first read.
template <bool kBarrier>
__global__ void reverse_twice(const float* x, float* y) {
  SHARED_MEMORY(memory);
  float* place = (float*)memory;
  for (int turn = 0; turn < 2; ++turn) {
    store_shared(place + threadIdx.x, load(x + threadIdx.x) + turn);
    __syncthreads();
    store(y + threadIdx.x, load_shared(place + blockDim.x - 1 - threadIdx.x));
    if (kBarrier) __syncthreads();
  }
}

// The same within each warp.
template <bool kSync>
__global__ void reverse_warps(const float* x, float* y) {
  SHARED_MEMORY(memory);
  float* place = (float*)memory + threadIdx.x / 32 * 32;
  store_shared(place + threadIdx.x % 32, load(x + threadIdx.x));
  if (kSync) sync_warp();
  store(y + threadIdx.x, load_shared(place + 31 - threadIdx.x % 32));
}

// 16 bytes a thread through copy_async; bytes: of which so many are read.
enum class Copy { right, no_wait, no_barrier, no_commit };
template <Copy kCopy>
__global__ void copy(const float* x, float* y, int bytes) {
  SHARED_MEMORY(memory);
  Chunk* place = (Chunk*)memory;
  const int other = blockDim.x - 1 - threadIdx.x;
  copy_async(place + threadIdx.x, x + 4 * threadIdx.x, bytes);
  if (kCopy != Copy::no_commit) commit_copies();
  if (kCopy != Copy::no_wait) wait_copies<0>();
  if (kCopy != Copy::no_barrier) __syncthreads();
  store((Chunk*)y + threadIdx.x, load_shared(place + other));
}

// Copies a float a thread, from and to so many floats further.
__global__ void shifted(const float* x, float* y, int from, int to) {
  store(y + threadIdx.x + to, load(x + threadIdx.x + from));
}
__global__ void shifted_chunk(const float* x, float* y, int from) {
  if (threadIdx.x == 0) store((Chunk*)y, load((const Chunk*)(x + from)));
}
__global__ void writes_input(const float* x, float*) { store((float*)x + threadIdx.x, 0.f); }

// Shared memory at an offset in bytes, written if asked to.
__global__ void shared_at(const float*, float* y, int offset, bool write) {
  SHARED_MEMORY(memory);
  if (write) store_shared((float*)(memory + offset), 1.f);
  store(y, load_shared((const float*)(memory + offset)));
}
__global__ void unchecked(const float*, float* y, int offset) {
  SHARED_MEMORY(memory);
  memory[offset] = 1;
  store(y, 1.f);
}

enum class Diverge { no, shuffles, words, barriers, lane_at_barrier, half };
template <Diverge kHow>
__global__ void sum_warp(const float* x, float* y) {
  float sum = load(x + threadIdx.x);
  const bool odd = threadIdx.x % 2 == 1;
  if (kHow == Diverge::shuffles) {
    if (odd)
      sum += shuffle_xor(sum, 1);
    else
      sum -= shuffle_xor(sum, 1);
  }
  if (kHow == Diverge::words) sum = odd ? shuffle(sum, 0) : (float)any(sum > 0);
  if (kHow == Diverge::barriers) {
    if (odd)
      __syncthreads();
    else
      __syncthreads();
  }
  if (kHow == Diverge::lane_at_barrier && threadIdx.x == 0) __syncthreads();
  if (kHow == Diverge::half && threadIdx.x % 32 >= 16) return;
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += shuffle_xor(sum, lanes);
  store(y + threadIdx.x, sum);
}

// One fragment product: lane l gives registers x[8 l ...]: a[4], b[2], and gets y[4 l ...].
template <class T>
__global__ void product(const float* x, float* y) {
  const uint32_t* in = (const uint32_t*)x + 8 * threadIdx.x;
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = load(in + i);
  float d[4] = {};
  if constexpr (std::is_same_v<T, float>)
    multiply_add_tf32(d, a, load(in + 4), load(in + 5));
  else
    multiply_add(d, a, load(in + 4), load(in + 5), T());
  for (int i = 0; i < 4; ++i) store(y + 4 * threadIdx.x + i, d[i]);
}

// Four matrices that lie one after another, row after row, chunks of 16 bytes at `stride`.
template <bool kTransposed>
__global__ void matrices(const float* x, float* y, int stride) {
  SHARED_MEMORY(memory);
  store_shared((Chunk*)(memory + threadIdx.x * stride), load((const Chunk*)x + threadIdx.x));
  sync_warp();
  uint32_t r[4];
  if (kTransposed)
    load_matrices_transposed(r, memory + threadIdx.x * stride);
  else
    load_matrices(r, memory + threadIdx.x * stride);
  for (int i = 0; i < 4; ++i) store((uint32_t*)y + 4 * threadIdx.x + i, r[i]);
}

// A warp transposes 8 rows of 8 chunks: written by rows, read by columns.
template <bool kSwizzled>
__global__ void transpose(const float* x, float* y) {
  SHARED_MEMORY(memory);
  const auto place = [&](int row, int column) {
    return (Chunk*)memory + row * 8 + (kSwizzled ? column ^ row : column);
  };
  for (int turn = 0; turn < 2; ++turn) {
    const int at = turn * 32 + threadIdx.x;
    store_shared(place(at / 8, at % 8), load((const Chunk*)x + at));
  }
  sync_warp();
  for (int turn = 0; turn < 2; ++turn) {
    const int at = turn * 32 + threadIdx.x;
    store((Chunk*)y + at, load_shared(place(at % 8, at / 8)));
  }
}

struct Shape {
  unsigned grid, block;
  int shared, p;
};
using Run = std::function<void(const float*, float*, const Shape&)>;
template <class... Parameters>
static Run run(
    const char* name, void (*kernel)(const float*, float*, Parameters...), auto... more) {
  return [=](const float* x, float* y, const Shape& s) {
    launch(name, kernel, dim3(s.grid), dim3(s.block), s.shared, current_stream(), x, y, more...);
  };
}
static Run run_p(const char* name, void (*kernel)(const float*, float*, int)) {
  return [=](const float* x, float* y, const Shape& s) {
    launch(name, kernel, dim3(s.grid), dim3(s.block), s.shared, current_stream(), x, y, s.p);
  };
}

static const std::map<std::string, Run> runs = {
    {"reverse", run("reverse", reverse<true>)},
    {"reverse, no barrier", run("reverse", reverse<false>)},
    {"reverse_twice", run("reverse_twice", reverse_twice<true>)},
    {"reverse_twice, no barrier", run("reverse_twice", reverse_twice<false>)},
    {"reverse_warps", run("reverse_warps", reverse_warps<true>)},
    {"reverse_warps, no sync", run("reverse_warps", reverse_warps<false>)},
    {"copy", run_p("copy", copy<Copy::right>)},
    {"copy, no wait", run_p("copy", copy<Copy::no_wait>)},
    {"copy, no barrier", run_p("copy", copy<Copy::no_barrier>)},
    {"copy, no commit", run_p("copy", copy<Copy::no_commit>)},
    {"reads 1 further", run("shifted", shifted, 1, 0)},
    {"writes 1 further", run("shifted", shifted, 0, 1)},
    {"reads 1 before", run("shifted", shifted, -1, 0)},
    {"chunk", run_p("shifted_chunk", shifted_chunk)},
    {"writes input", run("writes_input", writes_input)},
    {"reads shared", run("shared_at", shared_at, 0, false)},
    {"writes past shared", run("shared_at", shared_at, 256, true)},
    {"misaligned shared", run("shared_at", shared_at, 2, true)},
    {"unchecked", run_p("unchecked", unchecked)},
    {"sum_warp", run("sum_warp", sum_warp<Diverge::no>)},
    {"sum_warp, shuffles", run("sum_warp", sum_warp<Diverge::shuffles>)},
    {"sum_warp, words", run("sum_warp", sum_warp<Diverge::words>)},
    {"sum_warp, barriers", run("sum_warp", sum_warp<Diverge::barriers>)},
    {"sum_warp, lane at barrier", run("sum_warp", sum_warp<Diverge::lane_at_barrier>)},
    {"sum_warp, half", run("sum_warp", sum_warp<Diverge::half>)},
    {"product bf16", run("product", product<bf16>)},
    {"product fp16", run("product", product<fp16>)},
    {"product tf32", run("product", product<float>)},
    {"matrices", run_p("matrices", matrices<false>)},
    {"matrices transposed", run_p("matrices", matrices<true>)},
    {"transpose", run("transpose", transpose<true>)},
    {"transpose, no swizzle", run("transpose", transpose<false>)},
};

// "" or the error's sentence.
extern "C" __attribute__((visibility("default"))) const char* run_kernel(
    const char* name, const float* x, int64_t x_bytes, float* y, int64_t y_bytes, unsigned grid,
    unsigned block, int shared, int p) {
  static std::string said;
  said.clear();
  host::permit(x, x_bytes, false);
  host::permit(y, y_bytes, true);
  try {
    runs.at(name)(x, y, {grid, block, shared, p});
  } catch (const std::exception& error) {
    said = error.what();
  }
  host::forget_permits();
  return said.c_str();
}

}  // namespace fastattn
