// What a backend offers its operators: a function for each. No torch header here or below.
#pragma once
#include "activation.h"
#include "attention.h"
#include "cache.h"
#include "cross_entropy.h"
#include "linear.h"
#include "matmul.h"
#include "norm.h"
#include "rotary.h"
#include "softmax.h"

namespace fastattn {

struct Kernels {
  void (*attention_fwd)(const AttentionArgs&);
  void (*attention_bwd)(const AttentionArgs&, const AttentionGradients&);
  // dsinks[h] = -sum over rows of exp(sink - lse) * delta: a sink takes part in every row's lse
  void (*sink_gradient)(const AttentionArgs&, const float* delta, float* dsinks);
  void (*cache_append)(const CacheArgs&);  // a GPU's alone
  void (*cross_entropy_fwd)(const CrossEntropyArgs&);
  void (*cross_entropy_bwd)(const CrossEntropyArgs&);
  void (*gelu_fwd)(const GeluArgs&);
  void (*gelu_bwd)(const GeluArgs&);
  void (*glu_fwd)(const GluArgs&);
  void (*glu_bwd)(const GluArgs&);
  void (*linear)(const LinearArgs&);  // a CPU's alone
  void (*matmul)(const MatmulArgs&);  // a CPU's alone
  void (*norm_fwd)(const NormArgs&);
  void (*norm_bwd)(const NormArgs&);
  void (*rotary)(const RotaryArgs&);
  void (*rotary_tables)(const RotaryTablesArgs&);
  void (*softmax_fwd)(const SoftmaxArgs&);
  void (*softmax_bwd)(const SoftmaxArgs&);
};

}  // namespace fastattn
