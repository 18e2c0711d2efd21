// The table of CUDA kernels.
#include "kernels.h"

namespace fastattn::cuda {

static const Kernels table = {
    .attention_fwd = attention_fwd,
    .attention_bwd = attention_bwd,
    .sink_gradient = sink_gradient,
    .cache_append = cache_append,
    .cross_entropy_fwd = cross_entropy_fwd,
    .cross_entropy_bwd = cross_entropy_bwd,
    .gelu_fwd = gelu_fwd,
    .gelu_bwd = gelu_bwd,
    .glu_fwd = glu_fwd,
    .glu_bwd = glu_bwd,
    .norm_fwd = norm_fwd,
    .norm_bwd = norm_bwd,
    .rotary = rotary,
    .rotary_tables = rotary_tables,
    .softmax_fwd = softmax_fwd,
    .softmax_bwd = softmax_bwd,
};
const Kernels& kernels() { return table; }

}  // namespace fastattn::cuda
