// Words for code that both a CPU's compiler and nvcc read.
#pragma once

#if defined(__CUDACC__)
#define FASTATTN_HD __host__ __device__
#define FASTATTN_UNROLL _Pragma("unroll")
#elif defined(FASTATTN_HOST)
#define FASTATTN_HD
#define FASTATTN_UNROLL  // a user waits for this compiler, and not long for these kernels
#else
#define FASTATTN_HD
#define FASTATTN_UNROLL _Pragma("GCC unroll 16")
#endif
