// The 16-bit formats, and their conversion one at a time, bit-exact (to nearest, ties to even).
#pragma once
#include <cstdint>
#include <cstring>

#include "target.h"

namespace fastattn {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

FASTATTN_HD inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
FASTATTN_HD inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FASTATTN_HD inline float to_float(float x) { return x; }
FASTATTN_HD inline float to_float(uint8_t x) { return x; }
FASTATTN_HD inline float to_float(bf16 x) { return bits_to_float((uint32_t)x.bits << 16); }
FASTATTN_HD inline float to_float(fp16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 0x1f, mantissa = x.bits & 0x3ff;
  if (exponent == 0x1f) return bits_to_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return bits_to_float(sign | float_to_bits((float)mantissa * 0x1p-24f));
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

FASTATTN_HD inline void from_float(float x, float* out) { *out = x; }
FASTATTN_HD inline void from_float(float x, bf16* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const uint32_t bits = float_to_bits(x);
  out->bits = x == x ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : (uint16_t)0x7fc0;
#endif
}
FASTATTN_HD inline void from_float(float x, fp16* out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const uint32_t bits = float_to_bits(x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // rounds past 65504: infinity
  } else if (magnitude < 0x38800000) {
    // below 2^-14 halves are multiples of 2^-24: adding 0.5 makes the hardware round to them
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = (uint16_t)(sign | half);
#endif
}

}  // namespace fastattn
