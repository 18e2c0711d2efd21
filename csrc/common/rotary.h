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

// The gradients of cos and sin: sums over the heads of the tokens that each row of them turned.
struct RotaryTablesArgs {
  RotaryArgs turned;      // y: its gradient
  int64_t P;              // rows of cos and sin
  const int64_t* starts;  // (P + 1,): where a row's tokens start in
  const int64_t* tokens;  // (B * S,), b * S + s, in order
  float *dcos, *dsin;     // (P, half)
};

}  // namespace fastattn
