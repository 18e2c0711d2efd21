// Attention backward. With P = exp(score - lse), dP = dropout(dO V^T), delta = sum(dO * O) - dlse:
//
//   dS = P * (dP - delta);  dV = dropout(P)^T dO;  dK = scale dS^T Q;  dQ = scale dS K
//
// With dropout delta is sum(P * dP) - dlse, as O was rounded after its scaling by 1 / (1 - p):
// where a row sees one key, dS would be a rounding of dP in place of 0.
//
// What its kernels share: a block holds tiles of one side (queries or keys) and walks those of the
// other, two visits' copies under way at a time.
#pragma once
#include "scores.cuh"

namespace fastattn::cuda {

// Of a query row; lse in log2 units, in two floats. All 0 where the row sees nothing: its scores
// are -inf, and P is 0 whatever dlse is.
struct alignas(16) RowStats {
  float delta, lse, lse_low, unused;
};

// A call as its kernels get it.
struct AttentionBackward {
  AttentionArgs args;
  AttentionGradients grads;
  RowStats* stats;       // laid out as lse
  double* slope_shares;  // (blocks of queries, B, Hq), or null
  bool modified;         // scores are more than scaled products
  bool finds_delta;      // the pass before the others, with dropout
  bool query_aligned, key_aligned, value_aligned, dout_aligned;
  bool dquery_aligned, dkey_aligned, dvalue_aligned;
};

void attention_bwd_bias(const AttentionBackward& call);

// Two tiles are held and two walked, of the same rows; in two stages, 97 KB at most.
template <class T, int COLS>
struct BackwardShape {
  static constexpr int kBytes = kRowBytes<T, COLS>;
  static constexpr int kWarps = kBytes == 1024 ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kHeld = 16 * kWarps, kWalked = smaller_of(32, 8192 / kBytes);
  static constexpr int kStages = 2;
  static constexpr int kHeldTile = kHeld * COLS, kWalkedTile = kWalked * COLS;
  static constexpr int kStage =
      2 * kWalkedTile * static_cast<int>(sizeof(T)) + kWalked * static_cast<int>(sizeof(RowStats));
  static constexpr int kShared = 2 * kHeld * kBytes + kStages * kStage;
};

FASTATTN_DEVICE int64_t
stats_at(const AttentionArgs& args, const Sequence& s, int head, int64_t query) {
  return s.b * args.lse_batch + head * args.lse_head + s.query_start + query;
}

// Queries, or dO, [first, first + ROWS) of a head; zeros from the end of the sequence on.
template <bool PLAIN, int ROWS, int THREADS, class T, int COLS>
FASTATTN_DEVICE void copy_queries(
    Tile<T, COLS> tile, const Heads& x, const Sequence& s, int head, int first, int64_t cols,
    bool aligned) {
  const T* rows = row_at<const T>(x, s.b, head, s.query_start + first);
  copy_rows<ROWS, THREADS>(tile, static_cast<int>(cols), PLAIN || aligned, [&](int r) -> const T* {
    return first + r < s.Sq ? rows + r * x.row : nullptr;
  });
}

// Scores and dO V^T become dropout(P) and dS. stats(r, n, c): of the query of an entry.
template <class T, bool PLAIN, bool KEYS_IN_ROWS, int M, int N, class At, class Stats>
FASTATTN_DEVICE void grade(
    Share<M, N>& scores, Share<M, N>& dweights, const AttentionArgs& args, const PhiloxKey& philox,
    const Sequence& s, Unit unit, const At& place, const Stats& stats) {
  const auto grade_entry = [&](int r, int n, int c, float factor) {
    float &x = scores.at(r, n, c), &d = dweights.at(r, n, c);
    const RowStats row = stats(r, n, c);
    const float weight = exp2_fast(exponent<T>(x, unit, row.lse) - row.lse_low);
    const float dropped = fmaf(d, factor, 0.f);  // rounded here: delta is a sum of these
    d = weight * (dropped - row.delta);
    x = weight * factor;
  };
  if (PLAIN || !args.dropout)
    for_each(scores, [&](int r, int n, int c, float&) { grade_entry(r, n, c, 1.f); });
  else if (KEYS_IN_ROWS)
    for_each_factor_by_column<M, N>(args, philox, s, place, grade_entry);
  else
    for_each_factor_by_row<M, N>(args, philox, s, place, grade_entry);
}

}  // namespace fastattn::cuda
