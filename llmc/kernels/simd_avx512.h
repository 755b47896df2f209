// AVX-512 with VNNI: a vector takes one register. simd_portable.h defines what each operation computes.
#pragma once
#include <immintrin.h>

#include "vector.h"

namespace llmc {

constexpr int kVectorRegisters = 32;
constexpr int kStoredAbove = 128;  // the first factor of vpdpbusd is unsigned

inline I nearest(F x) { return (I)_mm512_cvtps_epi32((__m512)x); }

inline F times_power(F p, F whole, F) { return (F)_mm512_scalef_ps((__m512)p, (__m512)whole); }

inline F reciprocal(F x) {
  const F y = (F)_mm512_rcp14_ps((__m512)x);
  return y * (all(2.0f) - x * y);
}

inline F load_half(const uint16_t* p) {
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline void store_half(uint16_t* p, F v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}

inline F load_bytes(const void* p) {
  return (F)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}

template <int Bits>
inline I dot(I c, I a, I b) {
  return (I)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
}

template <int Bits>
inline I dot_stored(I c, I a, I b) {
  return dot<Bits>(c, a, b);
}

inline I dot_pairs(I c, I a, I b) { return (I)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b); }

inline I load_nibbles(const uint8_t* p) {
  uint64_t packed;
  std::memcpy(&packed, p, 8);
  __m512i wide = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(static_cast<long long>(packed)));
  wide = _mm512_or_si512(wide, _mm512_slli_epi64(wide, 28));
  return (I)_mm512_and_si512(wide, _mm512_set1_epi32(15));
}

}  // namespace llmc
