#include "tensors.h"

namespace fastattn {

static CrossEntropyArgs cross_entropy_args(
    const Tensor& logits, const Tensor& target, int64_t ignore_index, double smoothing,
    double z_loss) {
  CrossEntropyArgs args{};
  args.dtype = dtype_of(logits);
  args.R = logits.size(0);
  args.V = logits.size(1);
  args.logits = logits.const_data_ptr();
  args.row = logits.stride(0);
  args.target = target.const_data_ptr<int64_t>();
  args.ignore_index = ignore_index;
  args.smoothing = static_cast<float>(smoothing);
  args.z_loss = static_cast<float>(z_loss);
  return args;
}

static void check_targets(const CrossEntropyArgs& args) {
  for (int64_t row = 0; row < args.R; ++row) {
    const int64_t target = args.target[row];
    STD_TORCH_CHECK(
        target == args.ignore_index || (target >= 0 && target < args.V), "\ncross_entropy: target ",
        target, " at row ", row, " is outside [0, ", args.V, ") and is not ignore_index ",
        args.ignore_index, "\n");
  }
}

std::tuple<Tensor, Tensor> cross_entropy_fwd(
    const Tensor& logits, const Tensor& target_any, int64_t ignore_index, double smoothing,
    double z_loss) {
  const Tensor target = torch::stable::contiguous(target_any);
  CrossEntropyArgs args = cross_entropy_args(logits, target, ignore_index, smoothing, z_loss);
  check_targets(args);
  Tensor loss = torch::stable::new_empty(logits, {args.R}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(logits, {args.R}, ScalarType::Float);
  args.loss = static_cast<float*>(loss.mutable_data_ptr());
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  kernels().cross_entropy_fwd(args);
  return {loss, lse};
}

// dlogits may be the logits themselves.
static void write_gradient(
    const Tensor& dloss, const Tensor& logits, const Tensor& target_any, const Tensor& lse,
    int64_t ignore_index, double smoothing, double z_loss, const Tensor& dlogits) {
  const Tensor target = torch::stable::contiguous(target_any);
  CrossEntropyArgs args = cross_entropy_args(logits, target, ignore_index, smoothing, z_loss);
  args.lse = const_cast<float*>(lse.const_data_ptr<float>());
  args.dloss = dloss.const_data_ptr<float>();
  args.dloss_stride = dloss.stride(0);
  args.dlogits = dlogits.mutable_data_ptr();
  args.dlogits_row = dlogits.stride(0);
  kernels().cross_entropy_bwd(args);
}

Tensor cross_entropy_bwd(
    const Tensor& dloss, const Tensor& logits, const Tensor& target, const Tensor& lse,
    int64_t ignore_index, double smoothing, double z_loss) {
  Tensor dlogits = torch::stable::new_empty(logits, logits.sizes());
  write_gradient(dloss, logits, target, lse, ignore_index, smoothing, z_loss, dlogits);
  return dlogits;
}

void cross_entropy_bwd_(
    const Tensor& dloss, const Tensor& logits, const Tensor& target, const Tensor& lse,
    int64_t ignore_index, double smoothing, double z_loss) {
  write_gradient(dloss, logits, target, lse, ignore_index, smoothing, z_loss, logits);
}

}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn_cpu, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&fastattn::cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&fastattn::cross_entropy_bwd));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&fastattn::cross_entropy_bwd_));
}
