// The 16-bit formats, and their conversion one at a time, bit-exact (to nearest, ties to even).
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

namespace fastattn {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(uint8_t x) { return x; }
inline float to_float(bf16 x) { return bits_to_float((uint32_t)x.bits << 16); }
inline float to_float(fp16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 0x1f, mantissa = x.bits & 0x3ff;
  if (exponent == 0x1f) return bits_to_float(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) return bits_to_float(sign | float_to_bits((float)mantissa * 0x1p-24f));
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
  const uint32_t bits = float_to_bits(x);
  out->bits = x == x ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : (uint16_t)0x7fc0;
}
inline void from_float(float x, fp16* out) {
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
}

}  // namespace fastattn
