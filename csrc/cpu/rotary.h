#pragma once
#include "args.h"

namespace fastattn {

// Rotates pairs of channels of x (B, H, S, D) by the angles of each token's position; channels from
// 2 * half on are copied. cos and sin are fp32 (P, half), contiguous.
struct RotaryArgs {
  Dtype dtype;
  int64_t B, H, S, D, half;
  const void* x;
  void* y;
  int64_t x_batch, x_head, x_row, y_batch, y_head, y_row;  // strides; channels are neighbours
  const float *cos, *sin;
  const int64_t* positions;  // (B, S) in steps of positions_batch, or null: token s is at s
  int64_t positions_batch;
  bool interleaved, inverse;
};

}  // namespace fastattn
