#pragma once
#include "args.h"

namespace fastattn {

// y = x W^T + bias over R rows of K entries; W (N, K) is int8 with scales, or bf16 without.
struct LinearArgs {
  Dtype dtype;  // of x and y
  int64_t R, K, N;
  RowMap x, y;
  const void* weight;
  const float* scale;  // (N, groups of `group` inputs), or null
  int64_t group;       // K where an output has one scale
  const float* bias;   // (N,) or null
};

}  // namespace fastattn
