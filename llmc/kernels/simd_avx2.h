// AVX2 with F16C: a vector takes two registers. simd_portable.h defines what each operation computes.
#pragma once
#include <immintrin.h>

#include "simd_portable.h"

namespace llmc {

constexpr int kVectorRegisters = 8;
constexpr int kStoredAbove = 128;  // the first factor of vpmaddubsw is unsigned

using portable::load_bytes;
using portable::nearest;
using portable::reciprocal;
using portable::times_power;

inline F load_half(const uint16_t* p) {
  union { __m256 half[2]; F whole; } u;
  u.half[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  u.half[1] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  return u.whole;
}

inline void store_half(uint16_t* p, F v) {
  union { F whole; __m256 half[2]; } u;
  u.whole = v;
  for (int i = 0; i < 2; i++)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i), _mm256_cvtps_ph(u.half[i], _MM_FROUND_TO_NEAREST_INT));
}

template <int Bits>
inline I dot(I c, I a, I b) {
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
}

template <int Bits>
inline I dot_stored(I c, I a, I b) {
  return dot<Bits>(c, a, b);
}

inline I dot_pairs(I c, I a, I b) {
  union { I whole; __m256i half[2]; } u, x, y;
  u.whole = c;
  x.whole = a;
  y.whole = b;
  for (int i = 0; i < 2; i++) u.half[i] = _mm256_add_epi32(u.half[i], _mm256_madd_epi16(x.half[i], y.half[i]));
  return u.whole;
}

inline I load_nibbles(const uint8_t* p) {
  uint64_t packed;
  std::memcpy(&packed, p, 8);
  union { __m256i half[2]; I whole; } u;
  for (int i = 0; i < 2; i++) {
    __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(static_cast<int>(packed >> (32 * i))));
    wide = _mm256_or_si256(wide, _mm256_slli_epi64(wide, 28));
    u.half[i] = _mm256_and_si256(wide, _mm256_set1_epi32(15));
  }
  return u.whole;
}

}  // namespace llmc
