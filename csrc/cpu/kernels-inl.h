// The table of one instruction set: the bodies, then a row of pointers to them.
#include "vec-inl.h"
//
#include "rows-inl.h"
#include "attention_tiles-inl.h"
#include "attention_scores-inl.h"
#include "attention_fwd-inl.h"
#include "attention_bwd-inl.h"
#include "attention_sinks-inl.h"
#include "activation-inl.h"
#include "cross_entropy-inl.h"
#include "fma_loop-inl.h"
#include "linear-inl.h"
#include "matmul-inl.h"
#include "norm-inl.h"
#include "rotary-inl.h"
#include "softmax-inl.h"

namespace fastattn::FASTATTN_ISA {

const IsaKernels kernels = {
    .isa = FASTATTN_STRING(FASTATTN_ISA),
    .lanes = kLanes,
    .fma_loop = fma_loop,
    .fma_loop_flops = kFmaLoopFlops,
    .table =
        {
            .attention_fwd = attention_fwd,
            .attention_bwd = attention_bwd,
            .sink_gradient = sink_gradient,
            .cross_entropy_fwd = cross_entropy_fwd,
            .cross_entropy_bwd = cross_entropy_bwd,
            .gelu_fwd = gelu_fwd,
            .gelu_bwd = gelu_bwd,
            .glu_fwd = glu_fwd,
            .glu_bwd = glu_bwd,
            .linear = linear,
            .matmul = matmul,
            .norm_fwd = norm_fwd,
            .norm_bwd = norm_bwd,
            .rotary = rotary,
            .rotary_tables = rotary_tables,
            .softmax_fwd = softmax_fwd,
            .softmax_bwd = softmax_bwd,
        },
};

}  // namespace fastattn::FASTATTN_ISA
