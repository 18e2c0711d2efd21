// One float vector of the target's width, and the few operations that compilers lower badly.
// FASTATTN_ISA (a namespace) and FASTATTN_LANES come from the isa_*.cpp that includes this.
// Everything else in csrc/cpu is written on Vec and never names an instruction set.
#include "headers.h"

namespace fastattn::FASTATTN_ISA {

#define FA_INLINE static inline __attribute__((always_inline))
#define FA_FOR(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)  // unrolled

constexpr int kLanes = FASTATTN_LANES;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t UVec __attribute__((vector_size(4 * kLanes)));
typedef float VecUnaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInf = __builtin_inff();
// exp(x) is exactly 0 from here down, so -inf is a mask with no further test, and infinite from
// kExpInf up.
constexpr float kExpZero = -88.f, kExpInf = 89.f;

FA_INLINE Vec splat(float x) { return x - Vec{}; }
FA_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // -ffp-contract=fast fuses it

// Both return b where either is NaN, as x86 does.
#if defined(FASTATTN_AVX512)
FA_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
FA_INLINE Vec min(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(FASTATTN_AVX2)
FA_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
FA_INLINE Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
FA_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
FA_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif

// The two halves of each 64-bit product. Processors multiply every other lane at a time.
#if defined(FASTATTN_AVX512)
FA_INLINE void multiply(UVec a, uint32_t b, UVec* high, UVec* low) {
  const __m512i factor = _mm512_set1_epi32((int)b);
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  *high = (UVec)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  *low = (UVec)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
#elif defined(FASTATTN_AVX2)
FA_INLINE void multiply(UVec a, uint32_t b, UVec* high, UVec* low) {
  const __m256i factor = _mm256_set1_epi32((int)b);
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  *high = (UVec)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  *low = (UVec)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
#else
FA_INLINE void multiply(UVec a, uint32_t b, UVec* high, UVec* low) {
  for (int l = 0; l < kLanes; ++l) {
    const uint64_t product = (uint64_t)a[l] * b;
    (*high)[l] = (uint32_t)(product >> 32);
    (*low)[l] = (uint32_t)product;
  }
}
#endif

// A tree: halves, quarters and so on. The order is fixed by kLanes alone.
#if defined(FASTATTN_AVX512)
FA_INLINE float reduce_sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
FA_INLINE float reduce_max(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
#else
FA_INLINE float reduce_sum(Vec v) {
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}
FA_INLINE float reduce_max(Vec v) {
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}
#endif

// ---- memory: float, bfloat16 and float16 all become float vectors --------------------------

FA_INLINE Vec load(const float* p) { return *(const VecUnaligned*)p; }
FA_INLINE void store(float* p, Vec v) { *(VecUnaligned*)p = v; }

#if defined(FASTATTN_AVX512)
FA_INLINE UVec widen(const uint16_t* p) {
  return (UVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
FA_INLINE void narrow(uint16_t* p, UVec v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v));
}
#elif defined(FASTATTN_AVX2)
FA_INLINE UVec widen(const uint16_t* p) {
  return (UVec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
}
FA_INLINE void narrow(uint16_t* p, UVec v) {
  const __m256i pairs = _mm256_packus_epi32((__m256i)v, (__m256i)v);
  const __m256i joined = _mm256_permute4x64_epi64(pairs, 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(joined));
}
#else
FA_INLINE UVec widen(const uint16_t* p) {
  UVec v = {};
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
}
FA_INLINE void narrow(uint16_t* p, UVec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = (uint16_t)v[i];
}
#endif

FA_INLINE Vec load(const bf16* p) { return (Vec)(widen(&p->bits) << 16); }
FA_INLINE UVec round_bf16(Vec v) {
  const UVec bits = (UVec)v;
  const UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return v == v ? rounded : (UVec)(IVec{} + 0x7fc0);
}
FA_INLINE void store(bf16* p, Vec v) { narrow(&p->bits, round_bf16(v)); }

#if defined(FASTATTN_AVX512)
FA_INLINE Vec load(const fp16* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
FA_INLINE void store(fp16* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(FASTATTN_AVX2)
FA_INLINE Vec load(const fp16* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
FA_INLINE void store(fp16* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
FA_INLINE Vec load(const fp16* p) {
  Vec v = {};
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
}
FA_INLINE void store(fp16* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
}
#endif

FA_INLINE Vec load(const uint8_t* p) {
#if defined(FASTATTN_AVX512)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(FASTATTN_AVX2)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  Vec v = {};
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

FA_INLINE Vec load(const int8_t* p) {
#if defined(FASTATTN_AVX512)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(FASTATTN_AVX2)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  Vec v = {};
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

// The first n < kLanes entries; the other lanes read as `fill` and are not written. They go
// through a buffer, save floats on AVX-512: for 1000 columns the buffer was a tenth of a softmax.
template <class T>
FA_INLINE Vec load_first(const T* p, int64_t n, float fill = 0.f) {
  T lane[kLanes];
  for (int i = 0; i < kLanes; ++i) from_float(fill, lane + i);
  __builtin_memcpy(lane, p, n * sizeof(T));
  return load(lane);
}
template <class T>
FA_INLINE void store_first(T* p, Vec v, int64_t n) {
  T lane[kLanes];
  store(lane, v);
  __builtin_memcpy(p, lane, n * sizeof(T));
}

#if defined(FASTATTN_AVX512)
FA_INLINE Vec load_first(const float* p, int64_t n, float fill = 0.f) {
  return (Vec)_mm512_mask_loadu_ps((__m512)splat(fill), (__mmask16)((1u << n) - 1), p);
}
FA_INLINE void store_first(float* p, Vec v, int64_t n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
#endif

// Past the caches, to p aligned to what is stored. Other threads see it after a locked instruction,
// as every task ends with one.
#if defined(FASTATTN_AVX512)
FA_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, (__m512)v); }
template <class T>
FA_INLINE void stream(T* p, Vec v) {
  T lane[kLanes];
  store(lane, v);
  _mm256_stream_si256((__m256i*)p, _mm256_loadu_si256((const __m256i*)lane));
}
#elif defined(FASTATTN_AVX2)
FA_INLINE void stream(float* p, Vec v) { _mm256_stream_ps(p, (__m256)v); }
template <class T>
FA_INLINE void stream(T* p, Vec v) {
  T lane[kLanes];
  store(lane, v);
  _mm_stream_si128((__m128i*)p, _mm_loadu_si128((const __m128i*)lane));
}
#else
template <class T>
FA_INLINE void stream(T* p, Vec v) {
  store(p, v);
}
#endif

// ---- pairs: two bf16 neighbours in a lane ----------------------------------------------------

// Operands of a product come in words of 32 bits: a float, or a pair, and fma of pairs adds both
// products of a lane, the high one first. One instruction does it where FASTATTN_AVX512_BF16 says
// so, to the same bits as the plain form: a product of two bf16 is exact in a float. It takes
// numbers below 2^-126 for 0.
struct bf16x2 {
  bf16 low, high;
};

FA_INLINE UVec load(const bf16x2* p) {
  UVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FA_INLINE void store(bf16x2* p, UVec v) { __builtin_memcpy(p, &v, sizeof v); }
FA_INLINE UVec splat(const bf16x2& x) {
  uint32_t word;
  __builtin_memcpy(&word, &x, sizeof word);
  return word - UVec{};
}

#if defined(FASTATTN_AVX512_BF16)
FA_INLINE Vec fma(UVec a, UVec b, Vec c) {
  return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
}
FA_INLINE UVec pair(Vec low, Vec high) {
  const __m512i joined = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  const __m512i zipped = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
      3, 18, 2, 17, 1, 16, 0);
  return (UVec)_mm512_permutexvar_epi16(zipped, joined);
}
FA_INLINE void store_term(bf16* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
#else
FA_INLINE Vec fma(UVec a, UVec b, Vec c) {
  const UVec high = UVec{} + 0xffff0000u;
  return fma((Vec)(a << 16), (Vec)(b << 16), fma((Vec)(a & high), (Vec)(b & high), c));
}
FA_INLINE UVec pair(Vec low, Vec high) { return round_bf16(low) | round_bf16(high) << 16; }
FA_INLINE void store_term(bf16* p, Vec v) { store(p, v); }
#endif

// ---- functions -----------------------------------------------------------------------------

// e^x = 2^n e^f to 2e-7 relative for -10 <= x (4e-7 below) and x <= 88; exactly 1 at 0; any NaN
// stays NaN. x is at most kExpInf. The magic number rounds x log2(e) to n, which its low bits hold.
#if defined(FASTATTN_AVX512)
// n counts sixteenths, whose powers stand in a register: three terms do the work of six, and 2^n
// takes an instruction. 2.0 ns a vector in place of 2.3.
alignas(64) constexpr float kSixteenths[16] = {1.f,         1.04427378f, 1.09050773f, 1.13878863f,
                                               1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
                                               1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                                               1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
FA_INLINE Vec exp(Vec x) {
  const Vec magic = splat(12582912.f / 16);
  const Vec shifted = fma(x, splat(kLog2e), magic), n = shifted - magic;
  const Vec f = fma(n, splat(-kLn2), x);
  const Vec p = fma(fma(splat(1.f / 6), f, splat(0.5f)) * f, f, f);
  const Vec power = (Vec)_mm512_permutexvar_ps((__m512i)shifted, _mm512_load_ps(kSixteenths));
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(kExpZero), _CMP_NLE_UQ);
  return (Vec)_mm512_maskz_scalef_ps(counts, (__m512)fma(power, p, power), (__m512)n);
}
#else
FA_INLINE Vec exp(Vec x) {
  x = max(splat(kExpZero), x);
  const Vec magic = splat(12582912.f + 127.f);  // n + 127 is the exponent of 2^n
  const Vec shifted = fma(x, splat(kLog2e), magic);
  const Vec f = fma(shifted - magic, splat(-kLn2), x);
  Vec p = splat(8.221073e-3f);
  p = fma(p, f, splat(4.19032e-2f));
  p = fma(p, f, splat(1.6668904e-1f));
  p = fma(p, f, splat(4.9999112e-1f));
  p = fma(p, f, splat(9.999992e-1f));
  p = fma(p, f, splat(1.f));
  return p * (Vec)((IVec)shifted << 23);
}
#endif

}  // namespace fastattn::FASTATTN_ISA
