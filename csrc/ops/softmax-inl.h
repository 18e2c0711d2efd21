// softmax_fwd and softmax_bwd.

namespace fastattn::FASTATTN_BACKEND {

static SoftmaxArgs softmax_args(const Tensor& x, bool causal, double scale) {
  const int64_t C = x.size(-1);
  SoftmaxArgs args{};
  args.dtype = dtype_of(x);
  args.R = C == 0 ? 0 : x.numel() / C;
  args.C = C;
  args.Sq = x.dim() > 1 ? x.size(-2) : 1;
  args.x = read(x);
  args.causal = causal;
  args.scale = static_cast<float>(scale);
  return args;
}

Tensor softmax_fwd(const Tensor& x, const OptionalTensor& mask_any, bool causal, double scale) {
  const OnDevice on(x);
  const Tensor rows = torch::stable::contiguous(x);
  const OptionalTensor mask = with_row_map(mask_any);
  Tensor y = fresh_like(rows);
  SoftmaxArgs args = softmax_args(rows, causal, scale);
  args.out = write(y);
  args.mask = row_map(mask);
  kernels().softmax_fwd(args);
  return y;
}

Tensor softmax_bwd(const Tensor& dy, const Tensor& y_any, bool causal, double scale) {
  const OnDevice on(dy);
  const Tensor dy_rows = torch::stable::contiguous(dy), y = torch::stable::contiguous(y_any);
  Tensor dx = fresh_like(y);
  SoftmaxArgs args = softmax_args(y, causal, scale);
  args.dy = read(dy_rows);
  args.out = write(dx);
  kernels().softmax_bwd(args);
  return dx;
}

}  // namespace fastattn::FASTATTN_BACKEND
