// rotary_fwd and rotary_bwd.

namespace fastattn::FASTATTN_BACKEND {

static void check_positions(const RotaryArgs& args, int64_t P) {
  if (!kReadsData || args.positions == nullptr) return;
  for (int64_t b = 0; b < (args.positions_batch == 0 ? 1 : args.B); ++b)
    for (int64_t s = 0; s < args.S; ++s) {
      const int64_t position = args.positions[b * args.positions_batch + s];
      STD_TORCH_CHECK(
          position >= 0 && position < P, "\nrotary: positions must be in [0, ", P,
          "), the rows of cos; got ", position, "\n");
    }
}

// x and y (B, H, S, D) with contiguous rows; cos and sin fp32; positions contiguous.
static RotaryArgs rotary_args(
    const Tensor& x, const Tensor& y, const Tensor& cos, const Tensor& sin,
    const OptionalTensor& positions, bool interleaved, bool inverse) {
  RotaryArgs args{};
  args.dtype = dtype_of(x);
  args.B = x.size(0);
  args.H = x.size(1);
  args.S = x.size(2);
  args.D = x.size(3);
  args.half = cos.size(1);
  args.x = read(x);
  args.y = const_cast<void*>(read(y));
  args.x_batch = x.stride(0);
  args.x_head = x.stride(1);
  args.x_row = x.stride(2);
  args.y_batch = y.stride(0);
  args.y_head = y.stride(1);
  args.y_row = y.stride(2);
  args.cos = read<float>(cos);
  args.sin = read<float>(sin);
  if (positions) {
    args.positions = read<int64_t>(*positions);
    args.positions_batch = positions->size(0) == 1 ? 0 : positions->stride(0);
  }
  args.interleaved = interleaved;
  args.inverse = inverse;
  check_positions(args, cos.size(0));
  return args;
}

static Tensor turn(
    const Tensor& x_any, const Tensor& cos_any, const Tensor& sin_any,
    const OptionalTensor& positions_any, bool interleaved, bool inverse) {
  const Tensor x = with_contiguous_rows(x_any), cos = fp32(cos_any), sin = fp32(sin_any);
  const OptionalTensor positions = with_contiguous_rows(positions_any);
  ResultLike y(x_any, true, x);
  write(y.rows());
  kernels().rotary(rotary_args(x, y.rows(), cos, sin, positions, interleaved, inverse));
  return y.finish();
}

Tensor rotary_fwd(
    const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
    bool interleaved, bool inverse) {
  const OnDevice on(x);
  return turn(x, cos, sin, positions, interleaved, inverse);
}

Tensor rotary_bwd(
    const Tensor& dy, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
    bool interleaved, bool inverse) {
  const OnDevice on(dy);
  return turn(dy, cos, sin, positions, interleaved, !inverse);
}

}  // namespace fastattn::FASTATTN_BACKEND
