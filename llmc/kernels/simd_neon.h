// NEON with dot products: a vector takes four registers. simd_portable.h defines what each operation computes.
#pragma once
#include <arm_neon.h>

#include "simd_portable.h"

namespace llmc {

constexpr int kVectorRegisters = 8;
constexpr int kStoredAbove = 0;  // both factors of sdot are signed

using portable::load_bytes;
using portable::load_half;
using portable::load_nibbles;
using portable::nearest;
using portable::reciprocal;
using portable::store_half;
using portable::times_power;

typedef int32_t Quarter __attribute__((vector_size(16)));

/// c + the four products of signed bytes of a and of b, in each lane.
inline I dot_signed(I c, I a, I b) {
  union { Quarter part[4]; I whole; } u, x, y;
  u.whole = c;
  x.whole = a;
  y.whole = b;
  for (int i = 0; i < 4; i++) u.part[i] = (Quarter)vdotq_s32(u.part[i], (int8x16_t)x.part[i], (int8x16_t)y.part[i]);
  return u.whole;
}

/// Both factors of the instruction are signed: a = (a - 128) + 64 + 64.
template <int Bits>
inline I dot(I c, I a, I b) {
  if constexpr (Bits > 7) {
    c = dot_signed(c, b, all(static_cast<int32_t>(0x40404040)));
    c = dot_signed(c, b, all(static_cast<int32_t>(0x40404040)));
    a = a ^ all(static_cast<int32_t>(0x80808080u));
  }
  return dot_signed(c, a, b);
}

template <int Bits>
inline I dot_stored(I c, I a, I b) {
  return dot_signed(c, a, b);
}

inline I dot_pairs(I c, I a, I b) {
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
}

}  // namespace llmc
