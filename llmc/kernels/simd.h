// Vectors of 16 lanes. Arithmetic is the compiler's own; what has no portable form is written per instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace llmc {

constexpr int kLanes = 16;

/// Registers that hold a whole vector, or as many bytes in parts.
#if defined(__AVX512F__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 8;
#endif

/// What activations are stored above their value where `dot_stored` takes them: its first factor is unsigned on
/// x86, and signed on Arm.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int kStoredAbove = 0;
#else
constexpr int kStoredAbove = 128;
#endif

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef int8_t B16 __attribute__((vector_size(16)));
typedef float FAny __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t IAny __attribute__((vector_size(64), aligned(1), may_alias));
typedef int8_t B16Any __attribute__((vector_size(16), aligned(1), may_alias));

inline F load(const float* p) { return *reinterpret_cast<const FAny*>(p); }
inline void store(float* p, F v) { *reinterpret_cast<FAny*>(p) = v; }
inline I load_ints(const void* p) { return *static_cast<const IAny*>(p); }
inline void store_ints(void* p, I v) { *static_cast<IAny*>(p) = v; }
/// The low byte of each lane.
inline void store_bytes(void* p, I v) { *static_cast<B16Any*>(p) = __builtin_convertvector(v, B16); }
inline F all(float x) { return F{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline I all(int32_t x) { return I{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline F to_float(I v) { return __builtin_convertvector(v, F); }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline F abs(F a) { return (F)((I)a & all(0x7fffffff)); }

inline F rotate8(F v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); }
inline F rotate4(F v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3); }
inline F rotate2(F v) { return __builtin_shufflevector(v, v, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1); }
inline F rotate1(F v) { return __builtin_shufflevector(v, v, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0); }

inline float sum(F v) {
  v += rotate8(v);
  v += rotate4(v);
  v += rotate2(v);
  v += rotate1(v);
  return v[0];
}

inline float largest(F v) {
  v = max(v, rotate8(v));
  v = max(v, rotate4(v));
  v = max(v, rotate2(v));
  v = max(v, rotate1(v));
  return v[0];
}

/// Lanes of two vectors in pairs, at distance `Step`: those of a first where the lane has not that bit.
template <int Step, class V, class Join>
inline V fold(V a, V b, Join&& join) {
  if constexpr (Step == 1)
    return join(__builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
                __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31));
  else if constexpr (Step == 2)
    return join(__builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  else if constexpr (Step == 4)
    return join(__builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
                __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31));
  else
    return join(__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
}

/// One vector of 16, whose lane i has all lanes of the i-th joined.
template <class V, class Join>
inline V fold(V* v, Join&& join) {
  for (int i = 0; i < 8; i++) v[i] = fold<1>(v[2 * i], v[2 * i + 1], join);
  for (int i = 0; i < 4; i++) v[i] = fold<2>(v[2 * i], v[2 * i + 1], join);
  for (int i = 0; i < 2; i++) v[i] = fold<4>(v[2 * i], v[2 * i + 1], join);
  return fold<8>(v[0], v[1], join);
}

/// Nearest integers, ties to even, of |x| < 2**22.
inline I nearest(F x) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtps_epi32((__m512)x);
#else
  return (I)(x + all(12582912.0f)) - all(0x4b400000);  // the sum with 1.5 * 2**23 has them in its low bits
#endif
}

/// e**x with a relative error below 2e-7; 0 below -87.3 (with AVX-512 below the smallest float), no infinity above 88.
inline F exp(F x) {
  const F y = min(max(x, all(-104.0f)), all(88.0f));
  const F whole = to_float(nearest(y * all(1.44269504089f)));
  F r = y - whole * all(0.693359375f);
  r = r - whole * all(-2.12194440e-4f);
  F p = all(1.9875691500e-4f);
  p = p * r + all(1.3981999507e-3f);
  p = p * r + all(8.3334519073e-3f);
  p = p * r + all(4.1665795894e-2f);
  p = p * r + all(1.6666665459e-1f);
  p = p * r + all(5.0000001201e-1f);
  p = p * r * r + r + all(1.0f);
#if defined(__AVX512F__)
  return (F)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  return x < all(-87.3f) ? F{} : p * (F)((nearest(whole) + all(127)) << 23);
#endif
}

/// 1 / x of normal numbers, to 1e-7.
inline F reciprocal(F x) {
#if defined(__AVX512F__)
  const F y = (F)_mm512_rcp14_ps((__m512)x);
  return y * (all(2.0f) - x * y);
#else
  return all(1.0f) / x;
#endif
}

inline F sigmoid(F x) { return reciprocal(all(1.0f) + exp(-x)); }
inline F tanh(F x) { return all(1.0f) - all(2.0f) / (exp(x + x) + all(1.0f)); }

/// The error function to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26).
inline F erf(F x) {
  F z = abs(x);
  F t = all(1.0f) / (all(1.0f) + all(0.3275911f) * z);
  F p = all(1.061405429f);
  p = p * t - all(1.453152027f);
  p = p * t + all(1.421413741f);
  p = p * t - all(0.284496736f);
  p = p * t + all(0.254829592f);
  F y = all(1.0f) - p * t * exp(-z * z);
  return x < F{} ? -y : y;
}

/// x * sigmoid(alpha x): SiLU with alpha 1; and the two forms of GELU (Hendrycks and Gimpel 2016).
inline F scaled_silu(F x, float alpha) { return x * sigmoid(x * all(alpha)); }
inline F gelu(F x) { return all(0.5f) * x * (all(1.0f) + erf(x * all(0.70710678f))); }
inline F gelu_tanh(F x) {
  return all(0.5f) * x * (all(1.0f) + tanh(all(0.79788456f) * (x + all(0.044715f) * x * x * x)));
}

/// 16 half-precision floats.
inline F load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  union { __m256 half[2]; F whole; } u;
  u.half[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  u.half[1] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  return u.whole;
#else
  typedef _Float16 H __attribute__((vector_size(32), aligned(2), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const H*>(p), F);
#endif
}

/// 16 floats, rounded to half precision.
inline void store_half(uint16_t* p, F v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  union { F whole; __m256 half[2]; } u;
  u.whole = v;
  for (int i = 0; i < 2; i++)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i), _mm256_cvtps_ph(u.half[i], _MM_FROUND_TO_NEAREST_INT));
#else
  typedef _Float16 H __attribute__((vector_size(32), aligned(2), may_alias));
  *reinterpret_cast<H*>(p) = __builtin_convertvector(v, H);
#endif
}

