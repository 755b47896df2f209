// The operations that an instruction set may have instructions for, in C++ that every CPU executes. The header of an
// instruction set takes those from here for which it has none.
#pragma once
#include "vector.h"

namespace llmc::portable {

/// Registers that hold a whole vector, or as many bytes in parts.
constexpr int kVectorRegisters = 8;

/// What is added to the value of an activation where it is stored for `dot_stored`.
constexpr int kStoredAbove = 128;

/// Nearest integers, ties to even, of |x| < 2**22.
inline I nearest(F x) {
  return (I)(x + all(12582912.0f)) - all(0x4b400000);  // the sum with 1.5 * 2**23 has them in its low bits
}

/// p * 2**whole, which is e**x; 0 for x below -87.3, or below the smallest float where an instruction scales.
inline F times_power(F p, F whole, F x) {
  return x < all(-87.3f) ? F{} : p * (F)((nearest(whole) + all(127)) << 23);
}

/// 1 / x of normal numbers, to 1e-7.
inline F reciprocal(F x) { return all(1.0f) / x; }

/// 16 half-precision floats.
inline F load_half(const uint16_t* p) {
  typedef _Float16 H __attribute__((vector_size(32), aligned(2), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const H*>(p), F);
}

/// Store 16 floats, rounded to half precision.
inline void store_half(uint16_t* p, F v) {
  typedef _Float16 H __attribute__((vector_size(32), aligned(2), may_alias));
  *reinterpret_cast<H*>(p) = __builtin_convertvector(v, H);
}

/// 16 signed bytes as floats.
inline F load_bytes(const void* p) { return to_float(__builtin_convertvector(*static_cast<const B16Any*>(p), I)); }

/// c + the four products of unsigned bytes of a with signed bytes of b, in each lane.
/// Bits: width of the unsigned or the signed bytes' values, whichever is narrower; up to 5 leaves 16 bits room.
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

/// `dot` of activations as they are stored (`kStoredAbove`) with signed bytes.
template <int Bits>
inline I dot_stored(I c, I a, I b) {
  return dot<Bits>(c, a, b);
}

/// c + the two products of signed 16-bit halves of a with those of b, in each lane.
inline I dot_pairs(I c, I a, I b) {
  return c + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}

/// 16 nibbles, two in a byte, the low half first.
inline I load_nibbles(const uint8_t* p) {
  typedef uint8_t Pairs __attribute__((vector_size(8), aligned(1), may_alias));
  const Pairs pairs = *reinterpret_cast<const Pairs*>(p);
  const Pairs low = pairs & 15, high = pairs >> 4;
  return __builtin_convertvector(
      __builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15), I);
}

}  // namespace llmc::portable
