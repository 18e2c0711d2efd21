// Torch tensors as the kernels see them. Schemas are defined once for every backend, in
// fastattn/ops/*.py, and shapes and dtypes are checked there (checks.py), so nothing is checked
// here.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/kernels.h"
#if defined(FASTATTN_HOST)
#include "../host/model.h"
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastattn {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "fastattn: the kernels read float32, float16 and bfloat16");
  }
}

// What lies beside a kernel's main input (bias, weight, residual) may be float64: then a fp32 copy.
inline OptionalTensor without_float64(const OptionalTensor& x) {
  const bool wide = x && x->scalar_type() == ScalarType::Double;
  return wide ? OptionalTensor(torch::stable::to(*x, ScalarType::Float)) : x;
}
// Kernels of rows read it in fp32 or in x's dtype: a fp32 copy of anything else.
inline OptionalTensor beside(const Tensor& x, const OptionalTensor& side) {
  const bool known =
      !side || side->scalar_type() == ScalarType::Float || side->scalar_type() == x.scalar_type();
  return known ? side : OptionalTensor(torch::stable::to(*side, ScalarType::Float));
}
// The gradient of such an input, in its own dtype.
inline Tensor in_dtype_of(const OptionalTensor& x, const Tensor& gradient) {
  return x ? torch::stable::to(gradient, x->scalar_type()) : gradient;
}

#if defined(FASTATTN_HOST)
// Memory from the first of x's entries to the last.
inline void permit(const Tensor& x, const void* data, bool writable) {
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  const int64_t entries = x.numel() == 0 ? 0 : last + 1;
  host::permit(data, entries * static_cast<int64_t>(x.element_size()), writable);
}
#else
inline void permit(const Tensor&, const void*, bool) {}
#endif

// Where x lies, for a kernel that reads it, or writes it. The model of a GPU lets a kernel touch
// nothing else.
template <class T = void>
const T* read(const Tensor& x) {
  const void* data = x.const_data_ptr();
  permit(x, data, false);
  return static_cast<const T*>(data);
}
template <class T = void>
T* write(const Tensor& x) {
  void* data = x.mutable_data_ptr();
  permit(x, data, true);
  return static_cast<T*>(data);
}

inline RowMap row_map(const OptionalTensor& x) {
  RowMap map;
  if (!x) return map;
  const auto sizes = x->sizes(), strides = x->strides();
  const int64_t last = x->dim() - 1;
  map.data = read(*x);
  map.col = strides[last];
  for (int64_t d = 0; d < last; ++d) {
    if (sizes[d] == 1) continue;
    const bool merges = map.dims > 0 && map.stride[map.dims - 1] == sizes[d] * strides[d];
    if (!merges) ++map.dims;
    STD_TORCH_CHECK(map.dims <= kRowDims, "fastattn: rows in too many dimensions");
    map.size[map.dims - 1] = merges ? map.size[map.dims - 1] * sizes[d] : sizes[d];
    map.stride[map.dims - 1] = strides[d];
  }
  return map;
}

inline RowMap result_map(const Tensor& x) {
  write(x);
  return row_map(x);
}

// The leading dimensions counted as one.
inline int64_t row_count(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d < x.dim() - 1; ++d) rows *= x.size(d);
  return rows;
}

// Rows may lie anywhere that a RowMap can tell, but the entries of one are neighbours.
inline bool fits_row_map(const Tensor& x) { return x.dim() <= kRowDims + 1; }
inline bool has_contiguous_rows(const Tensor& x) {
  return fits_row_map(x) && (x.size(-1) <= 1 || x.stride(x.dim() - 1) == 1);
}
inline OptionalTensor with_row_map(const OptionalTensor& x) {
  return x && !fits_row_map(*x) ? OptionalTensor(torch::stable::contiguous(*x)) : x;
}
inline Tensor with_contiguous_rows(const Tensor& x) {
  return has_contiguous_rows(x) ? x : torch::stable::contiguous(x);
}
inline OptionalTensor with_contiguous_rows(const OptionalTensor& x) {
  return x ? OptionalTensor(with_contiguous_rows(*x)) : x;
}

inline Tensor fp32(const Tensor& x) {
  return torch::stable::contiguous(torch::stable::to(x, ScalarType::Float));
}

inline Columns columns(const OptionalTensor& x) {
  return x ? Columns{read(*x), dtype_of(*x)} : Columns{};
}

// x, in huge pages where Linux gives them to those who ask (its "madvise", which most distributions
// choose). Large memory comes fresh from the system, at a fault for every 4 KB: for the gradient of
// 512 x 50257 logits they were 45 ms of 63, and are 7 ms in pages of 2 MB.
inline Tensor in_huge_pages(Tensor x) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  const uintptr_t bytes = x.numel() * x.element_size(), end = begin + bytes;
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (bytes >= 2 * kPage && x.is_cpu())
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // refused: no harm
#endif
  return x;
}
inline Tensor fresh(const Tensor& like, IntHeaderOnlyArrayRef sizes) {
  return in_huge_pages(torch::stable::new_empty(like, sizes));
}
inline Tensor fresh_like(const Tensor& x) { return in_huge_pages(torch::stable::empty_like(x)); }

// A result laid out as its input, or of no elements where nobody needs it. A kernel writes rows;
// where empty_like has none that are contiguous, as for an input that overlaps itself, they are
// copied into it at the end.
class ResultLike {
 public:
  ResultLike(const OptionalTensor& input, bool needed, const Tensor& anchor)
      : needed_(input && needed),
        result_(needed_ ? fresh_like(*input) : torch::stable::new_empty(anchor, {0})),
        rows_(has_contiguous_rows(result_) ? result_ : fresh(result_, result_.sizes())) {}
  const Tensor& rows() const { return rows_; }
  RowMap map() const { return needed_ ? result_map(rows_) : RowMap(); }
  void* data() const { return needed_ ? write(rows_) : nullptr; }
  Tensor finish() {
    if (rows_.get() != result_.get()) torch::stable::copy_(result_, rows_);
    return result_;
  }

 private:
  bool needed_;
  Tensor result_, rows_;
};

}  // namespace fastattn
