// linear_fwd, and linear_plain: the same for calls that no gradient follows.

namespace fastattn::FASTATTN_BACKEND {

static bool is_float(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
         dtype == ScalarType::Double;
}

// linear_plain is called with what nobody has checked; a caller then asks checks.py what is wrong.
static void check_linear(
    const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
    int64_t group_size) {
  STD_TORCH_CHECK(
      x.dim() > 1 && weight.dim() == 2 && x.size(-1) == weight.size(1),
      "linear: x must be (..., K) and weight (N, K)");
  const int64_t N = weight.size(0), K = weight.size(1);
  STD_TORCH_CHECK(
      weight.scalar_type() == (scale ? ScalarType::Char : ScalarType::BFloat16) &&
          group_size >= 0 && group_size % 32 == 0 && (scale || group_size == 0),
      "linear: weight must be int8 with a scale, or bfloat16 without");
  const int64_t groups = group_size ? (K + group_size - 1) / group_size : 1;
  STD_TORCH_CHECK(
      !scale || (scale->dim() == (group_size ? 2 : 1) && scale->size(0) == N &&
                 scale->numel() == N * groups),
      "linear: scale must be (N,) or (N, groups)");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == N), "linear: bias must be (N,)");
  for (const OptionalTensor& each : {scale, bias})
    STD_TORCH_CHECK(!each || is_float(*each), "linear: scale and bias must be floats");
}

Tensor linear_fwd(
    const Tensor& x_any, const Tensor& weight_any, const OptionalTensor& scale_any,
    const OptionalTensor& bias_any, int64_t group_size) {
  check_linear(x_any, weight_any, scale_any, bias_any, group_size);
  const Tensor x = with_contiguous_rows(x_any), weight = torch::stable::contiguous(weight_any);
  const OptionalTensor scale = scale_any ? OptionalTensor(fp32(*scale_any)) : OptionalTensor();
  const OptionalTensor bias = bias_any ? OptionalTensor(fp32(*bias_any)) : OptionalTensor();
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.size(0);
  Tensor y = torch::stable::new_empty(x, sizes);
  LinearArgs args{};
  args.dtype = dtype_of(x);
  args.R = row_count(x);
  args.K = x.size(-1);
  args.N = weight.size(0);
  args.x = row_map(x);
  args.y = result_map(y);
  args.weight = read(weight);
  args.scale = scale ? read<float>(*scale) : nullptr;
  args.group = group_size ? group_size : std::max<int64_t>(args.K, 1);
  args.bias = bias ? read<float>(*bias) : nullptr;
  kernels().linear(args);
  return y;
}

}  // namespace fastattn::FASTATTN_BACKEND
