// gelu_fwd, gelu_bwd, glu_fwd and glu_bwd.

namespace fastattn::FASTATTN_BACKEND {

// ---- gelu -------------------------------------------------------------------------------------

static GeluArgs gelu_args(const Tensor& x, const OptionalTensor& bias, bool tanh) {
  GeluArgs args{};
  args.dtype = dtype_of(x);
  args.R = row_count(x);
  args.C = x.size(-1);
  args.tanh = tanh;
  args.x = row_map(x);
  args.bias = columns(bias);
  return args;
}

Tensor gelu_fwd(const Tensor& x_any, const OptionalTensor& bias_any, bool tanh) {
  const OnDevice on(x_any);
  const Tensor x = with_contiguous_rows(x_any);
  const OptionalTensor bias = with_contiguous_rows(beside(x_any, bias_any));
  Tensor y = fresh(x, x.sizes());
  GeluArgs args = gelu_args(x, bias, tanh);
  args.y = result_map(y);
  kernels().gelu_fwd(args);
  return y;
}

std::tuple<Tensor, Tensor> gelu_bwd(
    const Tensor& dy_any, const Tensor& x_any, const OptionalTensor& bias_any, bool tanh,
    int64_t needs) {
  const OnDevice on(x_any);
  const Tensor dy = with_contiguous_rows(dy_any), x = with_contiguous_rows(x_any);
  const OptionalTensor bias = with_contiguous_rows(beside(x_any, bias_any));
  GeluArgs args = gelu_args(x, bias, tanh);
  ResultLike dx(x_any, true, x);
  Tensor dbias = torch::stable::new_empty(x, {0});
  const bool needs_bias = bias && (needs & 2);
  if (needs_bias) dbias = torch::stable::new_empty(*bias, bias->sizes(), ScalarType::Float);
  args.dy = row_map(dy);
  args.dx = dx.map();
  args.dbias = needs_bias ? write<float>(dbias) : nullptr;
  kernels().gelu_bwd(args);
  return {dx.finish(), needs_bias ? in_dtype_of(bias_any, dbias) : dbias};
}

// ---- gated ------------------------------------------------------------------------------------

static GluArgs glu_args(const Tensor& gate, const Tensor& up, bool gelu, bool tanh) {
  GluArgs args{};
  args.dtype = dtype_of(gate);
  args.R = row_count(gate);
  args.C = gate.size(-1);
  args.gelu = gelu;
  args.tanh = tanh;
  args.gate = row_map(gate);
  args.up = row_map(up);
  return args;
}

Tensor glu_fwd(const Tensor& gate_any, const Tensor& up_any, bool gelu, bool tanh) {
  const OnDevice on(gate_any);
  const Tensor gate = with_contiguous_rows(gate_any), up = with_contiguous_rows(up_any);
  Tensor y = fresh(gate, gate.sizes());
  GluArgs args = glu_args(gate, up, gelu, tanh);
  args.y = result_map(y);
  kernels().glu_fwd(args);
  return y;
}

std::tuple<Tensor, Tensor> glu_bwd(
    const Tensor& dy_any, const Tensor& gate_any, const Tensor& up_any, bool gelu, bool tanh) {
  const OnDevice on(gate_any);
  const Tensor gate = with_contiguous_rows(gate_any), up = with_contiguous_rows(up_any);
  const Tensor dy = with_contiguous_rows(dy_any);
  GluArgs args = glu_args(gate, up, gelu, tanh);
  ResultLike dgate(gate_any, true, gate), dup(up_any, true, gate);
  args.dy = row_map(dy);
  args.dgate = dgate.map();
  args.dup = dup.map();
  kernels().glu_bwd(args);
  return {dgate.finish(), dup.finish()};
}

}  // namespace fastattn::FASTATTN_BACKEND
