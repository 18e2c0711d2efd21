#include "tensors.h"

namespace fastattn {

static SoftmaxArgs softmax_args(const Tensor& x, bool causal, double scale) {
  const int64_t C = x.size(-1);
  SoftmaxArgs args{};
  args.dtype = dtype_of(x);
  args.R = C == 0 ? 0 : x.numel() / C;
  args.C = C;
  args.Sq = x.dim() > 1 ? x.size(-2) : 1;
  args.x = x.const_data_ptr();
  args.causal = causal;
  args.scale = static_cast<float>(scale);
  return args;
}

Tensor softmax_fwd(const Tensor& x, const OptionalTensor& mask_any, bool causal, double scale) {
  const Tensor rows = torch::stable::contiguous(x);
  const OptionalTensor mask = with_row_map(mask_any);
  Tensor y = torch::stable::empty_like(rows);
  SoftmaxArgs args = softmax_args(rows, causal, scale);
  args.out = y.mutable_data_ptr();
  args.mask = row_map(mask);
  kernels().softmax_fwd(args);
  return y;
}

Tensor softmax_bwd(const Tensor& dy, const Tensor& y_any, bool causal, double scale) {
  const Tensor dy_rows = torch::stable::contiguous(dy), y = torch::stable::contiguous(y_any);
  Tensor dx = torch::stable::empty_like(y);
  SoftmaxArgs args = softmax_args(y, causal, scale);
  args.dy = dy_rows.const_data_ptr();
  args.out = dx.mutable_data_ptr();
  kernels().softmax_bwd(args);
  return dx;
}

}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn_cpu, CPU, m) {
  m.impl("softmax_fwd", TORCH_BOX(&fastattn::softmax_fwd));
  m.impl("softmax_bwd", TORCH_BOX(&fastattn::softmax_bwd));
}
