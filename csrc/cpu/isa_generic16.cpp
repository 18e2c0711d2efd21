// Every kernel in 16 lanes of baseline instructions: AVX-512's logic, slowly, on any machine.
#include "headers.h"
#define FASTATTN_ISA generic16
#define FASTATTN_LANES 16
#include "kernels-inl.h"
