// matmul and matmul_add_: products of fp32 matrices, for linear_cross_entropy.

namespace fastattn::FASTATTN_BACKEND {

static MatmulArgs matmul_args(const Tensor& a, const Tensor& b, const Tensor& out) {
  MatmulArgs args{};
  args.M = a.size(0);
  args.K = a.size(1);
  args.N = b.size(1);
  args.a = read<float>(a);
  args.a_row = a.stride(0);
  args.a_col = a.stride(1);
  args.b = read<float>(b);
  args.b_row = b.stride(0);
  args.b_col = b.stride(1);
  args.out = write<float>(out);
  args.out_row = out.stride(0);
  return args;
}

Tensor matmul(const Tensor& a, const Tensor& b, const OptionalTensor& bias_any) {
  Tensor out = fresh(a, {a.size(0), b.size(1)});
  const OptionalTensor bias = bias_any ? OptionalTensor(fp32(*bias_any)) : OptionalTensor();
  MatmulArgs args = matmul_args(a, b, out);
  if (bias) args.bias = read<float>(*bias);
  kernels().matmul(args);
  return out;
}

void matmul_add_(const Tensor& out, const Tensor& a, const Tensor& b) {
  MatmulArgs args = matmul_args(a, b, out);
  args.add = true;
  kernels().matmul(args);
}

}  // namespace fastattn::FASTATTN_BACKEND
