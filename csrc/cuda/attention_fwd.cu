// Attention forward, a block of query rows of one head at a time: attention_fwd.cuh has the kernel.
#include "attention_fwd.cuh"
#include "kernels.h"

namespace fastattn::cuda {

template <class T, int COLS, int WARPS, bool PLAIN>
static void launch_fwd(const AttentionForward& call) {
  using Shape = ForwardShape<T, COLS, WARPS, PLAIN>;
  const AttentionArgs& args = call.args;
  const int64_t blocks = cuts(args.Sq, Shape::kRows) * args.Hq * args.B;
  launch(
      "attention_fwd", attention_fwd_kernel<T, COLS, WARPS, PLAIN>,
      dim3(static_cast<unsigned>(blocks)), dim3(32 * WARPS), Shape::kShared, current_stream(),
      call);
}

static bool is_plain(const AttentionForward& call) {
  return !call.modified && !call.args.dropout && call.args.paging.table == nullptr &&
         call.query_aligned && call.key_aligned && call.value_aligned;
}

// The plain form is worth its compile time where the products are fast.
template <class T, int COLS, int WARPS>
static void launch_form(const AttentionForward& call) {
  if constexpr (sizeof(T) == 2 && COLS <= 128)
    if (is_plain(call)) return launch_fwd<T, COLS, WARPS, true>(call);
  launch_fwd<T, COLS, WARPS, false>(call);
}

template <class T>
static void launch_head(const AttentionArgs& args) {
  constexpr bool kWide = sizeof(T) == 4;
  const AttentionForward call = attention_forward<T>(args);
  const int64_t cols = args.D > args.Dv ? args.D : args.Dv;
  if (cols <= 64)
    launch_form<T, 64, 4>(call);
  else if (cols <= 128)
    launch_form<T, 128, kWide ? 4 : 8>(call);
  else
    launch_form<T, 256, kWide ? 2 : 4>(call);
}

void attention_fwd(const AttentionArgs& args) {
  if (has_few_queries(args)) return attention_decode(args);
  FASTATTN_DISPATCH(args.query.dtype, launch_head, args);
}

}  // namespace fastattn::cuda
