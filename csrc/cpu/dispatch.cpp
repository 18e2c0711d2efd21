// Which instruction set serves this process: the widest one that the processor has, unless
// FASTATTN_ISA or use_isa() names another.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace fastattn {

#if defined(__x86_64__)
static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
static bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
static bool always() { return true; }

// In the order of preference. generic16 is never chosen by itself: it is AVX-512's 16 lanes and
// pairs of bf16 in baseline instructions, so that their logic is testable on any machine.
static const Isa isas[] = {
#if defined(__x86_64__)
    {&avx512_bf16::kernels, has_avx512_bf16},
    {&avx512::kernels, has_avx512},
    {&avx2::kernels, has_avx2},
#endif
    {&generic::kernels, always},
    {&generic16::kernels, always},
};

static std::atomic<const IsaKernels*> chosen{nullptr};

const Isa* find_isa(const char* name) {
  for (const Isa& isa : isas)
    if (std::strcmp(isa.kernels->isa, name) == 0) return &isa;
  return nullptr;
}

const Isa* begin_isas() { return isas; }
const Isa* end_isas() { return isas + sizeof isas / sizeof isas[0]; }

bool use_isa(const char* name) {
  const Isa* isa = find_isa(name);
  if (isa == nullptr || !isa->runs_here()) return false;
  chosen = isa->kernels;
  return true;
}

bool choose_isa() {
  const char* wanted = std::getenv("FASTATTN_ISA");
  if (wanted != nullptr && *wanted != 0) return use_isa(wanted);
  for (const Isa& isa : isas)
    if (isa.runs_here()) {
      chosen = isa.kernels;
      return true;
    }
  return false;
}

const IsaKernels& isa() { return *chosen.load(std::memory_order_relaxed); }
const Kernels& cpu::kernels() { return isa().table; }

}  // namespace fastattn
