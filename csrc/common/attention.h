#pragma once
#include "philox.h"
#include "args.h"

namespace fastattn {

// A (B, H, S, D) tensor with a contiguous last dimension, or a packed (total, H, D) one with batch
// 0.
struct Heads {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t batch = 0, head = 0, row = 0;  // strides

  FASTATTN_HD int64_t at(int64_t b, int64_t h, int64_t i) const {
    return b * batch + h * head + i * row;
  }
};

// A tensor that broadcasts to (B, Hq, Sq, Sk): strides are 0 where it does.
struct Scores {
  void* data = nullptr;  // null: absent
  Dtype dtype = Dtype::f32;
  int64_t size[4] = {1, 1, 1, 1};
  int64_t batch = 0, head = 0, row = 0, col = 0;

  FASTATTN_HD int64_t at(int64_t b, int64_t h, int64_t i) const {
    return b * batch + h * head + i * row;
  }
};

// A value for each query head, or each sequence and query head.
struct PerHead {
  const float* data = nullptr;  // null: absent
  int64_t batch = 0;            // stride

  FASTATTN_HD float at(int64_t b, int64_t h) const { return data[b * batch + h]; }
};

// Pages of a cache: token j of sequence b is row j % page_size of page table[b * batch + j /
// page_size].
struct Paging {
  const int32_t* table = nullptr;  // null: not paged
  int64_t batch = 0, page_size = 1;
};

constexpr int64_t kUnlimited = INT64_MAX / 4;

// score = scale q.k, capped, + bias - slope |distance|, masked; out = dropout(softmax) v.
// lse and the like are contiguous (B, Hq, Sq), packed (Hq, total).
struct AttentionArgs {
  int64_t B, Hq, Hkv, Sq, Sk, D, Dv;
  Heads query, key, value, out;
  float *lse, *lse_low;  // natural log; low is what rounding lse to fp32 left
  int64_t lse_batch, lse_head;

  Scores bias, mask;  // mask: uint8, 1 may attend
  PerHead alibi_slopes, sinks;
  const int32_t* key_lengths;                  // (B,) or null
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // (B + 1,) or null; then Sq and Sk are the longest
  Paging paging;
  float scale, softcap;  // softcap 0: none
  int64_t window_left, window_right;
  bool diagonal_at_length;
  bool dropout;
  const int64_t* philox;  // (seed, offset), where the tensors lie
  uint32_t drop_below;
  float keep_scale;
};

struct AttentionGradients {
  Heads dout;    // data null: zero
  float* delta;  // (as lse) sum(dout * out) - dlse
  // of these, data null: not wanted
  Heads dquery;  // zeros
  Heads dkey, dvalue;
  Scores dbias;
  double* slope_sums;  // (B, Hq), zeros, or null: the slopes' gradient of each sequence
};

}  // namespace fastattn
