// Operations for which an instruction set may have instructions, in C++ that runs on every CPU. The header of an
// instruction set uses these where it has no instruction.
#pragma once
#include "vector.h"

namespace llmc::portable {

/// Number of registers that hold a whole vector, or as many bytes in parts.
constexpr int kVectorRegisters = 8;

/// Offset added to the value of an activation when it is stored for `dot_stored`.
constexpr int kStoredAbove = 128;

/// The nearest integers, ties to even, for |x| < 2**22.
inline I nearest(F x) {
  return (I)(x + all(12582912.0f)) - all(0x4b400000);  // the sum with 1.5 * 2**23 has them in its low bits
}

/// p * 2**whole, which is e**x; 0 for x below -87.3, or below the smallest float if an instruction scales.
inline F times_power(F p, F whole, F x) {
  return x < all(-87.3f) ? F{} : p * (F)((nearest(whole) + all(127)) << 23);
}

/// 1 / x for normal numbers, accurate to 1e-7.
inline F reciprocal(F x) { return all(1.0f) / x; }

/// Load 16 half-precision floats.
inline F load_half(const uint16_t* p) {
  typedef _Float16 H __attribute__((vector_size(32), aligned(2), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const H*>(p), F);
}

/// Store 16 floats, rounded to half precision.
inline void store_half(uint16_t* p, F v) {
  typedef _Float16 H __attribute__((vector_size(32), aligned(2), may_alias));
  *reinterpret_cast<H*>(p) = __builtin_convertvector(v, H);
}

/// Load 16 signed bytes as floats.
inline F load_bytes(const void* p) { return to_float(__builtin_convertvector(*static_cast<const B16Any*>(p), I)); }

/// c + the four products of unsigned bytes of a and signed bytes of b, in each lane.
/// Bits: width of the values of the unsigned or the signed bytes, whichever is narrower; up to 5 bits fit 16-bit sums.
template <int Bits>
inline I dot(I c, I a, I b) {
  for (int i = 0; i < kLanes; i++) {
    for (int j = 0; j < 4; j++) {
      uint8_t u = static_cast<uint8_t>(static_cast<uint32_t>(a[i]) >> (8 * j));
      int8_t s = static_cast<int8_t>(static_cast<uint32_t>(b[i]) >> (8 * j));
      c[i] += u * s;
    }
  }
  return c;
}

/// The `dot` of activations in their stored form (`kStoredAbove`) with signed bytes.
template <int Bits>
inline I dot_stored(I c, I a, I b) {
  return dot<Bits>(c, a, b);
}

/// c + the two products of signed 16-bit halves of a and of b, in each lane.
inline I dot_pairs(I c, I a, I b) {
  return c + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}

/// Load 16 nibbles, two per byte, the low half first.
inline I load_nibbles(const uint8_t* p) {
  typedef uint8_t Pairs __attribute__((vector_size(8), aligned(1), may_alias));
  const Pairs pairs = *reinterpret_cast<const Pairs*>(p);
  const Pairs low = pairs & 15, high = pairs >> 4;
  return __builtin_convertvector(
      __builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15), I);
}

}  // namespace llmc::portable
