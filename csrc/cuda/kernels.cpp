// The table of CUDA kernels. An operator without one is declined by fastattn/ops/cuda.py.
#include "kernels.h"

namespace fastattn::cuda {

static const Kernels table = {
    .softmax_fwd = softmax_fwd,
    .softmax_bwd = softmax_bwd,
};
const Kernels& kernels() { return table; }

}  // namespace fastattn::cuda
