// The operators of one backend over its table of kernels: schemas are fastattn/ops/*.py's.
//
// The file that includes this defines FASTATTN_BACKEND, a namespace, and in it
//   kernels()     the table
//   OnDevice      lives as long as a call: the device that its tensors lie on is current
//   kReadsData    may the host read what tensors hold? Then data is checked
//   to_host(x)    x where the host can read it
#include "attention-inl.h"
//
#include "activation-inl.h"
#include "cross_entropy-inl.h"
#include "norm-inl.h"
#include "rotary-inl.h"
#include "rotary_tables-inl.h"
#include "softmax-inl.h"

namespace fastattn::FASTATTN_BACKEND {

// Gives each operator to torch's library m.
template <class Library>
void implement(Library& m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&cross_entropy_bwd_));
  m.impl("gelu_fwd", TORCH_BOX(&gelu_fwd));
  m.impl("gelu_bwd", TORCH_BOX(&gelu_bwd));
  m.impl("glu_fwd", TORCH_BOX(&glu_fwd));
  m.impl("glu_bwd", TORCH_BOX(&glu_bwd));
  m.impl("norm_fwd", TORCH_BOX(&norm_fwd));
  m.impl("norm_bwd", TORCH_BOX(&norm_bwd));
  m.impl("rotary_fwd", TORCH_BOX(&rotary_fwd));
  m.impl("rotary_bwd", TORCH_BOX(&rotary_bwd));
  m.impl("rotary_tables_fwd", TORCH_BOX(&rotary_fwd));
  m.impl("rotary_tables_bwd", TORCH_BOX(&rotary_tables_bwd));
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd));
}

}  // namespace fastattn::FASTATTN_BACKEND
