// The CUDA kernels' launchers: each starts its kernels on current_stream().
#pragma once
#include "../common/kernels.h"

namespace fastattn::cuda {

const Kernels& kernels();

void attention_fwd(const AttentionArgs& args);
void attention_bwd(const AttentionArgs& args, const AttentionGradients& grads);
void sink_gradient(const AttentionArgs& args, const float* delta, float* dsinks);
void cache_append(const CacheArgs& args);
void cross_entropy_fwd(const CrossEntropyArgs& args);
void cross_entropy_bwd(const CrossEntropyArgs& args);
void gelu_fwd(const GeluArgs& args);
void gelu_bwd(const GeluArgs& args);
void glu_fwd(const GluArgs& args);
void glu_bwd(const GluArgs& args);
void norm_fwd(const NormArgs& args);
void norm_bwd(const NormArgs& args);
void rotary(const RotaryArgs& args);
void rotary_tables(const RotaryTablesArgs& args);
void softmax_fwd(const SoftmaxArgs& args);
void softmax_bwd(const SoftmaxArgs& args);

}  // namespace fastattn::cuda
