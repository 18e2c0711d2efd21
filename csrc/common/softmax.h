#pragma once
#include "args.h"

namespace fastattn {

// softmax over rows of C entries: y = softmax(scale * x) over the entries that mask and causal
// keep; 0 where none is kept. Row r of the (R, C) matrix is query r % Sq, and sees the columns
// up to r % Sq + C - Sq. x, y and the gradients are contiguous.
struct SoftmaxArgs {
  Dtype dtype;
  int64_t R, C, Sq;
  const void* x;   // forward: the input; backward: y
  const void* dy;  // backward only
  void* out;       // y, or dx
  RowMap mask;     // uint8: 1 keeps
  bool causal;
  float scale;
};

}  // namespace fastattn
