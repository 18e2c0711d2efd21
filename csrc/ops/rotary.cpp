#include "tensors.h"

namespace fastattn {

static void check_positions(const RotaryArgs& args, int64_t P) {
  if (args.positions == nullptr) return;
  for (int64_t b = 0; b < (args.positions_batch == 0 ? 1 : args.B); ++b)
    for (int64_t s = 0; s < args.S; ++s) {
      const int64_t position = args.positions[b * args.positions_batch + s];
      STD_TORCH_CHECK(
          position >= 0 && position < P, "\nrotary: positions must be in [0, ", P,
          "), the rows of cos; got ", position, "\n");
    }
}

static Tensor turn(
    const Tensor& x_any, const Tensor& cos_any, const Tensor& sin_any,
    const OptionalTensor& positions_any, bool interleaved, bool inverse) {
  const Tensor x = with_contiguous_rows(x_any), cos = fp32(cos_any), sin = fp32(sin_any);
  const OptionalTensor positions = with_contiguous_rows(positions_any);
  ResultLike y(x_any, true, x);
  RotaryArgs args{};
  args.dtype = dtype_of(x);
  args.B = x.size(0);
  args.H = x.size(1);
  args.S = x.size(2);
  args.D = x.size(3);
  args.half = cos.size(1);
  args.x = x.const_data_ptr();
  args.y = y.data();
  args.x_batch = x.stride(0);
  args.x_head = x.stride(1);
  args.x_row = x.stride(2);
  args.y_batch = y.rows().stride(0);
  args.y_head = y.rows().stride(1);
  args.y_row = y.rows().stride(2);
  args.cos = cos.const_data_ptr<float>();
  args.sin = sin.const_data_ptr<float>();
  if (positions) {
    args.positions = positions->const_data_ptr<int64_t>();
    args.positions_batch = positions->size(0) == 1 ? 0 : positions->stride(0);
  }
  args.interleaved = interleaved;
  args.inverse = inverse;
  check_positions(args, cos.size(0));
  kernels().rotary(args);
  return y.finish();
}

Tensor rotary_fwd(
    const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
    bool interleaved, bool inverse) {
  return turn(x, cos, sin, positions, interleaved, inverse);
}

Tensor rotary_bwd(
    const Tensor& dy, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
    bool interleaved, bool inverse) {
  return turn(dy, cos, sin, positions, interleaved, !inverse);
}

}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn_cpu, CPU, m) {
  m.impl("rotary_fwd", TORCH_BOX(&fastattn::rotary_fwd));
  m.impl("rotary_bwd", TORCH_BOX(&fastattn::rotary_bwd));
}
