// cross_entropy_fwd, cross_entropy_bwd, and cross_entropy_bwd_ that writes over the logits.

namespace fastattn::FASTATTN_BACKEND {

static CrossEntropyArgs cross_entropy_args(
    const Tensor& logits, const Tensor& target, int64_t ignore_index, double smoothing,
    double z_loss) {
  CrossEntropyArgs args{};
  args.dtype = dtype_of(logits);
  args.R = logits.size(0);
  args.V = logits.size(1);
  args.logits = read(logits);
  args.row = logits.stride(0);
  args.target = read<int64_t>(target);
  args.ignore_index = ignore_index;
  args.smoothing = static_cast<float>(smoothing);
  args.z_loss = static_cast<float>(z_loss);
  return args;
}

static void check_targets(const CrossEntropyArgs& args) {
  if (!kReadsData) return;
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
  const OnDevice on(logits);
  const Tensor target = torch::stable::contiguous(target_any);
  CrossEntropyArgs args = cross_entropy_args(logits, target, ignore_index, smoothing, z_loss);
  check_targets(args);
  Tensor loss = torch::stable::new_empty(logits, {args.R}, ScalarType::Float);
  Tensor lse = torch::stable::new_empty(logits, {args.R}, ScalarType::Float);
  args.loss = write<float>(loss);
  args.lse = write<float>(lse);
  kernels().cross_entropy_fwd(args);
  return {loss, lse};
}

// dlogits may be the logits themselves.
static void write_gradient(
    const Tensor& dloss, const Tensor& logits, const Tensor& target_any, const Tensor& lse,
    int64_t ignore_index, double smoothing, double z_loss, const Tensor& dlogits) {
  const OnDevice on(logits);
  const Tensor target = torch::stable::contiguous(target_any);
  CrossEntropyArgs args = cross_entropy_args(logits, target, ignore_index, smoothing, z_loss);
  args.lse = const_cast<float*>(read<float>(lse));
  args.dloss = read<float>(dloss);
  args.dloss_stride = dloss.stride(0);
  args.dlogits = write(dlogits);
  args.dlogits_row = dlogits.stride(0);
  kernels().cross_entropy_bwd(args);
}

Tensor cross_entropy_bwd(
    const Tensor& dloss, const Tensor& logits, const Tensor& target, const Tensor& lse,
    int64_t ignore_index, double smoothing, double z_loss) {
  Tensor dlogits = fresh(logits, logits.sizes());
  write_gradient(dloss, logits, target, lse, ignore_index, smoothing, z_loss, dlogits);
  return dlogits;
}

void cross_entropy_bwd_(
    const Tensor& dloss, const Tensor& logits, const Tensor& target, const Tensor& lse,
    int64_t ignore_index, double smoothing, double z_loss) {
  write_gradient(dloss, logits, target, lse, ignore_index, smoothing, z_loss, logits);
}

}  // namespace fastattn::FASTATTN_BACKEND
