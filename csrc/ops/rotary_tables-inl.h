// rotary_tables_bwd: rotary whose tables have gradients.

namespace fastattn::FASTATTN_BACKEND {

// The tokens that each of P rows turns: starts (P + 1) of the rows, then the tokens in order. Where
// the host may not read positions the kernel finds them.
static Tensor tokens_of_rows(const RotaryArgs& args, int64_t P, const Tensor& like) {
  Tensor result = torch::stable::new_zeros(like, {P + 1 + args.B * args.S}, ScalarType::Long);
  auto* starts = write<int64_t>(result);
  int64_t* tokens = starts + P + 1;
  const auto row = [&](int64_t b, int64_t s) {
    return args.positions == nullptr ? s : args.positions[b * args.positions_batch + s];
  };
  for (int64_t b = 0; b < args.B; ++b)
    for (int64_t s = 0; s < args.S; ++s) ++starts[row(b, s) + 1];
  for (int64_t p = 0; p < P; ++p) starts[p + 1] += starts[p];
  std::vector<int64_t> next(starts, starts + P);
  for (int64_t b = 0; b < args.B; ++b)
    for (int64_t s = 0; s < args.S; ++s) tokens[next[row(b, s)]++] = b * args.S + s;
  return result;
}

std::tuple<Tensor, Tensor, Tensor> rotary_tables_bwd(
    const Tensor& dy_any, const Tensor& x_any, const Tensor& cos_any, const Tensor& sin_any,
    const OptionalTensor& positions_any, bool interleaved, bool inverse, int64_t needs) {
  const OnDevice on(x_any);
  const Tensor x = with_contiguous_rows(x_any), dy = with_contiguous_rows(dy_any);
  const Tensor cos = fp32(cos_any), sin = fp32(sin_any);
  const OptionalTensor positions = with_contiguous_rows(positions_any);
  RotaryTablesArgs args{};
  args.turned = rotary_args(x, dy, cos, sin, positions, interleaved, inverse);
  args.P = cos.size(0);
  Tensor held;
  if (kReadsData) {
    held = tokens_of_rows(args.turned, args.P, x);
    args.starts = read<int64_t>(held);
    args.tokens = args.starts + args.P + 1;
  }
  const Tensor dcos = torch::stable::empty_like(cos), dsin = torch::stable::empty_like(sin);
  args.dcos = write<float>(dcos);
  args.dsin = write<float>(dsin);
  kernels().rotary_tables(args);
  const auto nothing = [&] { return torch::stable::new_empty(x, {0}); };
  return {
      needs & 1 ? turn(dy_any, cos_any, sin_any, positions_any, interleaved, !inverse) : nothing(),
      needs & 2 ? torch::stable::to(dcos, cos_any.scalar_type()) : nothing(),
      needs & 4 ? torch::stable::to(dsin, sin_any.scalar_type()) : nothing()};
}

}  // namespace fastattn::FASTATTN_BACKEND
