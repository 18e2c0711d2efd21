#include <vector>

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
  args.x = x.const_data_ptr();
  args.y = const_cast<void*>(y.const_data_ptr());
  args.x_batch = x.stride(0);
  args.x_head = x.stride(1);
  args.x_row = x.stride(2);
  args.y_batch = y.stride(0);
  args.y_head = y.stride(1);
  args.y_row = y.stride(2);
  args.cos = cos.const_data_ptr<float>();
  args.sin = sin.const_data_ptr<float>();
  if (positions) {
    args.positions = positions->const_data_ptr<int64_t>();
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
  kernels().rotary(rotary_args(x, y.rows(), cos, sin, positions, interleaved, inverse));
  return y.finish();
}

// The tokens that each of P rows turns: starts (P + 1) of the rows, then the tokens in order.
static Tensor tokens_of_rows(const RotaryArgs& args, int64_t P, const Tensor& like) {
  Tensor result = torch::stable::new_zeros(like, {P + 1 + args.B * args.S}, ScalarType::Long);
  auto* starts = static_cast<int64_t*>(result.mutable_data_ptr());
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

std::tuple<Tensor, Tensor, Tensor> rotary_tables_bwd(
    const Tensor& dy_any, const Tensor& x_any, const Tensor& cos_any, const Tensor& sin_any,
    const OptionalTensor& positions_any, bool interleaved, bool inverse, int64_t needs) {
  const Tensor x = with_contiguous_rows(x_any), dy = with_contiguous_rows(dy_any);
  const Tensor cos = fp32(cos_any), sin = fp32(sin_any);
  const OptionalTensor positions = with_contiguous_rows(positions_any);
  RotaryTablesArgs args{};
  args.turned = rotary_args(x, dy, cos, sin, positions, interleaved, inverse);
  args.P = cos.size(0);
  const Tensor held = tokens_of_rows(args.turned, args.P, x);
  args.starts = held.const_data_ptr<int64_t>();
  args.tokens = args.starts + args.P + 1;
  const Tensor dcos = torch::stable::empty_like(cos), dsin = torch::stable::empty_like(sin);
  args.dcos = static_cast<float*>(dcos.mutable_data_ptr());
  args.dsin = static_cast<float*>(dsin.mutable_data_ptr());
  kernels().rotary_tables(args);
  const auto nothing = [&] { return torch::stable::new_empty(x, {0}); };
  return {
      needs & 1 ? turn(dy_any, cos_any, sin_any, positions_any, interleaved, !inverse) : nothing(),
      needs & 2 ? torch::stable::to(dcos, cos_any.scalar_type()) : nothing(),
      needs & 4 ? torch::stable::to(dsin, sin_any.scalar_type()) : nothing()};
}

}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn_cpu, CPU, m) {
  m.impl("rotary_fwd", TORCH_BOX(&fastattn::rotary_fwd));
  m.impl("rotary_bwd", TORCH_BOX(&fastattn::rotary_bwd));
  m.impl("rotary_tables_fwd", TORCH_BOX(&fastattn::rotary_fwd));
  m.impl("rotary_tables_bwd", TORCH_BOX(&fastattn::rotary_tables_bwd));
}
