// The operators of fastattn_cpu.
#include "tensors.h"
//
#include "../cpu/dispatch.h"

#define FASTATTN_BACKEND cpu_operators

namespace fastattn::cpu_operators {

using cpu::kernels;

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};
constexpr bool kReadsData = true;
static const Tensor& to_host(const Tensor& x) { return x; }

}  // namespace fastattn::cpu_operators

#include "matmul-inl.h"
#include "operators-inl.h"

STABLE_TORCH_LIBRARY_IMPL(fastattn_cpu, CPU, m) {
  using namespace fastattn::cpu_operators;
  implement(m);
  m.impl("matmul", TORCH_BOX(&matmul));
  m.impl("matmul_add_", TORCH_BOX(&matmul_add_));
}
