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

#include "linear-inl.h"
#include "matmul-inl.h"
#include "operators-inl.h"

namespace fastattn::cpu_operators {

// out of a call with few arguments: what they are converted by costs 10 us with all 21.
Tensor attention_plain(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& key_lengths,
    double scale, bool causal, bool diagonal_at_length) {
  const OptionalTensor none;
  return std::get<0>(attention_fwd(
      query, key, value, none, none, none, none, none, none, key_lengths, none, none, scale, causal,
      std::nullopt, std::nullopt, 0, 0, diagonal_at_length, 0, 0));
}

// y of a call with few arguments.
Tensor norm_plain(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, bool rms, double eps) {
  return std::get<0>(norm_fwd(x, residual, weight, bias, std::nullopt, rms, eps, 0.0, 0.0, false));
}

}  // namespace fastattn::cpu_operators

STABLE_TORCH_LIBRARY_IMPL(fastattn_cpu, CPU, m) {
  using namespace fastattn::cpu_operators;
  implement(m);
  m.impl("attention_plain", TORCH_BOX(&attention_plain));
  m.impl("linear_fwd", TORCH_BOX(&linear_fwd));
  m.impl("linear_plain", TORCH_BOX(&linear_fwd));
  m.impl("norm_plain", TORCH_BOX(&norm_plain));
  m.impl("matmul", TORCH_BOX(&matmul));
  m.impl("matmul_add_", TORCH_BOX(&matmul_add_));
}
