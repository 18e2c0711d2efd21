#pragma once
#include "args.h"

namespace fastattn {

// loss = (1 - smoothing) (lse - x[target]) + smoothing (lse - mean(x)) + z_loss lse^2, a row of V
// logits at a time; 0 where the target is ignore_index.
struct CrossEntropyArgs {
  Dtype dtype;
  int64_t R, V;
  const void* logits;
  int64_t row;  // stride of the logits' rows; entries of a row are neighbours
  const int64_t* target;
  int64_t ignore_index;
  float smoothing, z_loss;
  float *loss, *lse;   // (R,); lse is an input of the backward
  const float* dloss;  // backward: (R,) in steps of dloss_stride
  int64_t dloss_stride;
  void* dlogits;  // backward: rows dlogits_row apart; may be the logits themselves
  int64_t dlogits_row;
};

}  // namespace fastattn
