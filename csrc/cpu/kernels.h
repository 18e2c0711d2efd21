// The table of kernels, one for each instruction set. No torch header here or below.
#pragma once
#include "../common/parallel.h"
#include "../common/activation.h"
#include "../common/attention.h"
#include "../common/cross_entropy.h"
#include "../common/norm.h"
#include "../common/rotary.h"
#include "../common/softmax.h"

#define FASTATTN_STRING_(x) #x
#define FASTATTN_STRING(x) FASTATTN_STRING_(x)

namespace fastattn {

struct Kernels {
  const char* isa;
  int lanes;
  void (*attention_fwd)(const AttentionArgs&);
  void (*attention_bwd)(const AttentionArgs&, const AttentionGradients&);
  void (*cross_entropy_fwd)(const CrossEntropyArgs&);
  void (*cross_entropy_bwd)(const CrossEntropyArgs&);
  void (*gelu_fwd)(const GeluArgs&);
  void (*gelu_bwd)(const GeluArgs&);
  void (*glu_fwd)(const GluArgs&);
  void (*glu_bwd)(const GluArgs&);
  void (*norm_fwd)(const NormArgs&);
  void (*norm_bwd)(const NormArgs&);
  void (*rotary)(const RotaryArgs&);
  void (*rotary_tables)(const RotaryTablesArgs&);
  void (*softmax_fwd)(const SoftmaxArgs&);
  void (*softmax_bwd)(const SoftmaxArgs&);
};

namespace generic {
extern const Kernels kernels;
}
namespace generic16 {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

// The set in use (dispatch.h).
const Kernels& kernels();

}  // namespace fastattn
