// Which instruction set serves this process: the widest one the processor has, or FASTATTN_ISA.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fastattn {

static const Kernels* candidates[] = {
#if defined(__x86_64__)
    &avx512::kernels,
    &avx2::kernels,
#endif
    &generic::kernels,
};

static bool runs_here(const Kernels& set) {
#if defined(__x86_64__)
  if (&set == &avx2::kernels)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (&set == &avx512::kernels)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return true;
}

static const Kernels& choose() {
  const char* wanted = std::getenv("FASTATTN_ISA");
  if (wanted != nullptr)
    for (const Kernels* set : candidates)
      if (std::strcmp(set->isa, wanted) == 0 && runs_here(*set)) return *set;
  for (const Kernels* set : candidates)
    if (runs_here(*set)) return *set;
  return generic::kernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fastattn
