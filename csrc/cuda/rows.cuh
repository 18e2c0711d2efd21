// What row operators share: which columns of a row a thread holds, 16-byte access to them, sums in
// a fixed order along a row and over rows. Every cut is decided by R and C alone, so a row's bits
// depend neither on the rows beside it, nor on where it lies, nor on the grid.
#pragma once
#include "device.h"
#include "../common/args.h"
#include "../common/philox.h"

#if defined(__CUDACC__)
#define FASTATTN_ROLLED _Pragma("unroll 1")  // a loop whose body is too long to be repeated
#else
#define FASTATTN_ROLLED
#endif

namespace fastattn::cuda {

FASTATTN_HD constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTATTN_HD constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A block has blockDim.y rows, of blockDim.x threads each.
FASTATTN_DEVICE int64_t row_of_thread() { return blockIdx.x * (int64_t)blockDim.y + threadIdx.y; }

// A product that is rounded, whatever is added to it: nvcc makes one rounding of a * b + c.
FASTATTN_DEVICE float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

// body(0.f) for what lies in fp32 beside rows of T, body(T()) for what lies in T.
template <class T, class Body>
FASTATTN_DEVICE void with_type(Dtype dtype, Body body) {
  if constexpr (sizeof(T) < 4) {
    if (dtype != Dtype::f32) return body(T());
  }
  body(0.f);
}

template <class T>
FASTATTN_DEVICE T* row_of(const RowMap& map, int64_t row) {
  return (T*)map.data + map.offset(row);
}

// ---- 16 bytes at a time ----------------------------------------------------------------------

template <class T>
constexpr int kUnit = 16 / sizeof(T);  // entries of a row that a thread takes at once

template <int kWords>
struct alignas(4 * kWords) Words {
  uint32_t word[kWords];
};

FASTATTN_DEVICE void unpack(uint32_t word, float* out, float) { out[0] = bits_to_float(word); }
template <class T>
FASTATTN_DEVICE void unpack(uint32_t word, float* out, T) {
  out[0] = to_float(T{(uint16_t)word});
  out[1] = to_float(T{(uint16_t)(word >> 16)});
}
FASTATTN_DEVICE uint32_t bits_of(float x) { return float_to_bits(x); }
template <class T>
FASTATTN_DEVICE uint32_t bits_of(T x) {
  return x.bits;
}
FASTATTN_DEVICE float entry_of(uint32_t word, float) { return bits_to_float(word); }
template <class T>
FASTATTN_DEVICE T entry_of(uint32_t word, T) {
  return T{(uint16_t)word};
}
FASTATTN_DEVICE uint32_t packed(const float* x, float) { return float_to_bits(x[0]); }
template <class T>
FASTATTN_DEVICE uint32_t packed(const float* x, T) {
  return pack<T>(x[0], x[1]);
}

// N neighbours as they lie in memory, in as few accesses as there can be: N = 8 fp32 are two. Where
// `wide` is false each entry has an access of its own, and only the first `left` are touched.
template <int N, class T>
struct Unit {
  static constexpr int kBytes = N * sizeof(T), kAccess = kBytes < 16 ? kBytes : 16;
  static constexpr int kAccessWords = kAccess / 4, kEntries = 4 / sizeof(T);  // of a word
  using Access = Words<kAccessWords>;
  Access access[kBytes / kAccess];

  // The first n units of a row can be accessed as a whole.
  FASTATTN_DEVICE static bool wide(const T* row, int64_t columns) {
    return columns % N == 0 && (uintptr_t)row % kAccess == 0;
  }
  FASTATTN_DEVICE uint32_t& word(int i) { return access[i / kAccessWords].word[i % kAccessWords]; }

