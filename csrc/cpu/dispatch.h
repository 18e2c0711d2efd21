// The instruction sets that were built, and the one in use.
#pragma once
#include "kernels.h"

namespace fastattn {

struct Isa {
  const IsaKernels* kernels;
  bool (*runs_here)();
};

const Isa* begin_isas();
const Isa* end_isas();

// At load: FASTATTN_ISA's set, else the widest that runs here. False where the one named does not.
bool choose_isa();

// The set in use.
const IsaKernels& isa();

namespace cpu {
const Kernels& kernels();
}

// From now on, in every thread. False, and nothing changes, where that set is not here.
bool use_isa(const char* name);

}  // namespace fastattn
