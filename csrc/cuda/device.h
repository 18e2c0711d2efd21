// All that a kernel may ask of the machine. Under nvcc each word is an instruction of sm_80 and
// later; under a C++ compiler, with -DFASTATTN_HOST, csrc/host models it and checks every use.
//
// Global and shared memory are reached through these functions alone: the model checks bounds,
// alignment, races and bank conflicts there. T is plain data of 1, 2, 4, 8 or 16 bytes (shared
// memory: 2 or more), at an address that is a multiple of its size.
#pragma once
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../common/types.h"

#if defined(FASTATTN_HOST)
#include "../host/model.h"
#else
#include <cuda_runtime.h>

namespace fastattn {

using Stream = void*;  // a cudaStream_t

#define FASTATTN_DEVICE __device__ __forceinline__

// unsigned char* name: the block's dynamic shared memory.
#define SHARED_MEMORY(name)                                                \
  extern __shared__ __align__(128) unsigned char fastattn_shared_memory[]; \
  unsigned char* const name = fastattn_shared_memory

template <class T>
FASTATTN_DEVICE T load(const T* global) {
  return *global;
}
template <class T>
FASTATTN_DEVICE void store(T* global, T value) {
  if constexpr (sizeof(T) == 16) {
    // a struct of 16 bytes may become four stores
    uint32_t word[4];
    memcpy(word, &value, 16);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)),
                 "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
  } else {
    *global = value;
  }
}
template <class T>
FASTATTN_DEVICE T load_shared(const T* shared) {
  return *shared;
}
template <class T>
FASTATTN_DEVICE void store_shared(T* shared, T value) {
  *shared = value;
}

FASTATTN_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes to shared memory, both addresses multiples of 16. Only the first `bytes` are read, and
// zeros stand for the rest. What they are is known after wait_copies, to this thread; to others
// after a barrier.
FASTATTN_DEVICE void copy_async(void* shared, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
FASTATTN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the kPending latest groups of this thread are under way.
template <int kPending>
FASTATTN_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit entries: lane 8 m + i gives the address of row i of matrix m, and
// lane 4 i + c receives entries (i, 2 c) and (i, 2 c + 1) of each.
FASTATTN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of the transposed matrices.
FASTATTN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// D (16 x 8, fp32) += A (16 x 16) B (16 x 8). With g = lane / 4 and t = lane % 4, a register holds
// two neighbours of k: a[0] (g, 2t), a[1] (g + 8, 2t), a[2] (g, 2t + 8), a[3] (g + 8, 2t + 8);
// b0 (k = 2t, column g), b1 (k = 2t + 8, g); d[0], d[1] (g, 2t), (g, 2t + 1), d[2], d[3] 8 rows on.
FASTATTN_DEVICE void multiply_add(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FASTATTN_DEVICE void multiply_add(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, fp16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// D (16 x 8) += A (16 x 8) B (8 x 8) of fp32 entries, of which only the upper 19 bits are read:
// a[0] (g, t), a[1] (g + 8, t), a[2] (g, t + 4), a[3] (g + 8, t + 4); b0 (k = t, g), b1 (t + 4, g).
FASTATTN_DEVICE void multiply_add_tf32(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// x to the nearest tf32, ties away from zero.
FASTATTN_DEVICE uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Of the whole warp: every lane takes part, at the same place in the code.
template <class T>
FASTATTN_DEVICE T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, x, lanes);
}
template <class T>
FASTATTN_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
FASTATTN_DEVICE bool any(bool x) { return __any_sync(0xffffffffu, x); }
// What one lane wrote to shared memory before it, the others read after it.
FASTATTN_DEVICE void sync_warp() { __syncwarp(); }

// 2^x to 2 units in the last place; results below 2^-126 are 0.
FASTATTN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two entries in a register, the first in the lower half.
template <class T>
FASTATTN_DEVICE uint32_t pack(float low, float high);
template <>
FASTATTN_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
FASTATTN_DEVICE uint32_t pack<fp16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

inline void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess)
    throw std::runtime_error("fastattn: " + what + ": " + cudaGetErrorString(error));
}

// The most shared memory that a block may ask of the current device, in bytes.
inline int shared_memory_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "shared_memory_limit");
  check(
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
      "shared_memory_limit");
  return bytes;
}

inline std::string shape_of(dim3 grid, dim3 block, size_t shared_bytes) {
  const auto triple = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
           ")";
  };
  return "grid " + triple(grid) + ", block " + triple(block) + ", " + std::to_string(shared_bytes) +
         " bytes of shared memory";
}

// Starts kernel(args...) on the stream. An error names it and its shape. A grid without blocks is
// no launch at all.
template <class... Parameters, class... Arguments>
void launch(
    const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
    Stream stream, const Arguments&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const std::string what = std::string(name) + ", " + shape_of(grid, block, shared_bytes);
  if (shared_bytes > 48 * 1024)
    check(
        cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        what);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, args...), what);
}

}  // namespace fastattn
#endif

namespace fastattn {

// Both are for launchers, and defined in csrc/ops/cuda.cpp. The stream that the operator's caller
// works on.
Stream current_stream();

// Memory for `count` entries of T, of any content, that lasts as long as the operator's call.
void* scratch_bytes(int64_t bytes);
template <class T>
T* scratch(int64_t count) {
  return static_cast<T*>(scratch_bytes(count * static_cast<int64_t>(sizeof(T))));
}

constexpr float kInf = __builtin_huge_valf();

// Pieces of a size that hold them all.
FASTATTN_HD constexpr int64_t cuts(int64_t all, int64_t size) { return (all + size - 1) / size; }

template <class T>
FASTATTN_DEVICE T from_float(float x) {
  T y;
  from_float(x, &y);
  return y;
}

}  // namespace fastattn
