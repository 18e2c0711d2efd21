// What every kernel's arguments share. Sizes and strides are in elements, 64-bit; no torch header.
#pragma once
#include <cstdint>

#include "target.h"

namespace fastattn {

enum class Dtype { f32, bf16, f16 };

// Calls function<T>(...) with T for the dtype.
#define FASTATTN_DISPATCH(dtype, function, ...)             \
  do {                                                      \
    switch (dtype) {                                        \
      case Dtype::f32: function<float>(__VA_ARGS__); break; \
      case Dtype::bf16: function<bf16>(__VA_ARGS__); break; \
      case Dtype::f16: function<fp16>(__VA_ARGS__); break;  \
    }                                                       \
  } while (0)

// Where row r of a strided or broadcast tensor starts, when the leading dimensions are counted as
// one. Neighbouring dimensions that one stride serves are merged, so most tensors have dims <= 1.
constexpr int kRowDims = 8;
struct RowMap {
  const void* data = nullptr;  // null: the tensor is absent
  int dims = 0;
  int64_t size[kRowDims], stride[kRowDims];  // of the leading dimensions; stride 0 where broadcast
  int64_t col = 1;  // stride of the last dimension: 1, or 0 where broadcast

  FASTATTN_HD int64_t offset(int64_t row) const {
    int64_t at = 0;
    for (int d = dims - 1; d > 0; --d) {
      at += row % size[d] * stride[d];
      row /= size[d];
    }
    return dims > 0 ? at + row * stride[0] : at;
  }
};

// C entries shared by all rows, contiguous, in their own dtype.
struct Columns {
  const void* data = nullptr;  // null: the tensor is absent
  Dtype dtype = Dtype::f32;
};

}  // namespace fastattn
