// Every kernel in 16 lanes and pairs of bf16, in baseline instructions: the logic of AVX-512 and
// its bf16 products, slowly, on any machine.
#include "headers.h"
#define FASTATTN_ISA generic16
#define FASTATTN_LANES 16
#define FASTATTN_PAIRS
#include "kernels-inl.h"
