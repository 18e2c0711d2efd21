// Attention of a few queries against many keys: the forward's kernel with one warp a block, whose
// 16 rows are those of all query heads that share a key/value head, over kSplitKeys keys; a second
// kernel joins what the splits found. Paged or not, and with every feature.
#include "attention_fwd.cuh"
#include "kernels.h"

namespace fastattn::cuda {

// Long enough that what a split leaves is little beside what it reads, short enough for a few heads
// to feed a whole chip.
constexpr int kSplitKeys = 256;

// The splits of a query row, in order. A thread has two columns.
template <class T, int COLS>
__global__ void __launch_bounds__(COLS / 2)
    attention_join_kernel(const __grid_constant__ AttentionForward call, int splits) {
  const AttentionArgs& args = call.args;
  const int64_t row = blockIdx.x, rows = args.B * args.Hq * args.Sq;
  const int query = static_cast<int>(row % args.Sq);
  const int head = static_cast<int>(row / args.Sq % args.Hq);
  const int64_t b = row / args.Sq / args.Hq;
  const int col = 2 * static_cast<int>(threadIdx.x);
  float row_max = -kInf, row_sum = 0.f;
  Float2 out{0.f, 0.f};
  for (int split = 0; split < splits; ++split) {
    const int64_t at = split * rows + row;
    const PartStats part = load(call.stats + at);
    const Float2 more = load(reinterpret_cast<const Float2*>(call.parts + at * COLS + col));
    const float highest = fmaxf(row_max, part.row_max);
    const float base = highest == -kInf ? 0.f : highest;
    const float mine = exp2_fast(row_max - base), theirs = exp2_fast(part.row_max - base);
    row_sum = row_sum * mine + part.row_sum * theirs;
    out = {out.x * mine + more.x * theirs, out.y * mine + more.y * theirs};
    row_max = highest;
  }
  const Sequence s{b, 0, 0, static_cast<int>(args.Sq), static_cast<int>(args.Sk), 0};
  const Finished done = finish(row_max, row_sum, sink_of(args, s, head));
  if (col == 0) write_lse(args, s, head, query, done);
  T* to = row_at<T>(args.out, b, head, query) + col;
  if (col < args.Dv) store(to, from_float<T>(out.x * done.inverse));
  if (col + 1 < args.Dv) store(to + 1, from_float<T>(out.y * done.inverse));
}

static int64_t splits_of(const AttentionArgs& args) {
  return args.Sk > kSplitKeys ? cuts(args.Sk, kSplitKeys) : 1;
}
// Columns that the kernel pads a row to.
static int64_t padded_cols(const AttentionArgs& args) {
  const int64_t cols = args.D > args.Dv ? args.D : args.Dv;
  return cols <= 64 ? 64 : cols <= 128 ? 128 : 256;
}

template <class T, int COLS>
static void launch_decode(AttentionForward call) {
  using Shape = ForwardShape<T, COLS, 1, false>;
  static_assert(kSplitKeys % Shape::kKeys == 0);
  const AttentionArgs& args = call.args;
  const int64_t splits = splits_of(args), sets = args.Hq / call.together;
  const int64_t blocks = cuts(call.together * args.Sq, Shape::kRows) * sets * args.B * splits;
  launch(
      "attention_decode", attention_fwd_kernel<T, COLS, 1, false>,
      dim3(static_cast<unsigned>(blocks)), dim3(32), Shape::kShared, current_stream(), call);
  if (splits == 1) return;
  launch(
      "attention_join", attention_join_kernel<T, COLS>,
      dim3(static_cast<unsigned>(args.B * args.Hq * args.Sq)), dim3(COLS / 2), 0, current_stream(),
      call, static_cast<int>(splits));
}

template <class T>
static void launch_head(const AttentionArgs& args) {
  AttentionForward call = attention_forward<T>(args);
  call.together = static_cast<int>(args.Hq / args.Hkv);
  if (splits_of(args) > 1) {
    call.split_keys = kSplitKeys;
    const int64_t rows = splits_of(args) * args.B * args.Hq * args.Sq;
    call.parts = scratch<float>(rows * padded_cols(args));
    call.stats = scratch<PartStats>(rows);
  }
  switch (padded_cols(args)) {
    case 64: return launch_decode<T, 64>(call);
    case 128: return launch_decode<T, 128>(call);
    default: return launch_decode<T, 256>(call);
  }
}

void attention_decode(const AttentionArgs& args) {
  FASTATTN_DISPATCH(args.query.dtype, launch_head, args);
}

}  // namespace fastattn::cuda