  FASTATTN_DEVICE void read(const T* p, bool wide, int left) {
    if (wide) {
      FASTATTN_UNROLL
      for (int i = 0; i < kBytes / kAccess; ++i)
        access[i] = left > 0 ? load((const Access*)p + i) : Access{};
    } else {
      FASTATTN_UNROLL
      for (int i = 0; i < kBytes / 4; ++i) {
        word(i) = i * kEntries < left ? bits_of(load(p + i * kEntries)) : 0;
        if (kEntries == 2 && i * 2 + 1 < left) word(i) |= bits_of(load(p + i * 2 + 1)) << 16;
      }
    }
  }
  FASTATTN_DEVICE void write(T* p, bool wide, int left) {
    if (wide) {
      FASTATTN_UNROLL
      for (int i = 0; i < kBytes / kAccess; ++i)
        if (left > 0) store((Access*)p + i, access[i]);
    } else {
      FASTATTN_UNROLL
      for (int e = 0; e < N; ++e)
        if (e < left) store(p + e, entry_of(word(e / kEntries) >> e % kEntries * 16, T()));
    }
  }
  FASTATTN_DEVICE void get(float (&out)[N]) {
    FASTATTN_UNROLL
    for (int i = 0; i < kBytes / 4; ++i) unpack(word(i), out + i * kEntries, T());
  }
  FASTATTN_DEVICE void set(const float (&x)[N]) {
    FASTATTN_UNROLL
    for (int i = 0; i < kBytes / 4; ++i) word(i) = packed(x + i * kEntries, T());
  }
};

// N neighbours of which the first `left` are there; the others are 0.
template <int N, class T>
FASTATTN_DEVICE void load_unit(const T* p, int left, float (&out)[N]) {
  Unit<N, T> unit;
  unit.read(p, left >= N && Unit<N, T>::wide(p, N), left);
  unit.get(out);
}
template <int N, class T>
FASTATTN_DEVICE void store_unit(T* p, int left, const float (&x)[N]) {
  Unit<N, T> unit;
  unit.set(x);
  unit.write(p, left >= N && Unit<N, T>::wide(p, N), left);
}

// ---- a row among threads ---------------------------------------------------------------------

// Threads (x) that share a row, `columns` for each while there are at most 512, and rows (y) of a
// block: several where a warp holds a whole row.
constexpr int kMostThreads = 512, kRowsOfWarps = 4;
inline dim3 row_block(int64_t C, int64_t columns) {
  const int64_t warps = larger(1, smaller(kMostThreads / 32, cuts(C, 32 * columns)));
  return warps == 1 ? dim3(32, kRowsOfWarps) : dim3((unsigned)(32 * warps));
}

// The columns of one thread, from some column of a row on: entry e of step s is s * stride + first
// + e columns further, and is there if that is less than `left`.
template <int N>
struct Share {
  int first, stride, left;

  FASTATTN_DEVICE explicit Share(int64_t columns)
      : first(threadIdx.x * N), stride(blockDim.x * N), left((int)smaller(columns, 1 << 30)) {}
  FASTATTN_DEVICE int column(int s) const { return s * stride + first; }
  FASTATTN_DEVICE int left_at(int s) const { return left - column(s); }
  FASTATTN_DEVICE bool holds(int s, int e) const { return e < left_at(s); }
};

// step(s, e) for every entry that a thread may hold.
template <int S, int N, class Step>
FASTATTN_DEVICE void for_entries(Step step) {
  FASTATTN_UNROLL
  for (int s = 0; s < S; ++s) {
    FASTATTN_UNROLL
    for (int e = 0; e < N; ++e) step(s, e);
  }
}

// All loads come before the first use, so that they are under way together.
template <int S, int N, class T>
FASTATTN_DEVICE void load_units(const T* row, const Share<N>& share, float (&out)[S][N]) {
  Unit<N, T> units[S];
  if (Unit<N, T>::wide(row, share.left)) {
    FASTATTN_UNROLL
    for (int s = 0; s < S; ++s) units[s].read(row + share.column(s), true, share.left_at(s));
  } else {
    FASTATTN_UNROLL
    for (int s = 0; s < S; ++s) units[s].read(row + share.column(s), false, share.left_at(s));
  }
  FASTATTN_UNROLL
  for (int s = 0; s < S; ++s) units[s].get(out[s]);
}

// A thread's columns from `row` on as fp32, 0 where there is none.
template <int S, int N, class T>
FASTATTN_DEVICE void load_row(const T* row, const Share<N>& share, float (&out)[S][N]) {
  if constexpr (N == 1)
    return for_entries<S, N>([&](int s, int e) {
      out[s][e] = share.holds(s, e) ? to_float(load(row + share.column(s))) : 0.f;
    });
  else
    return load_units(row, share, out);
}
template <int S, int N, class T>
FASTATTN_DEVICE void store_row(T* row, const Share<N>& share, const float (&x)[S][N]) {
  if constexpr (N == 1) {
    for_entries<S, N>([&](int s, int e) {
      if (share.holds(s, e)) store(row + share.column(s), from_float<T>(x[s][e]));
    });
  } else {
    const bool wide = Unit<N, T>::wide(row, share.left);
    FASTATTN_UNROLL
    for (int s = 0; s < S; ++s) {
      Unit<N, T> unit;
      unit.set(x[s]);
      unit.write(row + share.column(s), wide, share.left_at(s));
    }
  }
}

// apply(x[s][e], y) for a thread's entries y of memory that holds fp32 or T, `offset` entries on:
// 16 columns at a time, for the registers' sake.
template <class T, int S, int N, class Apply>
FASTATTN_DEVICE void combine_row(
    Dtype dtype, const void* data, int64_t offset, const Share<N>& share, float (&x)[S][N],
    Apply apply) {
  constexpr int kGroup = S * N > 16 ? 16 / N : S;
  with_type<T>(dtype, [&](auto type) {
    FASTATTN_UNROLL
    for (int first = 0; first < S; first += kGroup) {
      const int64_t at = offset + first * share.stride;
      float y[kGroup][N];
      load_row((const decltype(type)*)data + at, Share<N>(share.left - first * share.stride), y);
      for_entries<kGroup, N>([&](int s, int e) { apply(x[first + s][e], y[s][e]); });
    }
  });
}
// Stores to memory that holds fp32 or T, `offset` entries on.
template <class T, int S, int N>
FASTATTN_DEVICE void store_row(
    Dtype dtype, const void* data, int64_t offset, const Share<N>& share, const float (&x)[S][N]) {
  with_type<T>(
      dtype, [&](auto type) { store_row<S, N>((decltype(type)*)data + offset, share, x); });
}

// ---- along a row -----------------------------------------------------------------------------

struct Sum {
  FASTATTN_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Most {
  FASTATTN_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }  // NaN is none
};

// Joins K numbers of each thread of a row; all threads get the result, the same bits: a butterfly
// in each warp, then the warps in order. Two places take turns, so that one barrier a call is
// enough: who writes the first again has passed the barrier of the second.
class RowJoin {
 public:
  static constexpr int kBytes = 2 * 2 * 32 * sizeof(float);
  FASTATTN_DEVICE explicit RowJoin(unsigned char* memory) : place_((float*)memory), turn_(0) {}

