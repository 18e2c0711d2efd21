#pragma once
#include "args.h"

namespace fastattn {

// out (M x N) = a (M x K) b (K x N) + bias, or out += a b; all fp32, any strides of a and b.
struct MatmulArgs {
  int64_t M, N, K;
  const float *a, *b, *bias;  // bias (N,) may be null
  int64_t a_row, a_col, b_row, b_col;
  float* out;
  int64_t out_row;
  bool add;
};

}  // namespace fastattn