/// 16 signed bytes as floats.
inline F load_bytes(const void* p) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#else
  return to_float(__builtin_convertvector(*static_cast<const B16Any*>(p), I));
#endif
}

#if defined(__ARM_FEATURE_DOTPROD)
/// c + the four products of signed bytes of a with signed bytes of b, in each lane.
inline I dot_signed(I c, I a, I b) {
  typedef int32_t Quarter __attribute__((vector_size(16)));
  union { Quarter part[4]; I whole; } u, x, y;
  u.whole = c;
  x.whole = a;
  y.whole = b;
  for (int i = 0; i < 4; i++) u.part[i] = (Quarter)vdotq_s32(u.part[i], (int8x16_t)x.part[i], (int8x16_t)y.part[i]);
  return u.whole;
}
#endif

/// c + the four products of unsigned bytes of a with signed bytes of b, in each lane.
/// Bits: width of the unsigned or the signed bytes' values, whichever is narrower; up to 5 leaves 16 bits room.
template <int Bits>
inline I dot(I c, I a, I b) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  union { __m256i half[2]; I whole; } u, x, y;
  u.whole = c;
  x.whole = a;
  y.whole = b;
  for (int i = 0; i < 2; i++) {
    __m256i pairs;
    if constexpr (Bits <= 5) {
      pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(x.half[i], y.half[i]), _mm256_set1_epi16(1));
    } else {
      __m256i even = _mm256_madd_epi16(_mm256_and_si256(x.half[i], _mm256_set1_epi16(255)),
                                       _mm256_srai_epi16(_mm256_slli_epi16(y.half[i], 8), 8));
      __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x.half[i], 8), _mm256_srai_epi16(y.half[i], 8));
      pairs = _mm256_add_epi32(even, odd);
    }
    u.half[i] = _mm256_add_epi32(u.half[i], pairs);
  }
  return u.whole;
