// norm_fwd and norm_bwd.

namespace fastattn::FASTATTN_BACKEND {

static void set_dropout(NormArgs& args, const OptionalTensor& philox, double p) {
  args.dropout = philox && p > 0;
  if (!args.dropout) return;
  args.philox = read<int64_t>(*philox);
  args.drop_below = p < 1 ? static_cast<uint32_t>(p * 4294967296.0) : 0;
  args.keep_scale = p < 1 ? static_cast<float>(1 / (1 - p)) : 0.f;
}

static NormArgs norm_args(
    const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& philox, bool rms, double eps,
    double weight_offset, double dropout_p) {
  NormArgs args{};
  args.dtype = dtype_of(x);
  args.residual_dtype = dtype_of(residual ? *residual : x);
  args.R = row_count(x);
  args.C = x.size(-1);
  args.x = row_map(x);
  args.residual = row_map(residual);
  args.weight = columns(weight);
  args.bias = columns(bias);
  args.rms = rms;
  args.eps = static_cast<float>(eps);
  args.weight_offset = static_cast<float>(weight_offset);
  set_dropout(args, philox, dropout_p);
  return args;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_fwd(
    const Tensor& x_any, const OptionalTensor& residual_any, const OptionalTensor& weight_any,
    const OptionalTensor& bias_any, const OptionalTensor& philox, bool rms, double eps,
    double weight_offset, double dropout_p, bool return_residual) {
  const OnDevice on(x_any);
  const Tensor x = with_contiguous_rows(x_any);
  const OptionalTensor residual = with_contiguous_rows(beside(x_any, residual_any));
  const OptionalTensor weight = with_contiguous_rows(beside(x_any, weight_any));
  const OptionalTensor bias = with_contiguous_rows(beside(x_any, bias_any));
  NormArgs args = norm_args(x, residual, weight, bias, philox, rms, eps, weight_offset, dropout_p);

  const auto leading = x.sizes().slice(0, x.dim() - 1);
  Tensor y = fresh(x, x.sizes());
  Tensor summed = return_residual ? fresh(residual ? *residual : x, x.sizes())
                                  : torch::stable::new_empty(x, {0});
  Tensor rstd = torch::stable::new_empty(x, leading, ScalarType::Float);
  Tensor mean = rms ? torch::stable::new_empty(x, {0}, ScalarType::Float)
                    : torch::stable::new_empty(x, leading, ScalarType::Float);
  args.y = result_map(y);
  if (return_residual) args.summed = result_map(summed);
  args.mean = write<float>(mean);
  args.rstd = write<float>(rstd);
  kernels().norm_fwd(args);
  return {y, return_residual ? in_dtype_of(residual_any, summed) : summed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_bwd(
    const OptionalTensor& dy_any, const OptionalTensor& dsummed_any, const Tensor& x_any,
    const OptionalTensor& residual_any, const OptionalTensor& weight_any,
    const OptionalTensor& bias_any, const OptionalTensor& philox, const Tensor& mean_any,
    const Tensor& rstd_any, bool rms, double eps, double weight_offset, double dropout_p,
    bool return_residual, int64_t needs) {
  const OnDevice on(x_any);
  const Tensor x = with_contiguous_rows(x_any);
  const OptionalTensor residual = with_contiguous_rows(beside(x_any, residual_any));
  const OptionalTensor weight = with_contiguous_rows(beside(x_any, weight_any));
  const OptionalTensor bias = with_contiguous_rows(beside(x_any, bias_any));
  const OptionalTensor dy = with_contiguous_rows(dy_any);
  const OptionalTensor dsummed =
      return_residual ? with_contiguous_rows(beside(x_any, dsummed_any)) : OptionalTensor();
  const Tensor mean = torch::stable::contiguous(mean_any);
  const Tensor rstd = torch::stable::contiguous(rstd_any);
  NormArgs args = norm_args(x, residual, weight, bias, philox, rms, eps, weight_offset, dropout_p);
  args.mean = const_cast<float*>(read<float>(mean));
  args.rstd = const_cast<float*>(read<float>(rstd));
  args.dy = row_map(dy);
  args.dsummed = row_map(dsummed);

  ResultLike dx(x_any, needs & 1, x), dresidual(beside(x_any, residual_any), needs & 2, x);
  ResultLike dweight(weight, needs & 4, x), dbias(bias, needs & 8, x);
  args.dx = dx.map();
  args.dresidual = dresidual.map();
  args.dweight = dweight.data();
  args.dbias = dbias.data();
  kernels().norm_bwd(args);
  return {
      dx.finish(), in_dtype_of(residual_any, dresidual.finish()),
      in_dtype_of(weight_any, dweight.finish()), in_dtype_of(bias_any, dbias.finish())};
}

}  // namespace fastattn::FASTATTN_BACKEND
