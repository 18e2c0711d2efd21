// Every kernel for AVX2. The headers come first: their inline functions must stay baseline code.
#include "headers.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FASTATTN_ISA avx2
#define FASTATTN_LANES 8
#define FASTATTN_AVX2  // GCC 12 defines no __AVX2__ after its pragma
#include "kernels-inl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
