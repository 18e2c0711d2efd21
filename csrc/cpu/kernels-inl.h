// The table of one instruction set: the bodies, then a row of pointers to them.
#include "vec-inl.h"
//
#include "softmax-inl.h"

namespace fastattn::FASTATTN_ISA {

const Kernels kernels = {
    .isa = FASTATTN_STRING(FASTATTN_ISA),
    .lanes = kLanes,
    .softmax_fwd = softmax_fwd,
    .softmax_bwd = softmax_bwd,
};

}  // namespace fastattn::FASTATTN_ISA
