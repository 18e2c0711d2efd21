// Every kernel for the baseline of the target: SSE2 on x86-64, NEON on 64-bit Arm.
#include "headers.h"
#define FASTATTN_ISA generic
#define FASTATTN_LANES 4
#include "kernels-inl.h"
