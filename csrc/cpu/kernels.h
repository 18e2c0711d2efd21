// The CPU's tables of kernels, one for each instruction set.
#pragma once
#include "../common/kernels.h"
#include "../common/parallel.h"

#define FASTATTN_STRING_(x) #x
#define FASTATTN_STRING(x) FASTATTN_STRING_(x)

namespace fastattn {

struct IsaKernels {
  const char* isa;
  int lanes;
  float (*fma_loop)(int64_t steps);  // for benchmarks: the ceiling of one core
  double fma_loop_flops;             // of one step
  Kernels table;
};

namespace generic {
extern const IsaKernels kernels;
}
namespace generic16 {
extern const IsaKernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const IsaKernels kernels;
}
namespace avx512 {
extern const IsaKernels kernels;
}
namespace avx512_bf16 {
extern const IsaKernels kernels;
}
#endif

}  // namespace fastattn
