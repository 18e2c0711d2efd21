// Every header whose inline functions the CPU kernels use. An isa_*.cpp includes it before it asks
// for an instruction set, so that those functions stay code for any processor.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/types.h"
#include "kernels.h"