  template <int K, class Join>
  FASTATTN_DEVICE void operator()(float (&x)[K], Join join) {
    static_assert(K <= 2);
    FASTATTN_UNROLL
    for (int k = 0; k < K; ++k)
      for (int lanes = 16; lanes > 0; lanes /= 2) x[k] = join(x[k], shuffle_xor(x[k], lanes));
    const int warps = blockDim.x / 32;
    if (warps == 1) return;
    float* place = place_ + turn_;
    turn_ ^= 64;
    if (threadIdx.x % 32 == 0)
      for (int k = 0; k < K; ++k) store_shared(place + 32 * k + threadIdx.x / 32, x[k]);
    __syncthreads();
    FASTATTN_UNROLL
    for (int k = 0; k < K; ++k) {
      x[k] = load_shared(place + 32 * k);
      for (int warp = 1; warp < warps; ++warp)
        x[k] = join(x[k], load_shared(place + 32 * k + warp));
    }
  }

 private:
  float* place_;
  int turn_;
};

// ---- sums over rows --------------------------------------------------------------------------

// Rows in chunks whose sums are taken one row after another, and then added up in order. At most
// 64 rows, so that short chains of additions keep the rounding error that of a tree; fewer where
// that would leave multiprocessors idle.
struct Chunks {
  int64_t rows, count;
  explicit Chunks(int64_t R) : rows(larger(4, smaller(64, cuts(R, 512)))), count(cuts(R, rows)) {}
};

constexpr int kSlices = 16;
// out[c] = the sum over p of partials[p * step + c]: slice y takes p = y, y + kSlices and so on.
template <class Out>
__global__ void __launch_bounds__(32 * kSlices)
    sum_chunks_kernel(const float* partials, int64_t count, int64_t step, int64_t C, Out* out) {
  SHARED_MEMORY(memory);
  float* sums = (float*)memory;
  const int64_t c = blockIdx.x * (int64_t)32 + threadIdx.x;
  float sum = 0;
  if (c < C) {
    FASTATTN_UNROLL
    for (int64_t p = threadIdx.y; p < count; p += kSlices) sum += load(partials + p * step + c);
  }
  store_shared(sums + threadIdx.y * 32 + threadIdx.x, sum);
  __syncthreads();
  if (threadIdx.y > 0 || c >= C) return;
  for (int y = 1; y < kSlices; ++y) sum += load_shared(sums + y * 32 + threadIdx.x);
  store(out + c, from_float<Out>(sum));
}
template <class Out>
void sum_chunks(const float* partials, int64_t count, int64_t step, void* out, int64_t C) {
  launch(
      "sum_chunks", sum_chunks_kernel<Out>, dim3((unsigned)cuts(C, 32)), dim3(32, kSlices),
      32 * kSlices * sizeof(float), current_stream(), partials, count, step, C, (Out*)out);
}

}  // namespace fastattn::cuda
