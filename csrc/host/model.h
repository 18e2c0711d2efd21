// csrc/cuda on a CPU: csrc/cuda/device.h's words as ordinary functions that check what they do.
//
// A launch runs its blocks one after another. A thread is a fiber that runs until it waits: at a
// barrier, or at an operation of its warp, which the last lane to arrive performs for all 32. The
// order in which threads run is the schedule's (Options). Every error is a std::runtime_error that
// names the kernel, the block, the thread and the line.
//
// Checked: bounds of global memory against the memory that the call was given (permit), and what
// may be written of it; bounds and alignment of shared memory, reads of what was never written or
// is still being copied, races between threads that no barrier or sync_warp orders (whatever the
// schedule); copies under way when a thread ends; lanes of a warp, or threads at a barrier, at
// different places of the code; deadlock; limits of a launch. Counted: bank conflicts, a line of
// the source at a time.
//
// Not modelled: time; registers; the memory consistency of global memory between blocks, which run
// in order here; races on global memory; warps of which only some lanes take part in an operation;
// PTX and machine code, which nvcc makes; the payload of a NaN. exp2_fast is the C library's. A
// tensor core's sum is exact here and rounded toward zero once; hardware truncates each term too.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/types.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define FASTATTN_DEVICE inline __attribute__((always_inline))

