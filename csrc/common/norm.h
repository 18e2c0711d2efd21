#pragma once
#include "philox.h"
#include "args.h"

namespace fastattn {

// layer_norm and rms_norm of z = dropout(x) + residual, over rows of C entries:
//   y = (z - mean) * rstd * (weight + weight_offset) + bias
// Any tensor may be absent, save x, rstd and (not rms) mean. Rows are contiguous, and lie anywhere.
struct NormArgs {
  Dtype dtype;           // of x, y, dy, dx
  Dtype residual_dtype;  // of residual, summed, dsummed, dresidual
  int64_t R, C;
  RowMap x, residual;
  Columns weight, bias;
  bool rms;
  float eps, weight_offset;

  bool dropout;  // drops an entry whose word is below drop_below, and all where keep_scale is 0
  const int64_t* philox;  // (seed, offset), where the tensors lie
  uint32_t drop_below;
  float keep_scale;

  float *mean, *rstd;  // results of the forward, inputs of the backward
  RowMap y, summed;    // forward

  RowMap dy, dsummed, dx, dresidual;  // backward
  void *dweight, *dbias;              // of weight's and bias's dtype
};

}  // namespace fastattn
