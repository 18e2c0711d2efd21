#pragma once
#include "args.h"

namespace fastattn {

// y = gelu(x + bias) over rows of C entries; bias (C,) may be absent.
struct GeluArgs {
  Dtype dtype;
  int64_t R, C;
  bool tanh;
  RowMap x, y;
  Columns bias;
  RowMap dy, dx;  // backward
  float* dbias;   // backward: (C,) or null
};

// y = act(gate) * up over rows of C entries; act is silu, or gelu.
struct GluArgs {
  Dtype dtype;
  int64_t R, C;
  bool gelu, tanh;
  RowMap gate, up, y;
  RowMap dy, dgate, dup;  // backward
};

}  // namespace fastattn