#elif defined(__ARM_FEATURE_DOTPROD)
  // Both factors of the instruction are signed: a = (a - 128) + 64 + 64.
  if constexpr (Bits > 7) {
    c = dot_signed(c, b, all(static_cast<int32_t>(0x40404040)));
    c = dot_signed(c, b, all(static_cast<int32_t>(0x40404040)));
    a = a ^ all(static_cast<int32_t>(0x80808080u));
  }
  return dot_signed(c, a, b);
#else
  for (int i = 0; i < kLanes; i++) {
    for (int j = 0; j < 4; j++) {
      uint8_t u = static_cast<uint8_t>(static_cast<uint32_t>(a[i]) >> (8 * j));
      int8_t s = static_cast<int8_t>(static_cast<uint32_t>(b[i]) >> (8 * j));
      c[i] += u * s;
    }
  }
  return c;
#endif
}

/// `dot` of activations as they are stored (`kStoredAbove`) with signed bytes.
template <int Bits>
inline I dot_stored(I c, I a, I b) {
#if defined(__ARM_FEATURE_DOTPROD)
  return dot_signed(c, a, b);
#else
  return dot<Bits>(c, a, b);
#endif
}

/// c + the two products of signed 16-bit halves of a with those of b, in each lane.
inline I dot_pairs(I c, I a, I b) {
#if defined(__AVX512VNNI__)
  return (I)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  union { I whole; __m256i half[2]; } u, x, y;
  u.whole = c;
  x.whole = a;
  y.whole = b;
  for (int i = 0; i < 2; i++) u.half[i] = _mm256_add_epi32(u.half[i], _mm256_madd_epi16(x.half[i], y.half[i]));
  return u.whole;
#elif defined(__ARM_FEATURE_DOTPROD)
  typedef int32_t Quarter __attribute__((vector_size(16)));
  union { Quarter part[4]; I whole; } u, x, y;
  u.whole = c;
  x.whole = a;
  y.whole = b;
  for (int i = 0; i < 4; i++) {
    const int16x8_t p = vreinterpretq_s16_s32((int32x4_t)x.part[i]), q = vreinterpretq_s16_s32((int32x4_t)y.part[i]);
    const int32x4_t pairs = vpaddq_s32(vmull_s16(vget_low_s16(p), vget_low_s16(q)), vmull_high_s16(p, q));
    u.part[i] += (Quarter)pairs;
  }
  return u.whole;
#else
  return c + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

/// 16 nibbles, two in a byte, the low half first.
inline I load_nibbles(const uint8_t* p) {
#if defined(__AVX2__)
  uint64_t packed;
  std::memcpy(&packed, p, 8);
#endif
#if defined(__AVX512F__)
  __m512i wide = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(static_cast<long long>(packed)));
  wide = _mm512_or_si512(wide, _mm512_slli_epi64(wide, 28));
  return (I)_mm512_and_si512(wide, _mm512_set1_epi32(15));
#elif defined(__AVX2__)
  union { __m256i half[2]; I whole; } u;
  for (int i = 0; i < 2; i++) {
    __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(static_cast<int>(packed >> (32 * i))));
    wide = _mm256_or_si256(wide, _mm256_slli_epi64(wide, 28));
    u.half[i] = _mm256_and_si256(wide, _mm256_set1_epi32(15));
  }
  return u.whole;
#else
  typedef uint8_t Pairs __attribute__((vector_size(8), aligned(1), may_alias));
  const Pairs pairs = *reinterpret_cast<const Pairs*>(p);
  const Pairs low = pairs & 15, high = pairs >> 4;
  return __builtin_convertvector(
      __builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15), I);
#endif
}

}  // namespace llmc
