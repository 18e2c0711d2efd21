// Every kernel for AVX512 with its bf16 products. The headers come first: their inline functions
// must stay baseline code.
#include "headers.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
// GCC 12's own avx512fintrin.h begins with vectors that it leaves undefined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#define FASTATTN_ISA avx512_bf16
#define FASTATTN_LANES 16
#define FASTATTN_AVX512  // GCC 12 defines no __AVX512F__ after its pragma
#define FASTATTN_AVX512_BF16
#define FASTATTN_PAIRS
#include "kernels-inl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
