// Torch tensors as the kernels see them. Schemas are defined once for every backend, in
// fastattn/ops/*.py, and shapes and dtypes are checked there (checks.py), so nothing is checked
// here.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "../cpu/kernels.h"

namespace fastattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: return Dtype::f32;
  }
}

inline RowMap row_map(const OptionalTensor& x) {
  RowMap map;
  if (!x) return map;
  map.data = x->const_data_ptr();
  map.dims = static_cast<int>(x->dim()) - 1;
  for (int d = 0; d < map.dims; ++d) {
    map.size[d] = x->size(d);
    map.stride[d] = x->stride(d);
  }
  map.col = x->stride(map.dims);
  return map;
}

inline Tensor fp32(const Tensor& x) {
  return torch::stable::contiguous(torch::stable::to(x, ScalarType::Float));
}

inline Tensor with_contiguous_rows(const Tensor& x) {
  return x.size(-1) <= 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

}  // namespace fastattn
