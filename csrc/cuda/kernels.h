// The CUDA kernels' launchers: each starts its kernels on current_stream().
#pragma once
#include "../common/kernels.h"

namespace fastattn::cuda {

const Kernels& kernels();

void softmax_fwd(const SoftmaxArgs& args);
void softmax_bwd(const SoftmaxArgs& args);

}  // namespace fastattn::cuda