namespace fastattn::host {

// Where in the source a thread is.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};
#define FASTATTN_SITE ::fastattn::host::Site site = {__builtin_FILE(), __builtin_LINE()}

struct Position {  // of the thread that runs
  dim3 thread, block, threads, blocks;
};
const Position& position();

// Memory of the call that runs: a kernel may read [data, data + bytes), and write it if `writable`.
void permit(const void* data, int64_t bytes, bool writable);
void forget_permits();

// What a kernel does, checked. They throw.
void read_global(const void* p, int bytes, Site site);
void write_global(const void* p, int bytes, Site site);
void read_shared(const void* p, int bytes, Site site);
void write_shared(const void* p, const void* value, int bytes, Site site);
void copy_async(void* shared, const void* global, int bytes, Site site);
void commit_copies();
void wait_copies(int pending);
void barrier(Site site);
unsigned char* shared_memory();
int shared_memory_limit();

// An operation of the whole warp: `all` gets every lane's slot once all have arrived.
enum class Together {
  shuffle,
  shuffle_xor,
  vote,
  sync,
  load_matrices,
  load_matrices_transposed,
  multiply_add_bf16,
  multiply_add_fp16,
  multiply_add_tf32
};  // clang-format off
void together(Together what, void* slot, void (*all)(void* const* slots, Site site), Site site);
void load_matrices(uint32_t* r, const void* row, bool transposed, Site site);
void multiply_add(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Together what, Site site);
// clang-format on

using Body = void (*)(const void* call);
void run(
    const char* kernel, dim3 blocks, dim3 threads, size_t shared_bytes, Body body,
    const void* call);

template <class T>
struct Plain {
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(
      sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
};

template <class T>
struct Exchange {
  T value, result;
  int lane;
};

}  // namespace fastattn::host

#define threadIdx (::fastattn::host::position().thread)
#define blockIdx (::fastattn::host::position().block)
#define blockDim (::fastattn::host::position().threads)
#define gridDim (::fastattn::host::position().blocks)
#define __syncthreads() ::fastattn::host::barrier(::fastattn::host::Site::here())
#define SHARED_MEMORY(name) unsigned char* const name = ::fastattn::host::shared_memory()

namespace fastattn {

using Stream = void*;

template <class T>
T load(const T* global, FASTATTN_SITE) {
  host::Plain<T>();
  host::read_global(global, sizeof(T), site);
  return *global;
}
template <class T>
void store(T* global, T value, FASTATTN_SITE) {
  host::Plain<T>();
  host::write_global(global, sizeof(T), site);
  *global = value;
}
template <class T>
T load_shared(const T* shared, FASTATTN_SITE) {
  host::Plain<T>();
  static_assert(sizeof(T) > 1, "the model keeps track of shared memory in steps of two bytes");
  host::read_shared(shared, sizeof(T), site);
  return *shared;
}
template <class T>
void store_shared(T* shared, T value, FASTATTN_SITE) {
  host::Plain<T>();
  static_assert(sizeof(T) > 1, "the model keeps track of shared memory in steps of two bytes");
  host::write_shared(shared, &value, sizeof(T), site);
  *shared = value;
}

inline void copy_async(void* shared, const void* global, int bytes = 16, FASTATTN_SITE) {
  host::copy_async(shared, global, bytes, site);
}
inline void commit_copies() { host::commit_copies(); }
template <int kPending>
void wait_copies() {
  host::wait_copies(kPending);
}

inline void load_matrices(uint32_t (&r)[4], const void* row, FASTATTN_SITE) {
  host::load_matrices(r, row, false, site);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, FASTATTN_SITE) {
  host::load_matrices(r, row, true, site);
}
inline void multiply_add(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16, FASTATTN_SITE) {
  host::multiply_add(d, a, b0, b1, host::Together::multiply_add_bf16, site);
}
inline void multiply_add(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, fp16, FASTATTN_SITE) {
  host::multiply_add(d, a, b0, b1, host::Together::multiply_add_fp16, site);
}
inline void multiply_add_tf32(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, FASTATTN_SITE) {
  host::multiply_add(d, a, b0, b1, host::Together::multiply_add_tf32, site);
}
inline uint32_t to_tf32(float x) {
  const uint32_t bits = float_to_bits(x);
  return x - x == 0 ? (bits + 0x1000) & 0xffffe000 : bits;  // infinities and NaN stay
}

template <class T>
T shuffle_xor(T x, int lanes, FASTATTN_SITE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Lane = host::Exchange<T>;
  Lane mine = {x, x, lanes};
  const auto all = [](void* const* slots, host::Site) {
    for (int lane = 0; lane < 32; ++lane) {
      Lane* to = static_cast<Lane*>(slots[lane]);
      to->result = static_cast<Lane*>(slots[(lane ^ to->lane) & 31])->value;
    }
  };
  host::together(host::Together::shuffle_xor, &mine, all, site);
  return mine.result;
}
template <class T>
T shuffle(T x, int lane, FASTATTN_SITE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Lane = host::Exchange<T>;
  Lane mine = {x, x, lane};
  const auto all = [](void* const* slots, host::Site) {
    for (int to = 0; to < 32; ++to) {
      Lane* lane = static_cast<Lane*>(slots[to]);
      lane->result = static_cast<Lane*>(slots[lane->lane & 31])->value;
    }
  };
  host::together(host::Together::shuffle, &mine, all, site);
  return mine.result;
}
inline bool any(bool x, FASTATTN_SITE) {
  const auto all = [](void* const* slots, host::Site) {
    bool some = false;
    for (int lane = 0; lane < 32; ++lane) some |= *static_cast<bool*>(slots[lane]);
    for (int lane = 0; lane < 32; ++lane) *static_cast<bool*>(slots[lane]) = some;
  };
  host::together(host::Together::vote, &x, all, site);
  return x;
}
inline void sync_warp(FASTATTN_SITE) {
  host::together(host::Together::sync, nullptr, [](void* const*, host::Site) {}, site);
}

inline float exp2_fast(float x) {
  const float y = __builtin_exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
}

template <class T>
uint32_t pack(float low, float high) {
  T a, b;
  from_float(low, &a);
  from_float(high, &b);
  return static_cast<uint32_t>(a.bits) | static_cast<uint32_t>(b.bits) << 16;
}

inline int shared_memory_limit() { return host::shared_memory_limit(); }

template <class... Parameters, class... Arguments>
void launch(
    const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
    Stream, const Arguments&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto call = [&] { kernel(args...); };
  using Call = decltype(call);
  host::run(
      name, grid, block, shared_bytes, [](const void* c) { (*static_cast<Call*>(c))(); }, &call);
}

}  // namespace fastattn
