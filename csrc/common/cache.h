#pragma once
#include "args.h"

namespace fastattn {

// Writes the first counts[b] of S new tokens x (B, H, S, D) into a store, sequence b's to positions
// lengths[b] + t, turned by the angles of their positions where there are cos and sin.
struct CacheArgs {
  Dtype dtype;
  int64_t B, H, S, D;
  const void* x;
  int64_t x_batch, x_head, x_row;  // strides; channels are neighbours
  void* store;                     // (B, H, max_length, D), or pages (pages, page_size, H, D)
  int64_t store_batch, store_head, store_row;  // store_batch: of a sequence, or of a page
  const int32_t *lengths, *counts;             // (B,)
  const int32_t* pages;  // the pages of sequence b, in steps of pages_batch; null: not paged
  int64_t pages_batch, page_size;
  const float *cos, *sin;  // (P, half), contiguous
  int64_t half;            // 0: nothing is turned
  bool interleaved;
};

}  // namespace fastattn
